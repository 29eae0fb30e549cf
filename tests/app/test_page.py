"""The pages of two pipelines, used over HTTP as by gradio's client."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("gradio")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from diffusers_vqdit.app import __main__ as command  # noqa: E402
from diffusers_vqdit.app.examples import Examples  # noqa: E402
from diffusers_vqdit.app.page import make_page  # noqa: E402
from diffusers_vqdit.utils.provenance import COMPOSITE, GENERATED, digital_source_type  # noqa: E402


FIXED = {"A new seed each time": False, "Inference steps": 4}


class Person:
    """Someone who enters values by the labels of the page."""

    def __init__(self, address, folder):
        self.client = Client(address, verbose=False, download_files=str(folder))
        self.endpoints = self.client.view_api(return_format="dict", print_info=False)["named_endpoints"]

    def use(self, tab, **values):
        values = {name.replace("_", " ") if name == "How_many" else name: value for name, value in values.items()}
        parameters = self.endpoints[f"/{tab}"]["parameters"]
        known = {one["label"] for one in parameters}
        assert set(values) <= known, known
        named = {one["parameter_name"]: values[one["label"]] for one in parameters if one["label"] in values}
        missing = [one for one in parameters if one["label"] not in values and not one["parameter_has_default"]]
        return self.client.predict(api_name=f"/{tab}", **named, **{one["parameter_name"]: None for one in missing})


@pytest.fixture(scope="module")
def person(served, tmp_path_factory):
    return Person(served["codes"], tmp_path_factory.mktemp("person"))


@pytest.fixture(scope="module")
def latent_person(served, tmp_path_factory):
    return Person(served["latents"], tmp_path_factory.mktemp("latent_person"))


def pixels(shown):
    return np.array(Image.open(shown["image"]).convert("RGB"))


def test_a_page_has_the_tabs_of_its_tasks(person, latent_person):
    tabs = {"draw", "repaint", "repair", "enlarge", "edit", "caption", "label", "pairs", "texts", "find"}
    assert set(person.endpoints) == {f"/{name}" for name in tabs}
    assert set(latent_person.endpoints) == {"/draw", "/repaint", "/repair"}


def test_what_is_drawn_is_what_the_pipeline_draws_and_says_so(person, page_pipeline):
    shown, seed = person.use("draw", text="a red apple", How_many=3, Seed=7, **FIXED)
    generators = [torch.Generator().manual_seed(7 + index) for index in range(3)]
    options = {"num_inference_steps": 4, "num_images_per_prompt": 3, "generator": generators, "guidance_scale": 3.0}
    expected = page_pipeline("a red apple", output="image", **options).images
    assert seed == 7 and [pixels(one).tolist() for one in shown] == [np.array(one).tolist() for one in expected]
    assert {digital_source_type(one["image"]) for one in shown} == {GENERATED}
    assert Image.open(shown[0]["image"]).text["Description"] == "a red apple"


def test_a_new_seed_draws_another_picture(person):
    values = {"text": "a dot", "How_many": 1, "Seed": 3, "Inference steps": 1}
    seeds = {person.use("draw", **values)[1] for _ in range(2)}
    assert len(seeds) == 2 and 3 not in seeds


def test_labels_and_nothing_are_drawn_too(person):
    by_label = person.use("draw", Task="label->image", label="box", How_many=1, **FIXED)[0]
    free = person.use("draw", Task="->image", How_many=1, **FIXED)[0]
    assert Image.open(by_label[0]["image"]).text["Description"] == "box"
    assert "Description" not in Image.open(free[0]["image"]).text


def test_captions_are_those_of_the_pipeline(person, page_pipeline, picture_file):
    path = picture_file(20, 16)
    values = {"image": handle_file(path), "Task": "image->text_zh", **FIXED}
    expected = page_pipeline(image=Image.open(path), output="text_zh", num_inference_steps=4)
    assert person.use("caption", **values)[1] == expected.segments["text_zh"][0]
    known = person.use("caption", image=handle_file(path), **{"What it says already (may be empty)": "a <mask> box"})
    assert known[0].startswith("a") and known[0].endswith("box")


def test_other_tasks_make_what_they_say(person, picture_file):
    small = handle_file(picture_file(10, 12))
    large, _ = person.use("enlarge", image_lowres=small, **FIXED)
    assert pixels(large[0]).shape == (24, 20, 3)
    edited, _ = person.use("edit", sketch=small, How_many=2, **FIXED)
    assert len(edited) == 2 and pixels(edited[0]).shape == (16, 16, 3)
    pairs, texts, _ = person.use("pairs", How_many=2, **FIXED)
    assert [one["caption"] for one in pairs] == texts.split("\n") and len(pairs) == 2
    assert person.use("texts", Task="text->text_zh", text="green", **FIXED)[1]


def test_repainting_keeps_the_rest_bit_for_bit(person, picture_file, tmp_path):
    path = picture_file(16, 16)
    layer = Image.new("RGBA", (16, 16))
    layer.paste((255, 0, 255, 255), (0, 0, 8, 16))
    layer.save(tmp_path / "layer.png")
    background = handle_file(path)
    editor = {"background": background, "layers": [handle_file(str(tmp_path / "layer.png"))], "composite": background}
    painted = {"Paint over what is to be drawn anew": editor}
    shown, _ = person.use("repaint", **painted, text="a blue box", How_many=2, **FIXED)
    before = np.array(Image.open(path).convert("RGB"))
    for one in shown:
        assert (pixels(one)[:, 8:] == before[:, 8:]).all() and (pixels(one)[:, :8] != before[:, :8]).any()
        assert digital_source_type(one["image"]) == COMPOSITE
    repaired, _ = person.use("repair", Picture=background, Task="->image", How_many=1, **FIXED)
    assert digital_source_type(repaired[0]["image"]) == COMPOSITE


def test_labels_have_the_pipeline_s_probabilities(person, page_pipeline, picture_file):
    path = picture_file(16, 16)
    output = page_pipeline.classify(image=Image.open(path))
    shown = person.use("label", image=handle_file(path))
    found = {one["label"]: one["confidence"] for one in shown["confidences"]}
    assert shown["label"] == output.labels[0]
    assert found == pytest.approx(dict(zip(output.names, output.probabilities[0].tolist(), strict=True)), abs=1e-5)
    names = {"Names to choose among, one a line": "a cat\na dog\n"}
    shown = person.use("label", Task="image->text", image=handle_file(path), **names)
    assert {one["label"] for one in shown["confidences"]} == {"a cat", "a dog"}


def test_a_gallery_is_searched_by_texts_and_a_list_of_texts_by_pictures(person, page_pipeline, picture_file):
    paths = [picture_file(16, 16, color) for color in ("red", "green", "blue", "black")]
    gallery = [{"image": handle_file(path), "caption": None} for path in paths]
    expected = page_pipeline.index(image=[Image.open(path) for path in paths])
    best = page_pipeline.retrieve("a blue box", expected, top_k=4).indices[0].tolist()
    for _ in range(2):  # made, and kept
        found = person.use("find", **{"Pictures to look in": gallery, "text": "a blue box"})[0]
        assert [pixels(one).tolist() for one in found] == [
            np.array(Image.open(paths[row]).convert("RGB")).tolist() for row in best
        ]
    lines = {"Texts to look in, one a line": "a red apple\ngreen\nwhite"}
    ranked = person.use("find", Find="text by image", image=handle_file(paths[0]), **lines)[1]
    assert sorted(line.split(". ")[1] for line in ranked.split("\n")) == ["a red apple", "green", "white"]


@pytest.mark.parametrize(
    ("tab", "values", "message"),
    [
        ("draw", {"text": ""}, "Write something into 'text' first."),
        ("draw", {"text": "word " * 500}, "'text' has 2499 characters; at most 2000"),
        ("caption", {}, "Give a picture as 'image' first."),
        (
            "label",
            {"Task": "image->text", "Names to choose among, one a line": "one"},
            "write 2 to 256|Give a picture",
        ),
        ("find", {"text": "a dot"}, "There are 0 pictures to look in"),
        ("repaint", {"text": "a dot", "Picture": None}, "Give a picture first"),
        ("texts", {"What it says already (may be empty)": "<mask>" * 40}, "."),
    ],
)
def test_errors_are_sentences(person, tab, values, message):
    if message == ".":  # what is too long for the model is cut, which is a warning
        person.use(tab, **values)
        return
    with pytest.raises(AppError, match=message) as refused:
        person.use(tab, **values)
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize(("tab", "label"), [("caption", "image"), ("enlarge", "image_lowres"), ("repair", "Picture")])
def test_a_broken_upload_is_told_in_a_sentence(person, tmp_path, tab, label):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(AppError, match="This file can't be read") as refused:
        person.use(tab, **{label: handle_file(str(tmp_path / "broken.png"))})
    assert "/" not in str(refused.value)


def test_two_people_at_once_get_each_their_own(served, tmp_path):
    people = [Person(served["codes"], tmp_path / str(index)) for index in range(2)]
    alone = [people[0].use("draw", text=text, How_many=1, Seed=5, **FIXED)[0] for text in ("green", "a dot")]

    def draw(index):
        return people[index].use("draw", text=("green", "a dot")[index], How_many=1, Seed=5, **FIXED)[0]

    with ThreadPoolExecutor(2) as both:
        together = list(both.map(draw, range(2)))
    assert (pixels(alone[0][0]) != pixels(alone[1][0])).any()
    for one, other in zip(alone, together, strict=True):
        assert (pixels(one[0]) == pixels(other[0])).all()


def test_a_pipeline_over_latents_draws_and_repaints(latent_person, latent_page_pipeline, picture_file):
    shown, _ = latent_person.use("draw", text="a red apple", How_many=2, Seed=1, **FIXED)
    generators = [torch.Generator().manual_seed(1 + index) for index in range(2)]
    options = {"num_inference_steps": 4, "num_images_per_prompt": 2, "generator": generators}
    expected = latent_page_pipeline("a red apple", **options).images
    assert [pixels(one).tolist() for one in shown] == [np.array(one).tolist() for one in expected]
    labelled, _ = latent_person.use("draw", Task="label->image", label="apple", How_many=1, **FIXED)
    assert digital_source_type(labelled[0]["image"]) == GENERATED
    picture = handle_file(picture_file(16, 16))
    repaired, _ = latent_person.use("repair", Picture=picture, text="a dot", How_many=1, **FIXED)
    assert digital_source_type(repaired[0]["image"]) == COMPOSITE


def test_examples_are_those_of_the_checkpoint(tmp_path):
    assert Examples.load(str(tmp_path), "poem") == Examples("poem")
    card = "---\nwidget:\n- text: a red apple\n  output: {url: samples/0.png}\n- text: a dot\n---\n# Model\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert Examples.load(str(tmp_path), "poem").texts == {"poem": ["a red apple", "a dot"]}
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "prompts.json").write_text('{"poem": ["床前明月光"]}', encoding="utf-8")
    (tmp_path / "examples" / "captions.json").write_text('{"0.png": "a cat"}', encoding="utf-8")
    loaded = Examples.load(str(tmp_path), "poem")
    assert loaded.texts == {"poem": ["床前明月光"]}
    assert loaded.pictures == {str(tmp_path / "examples" / "0.png"): "a cat"}
    assert Examples.load("nobody/nothing", "poem") == Examples("poem")


def test_the_starter_s_examples_are_of_its_segments(root):
    from diffusers_vqdit import VQDiTTransformer2DModel

    folder = root / "model_cards" / "vqdit-emoji"
    config = VQDiTTransformer2DModel.load_config(folder / "transformer")
    loaded = Examples.load(str(folder), "text")
    assert loaded.texts and set(loaded.texts) <= {*config["segments"], *config["tasks"]}
    assert loaded.pictures and all(Path(path).is_file() for path in loaded.pictures)


def test_a_pipeline_without_a_task_to_show_is_refused(page_pipeline, monkeypatch):
    monkeypatch.setattr(type(page_pipeline), "tasks", [])
    with pytest.raises(ValueError, match="'here' knows no task of texts"):
        make_page(page_pipeline, "here")


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=re.escape('pip install "diffusers_vqdit[app]"')):
        command.main(command.parse_args([]))
