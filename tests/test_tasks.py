import pytest

from diffusers_vqdit.tasks import Task, check_task, parse_tasks


def test_parse_and_print_are_inverse():
    for text in ("text->image", "->image+text", "image_lowres+text->image"):
        assert str(Task.parse(text)) == text


def test_order_within_a_side_has_no_meaning():
    assert Task.parse("b + a->d+c") == Task.parse("a+b->c+d")


def test_weights():
    tasks = parse_tasks("text->image:4, image->text:0.5,->image")
    assert {str(task): weight for task, weight in tasks} == {"text->image": 4, "image->text": 0.5, "->image": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text", "must have one '->'"),
        ("a->b->c", "must have one '->'"),
        ("text->", "no segment to generate"),
        ("a->a", "twice"),
        ("a b->c", "no segment name"),
        ("text->image:-1", "positive number"),
        ("text->image:x", "positive number"),
        ("text->image,text->image", "twice"),
    ],
)
def test_errors_name_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_tasks(text)


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'image->text'; it knows text->image, ->image"):
        check_task(Task.parse("image->text"), ["text->image", "->image"])


def test_a_model_keeps_tasks_in_the_form_that_is_compared(transformer):
    """Wherever they come from."""
    transformer.register_to_config(tasks=["text -> image", "->text+image", "->image+text"])
    assert transformer.config.tasks == ["text->image", "->image+text", "->image+text"]
    config = {**transformer.config, "tasks": ("label->text+image",)}
    assert type(transformer).from_config(config).config.tasks == ["label->image+text"]
    with pytest.raises(ValueError, match="tasks: task 'text' must have one '->'"):
        type(transformer).from_config({**transformer.config, "tasks": ["text"]})
