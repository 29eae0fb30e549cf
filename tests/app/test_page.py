"""The pages of two pipelines, used over HTTP as by gradio's client."""

import configparser
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image


gr = pytest.importorskip("gradio")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402
from gradio_client.utils import QueueError  # noqa: E402

from diffusers_vqdit import VQDiTPipeline  # noqa: E402
from diffusers_vqdit.app import __main__ as command  # noqa: E402
from diffusers_vqdit.app import page as whole_page  # noqa: E402
from diffusers_vqdit.app.abilities import (  # noqa: E402
    AUDIOS,
    IMAGES,
    TEXTS,
    Ability,
    CodesModel,
    Field,
    LatentModel,
    by_tab,
)
from diffusers_vqdit.app.examples import Examples  # noqa: E402
from diffusers_vqdit.app.page import launch, make_page  # noqa: E402
from diffusers_vqdit.app.tabs import SamplingOptions, TaskPicker  # noqa: E402
from diffusers_vqdit.utils.provenance import COMPOSITE, GENERATED, digital_source_type  # noqa: E402


FIXED = {"A new seed each time": False, "Inference steps": 4}
CARDS = Path(__file__).resolve().parents[2] / "model_cards"
PIPELINES = sorted(path.parent for path in CARDS.glob("*/model_index.json"))


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
    painted = {"Paint over what is to change": editor}
    shown, _ = person.use("repaint", **painted, text="a blue box", How_many=2, **FIXED)
    before = np.array(Image.open(path).convert("RGB"))
    for one in shown:
        assert (pixels(one)[:, 8:] == before[:, 8:]).all() and (pixels(one)[:, :8] != before[:, :8]).any()
        assert digital_source_type(one["image"]) == COMPOSITE
    repaired, _ = person.use("repair", Picture=background, Task="->image", How_many=1, **FIXED)
    assert digital_source_type(repaired[0]["image"]) == COMPOSITE


def test_each_segment_of_pictures_is_repainted(page_pipeline, picture_file, tmp_path):
    tasks = page_pipeline.transformer.config.tasks
    page_pipeline.transformer.register_to_config(tasks=["->image", "->sketch"])
    page = make_page(page_pipeline, str(tmp_path))
    try:
        someone = Person(launch(page, prevent_thread_lock=True, quiet=True)[1], tmp_path)
        picture = handle_file(picture_file(16, 16))
        for task in ("->image", "->sketch"):
            shown, _ = someone.use("repair", Picture=picture, Task=task, How_many=1, **FIXED)
            assert pixels(shown[0]).shape == (16, 16, 3)
    finally:
        page_pipeline.transformer.register_to_config(tasks=tasks)
        page.close()


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
    captions = '{"0.png": "a cat", "0.wav": "a dog", "1.flac": "a bird", "1.jpg": "a fish", "../../a.png": "a secret"}'
    captions = captions.replace("}", f', "{tmp_path}/b.png": "another"}}')  # what stands elsewhere is nobody's example
    (tmp_path / "examples" / "captions.json").write_text(captions, encoding="utf-8")
    loaded = Examples.load(str(tmp_path), "poem")
    assert loaded.texts == {"poem": ["床前明月光"]}
    files = {IMAGES: {"0.png": "a cat", "1.jpg": "a fish"}, AUDIOS: {"0.wav": "a dog", "1.flac": "a bird"}}
    assert {kind: {Path(path).name: one for path, one in some.items()} for kind, some in loaded.files.items()} == files
    assert {Path(path).parent for some in loaded.files.values() for path in some} == {tmp_path / "examples"}
    assert Examples.load("nobody/nothing", "poem") == Examples("poem")


def parts_of(block, kind):
    """The components of a kind inside of a block."""
    for child in getattr(block, "children", []):
        if isinstance(child, kind):
            yield child
        yield from parts_of(child, kind)


@pytest.mark.parametrize("folder", PIPELINES, ids=lambda folder: folder.name)
def test_the_page_of_a_shipped_pipeline_has_an_example_in_each_tab_and_of_each_task(root, folder):
    pipeline = command.load_pipeline(str(folder))
    model = (CodesModel if isinstance(pipeline, VQDiTPipeline) else LatentModel)(pipeline)
    page = make_page(pipeline, str(folder))
    needless = {name for name, some in by_tab(model.abilities).items() if not any(one.given for one in some)}
    shown = {tab.label: list(parts_of(tab, gr.Dataset)) for tab in parts_of(page, gr.Tab)}
    assert shown and all(shown[name] for name in shown if name not in needless)
    assert all(
        len({str(one) for one in some.samples}) == len(some.samples) for each in shown.values() for some in each
    )
    examples = Examples.load(str(folder), whole_page.pipeline_text(model))
    names = {one.name for ability in model.abilities for one in (*ability.given, *ability.generated)}
    assert set(examples.texts) <= {*names, *(ability.task for ability in model.abilities)}
    assert all(Path(path).is_file() for some in examples.files.values() for path in some)
    for ability in model.abilities:
        kinds = {one.kind for one in ability.given} & {IMAGES, AUDIOS}
        assert not ability.given or kinds <= set(examples.files) and (kinds or examples._rows(ability)), ability


def test_a_slider_of_steps_begins_within_its_range():
    """A text of 512 codes has as many steps by default."""
    with gr.Blocks() as page:
        SamplingOptions(Ability("->text", (), (Field("text", TEXTS),), 512, None), None)
    steps = next(one for one in parts_of(page, gr.Slider) if one.label == "Inference steps")
    assert steps.value == steps.maximum == 256


def test_an_example_that_several_tasks_take_is_shown_once_and_keeps_the_chosen_one():
    words = Field("words", TEXTS)
    given = {"words->song": (words,), "words->talk": (words,), "->talk": ()}
    with gr.Blocks() as page:
        picker = TaskPicker([Ability(task, some, (Field("any", AUDIOS),), 4, None) for task, some in given.items()])
        Examples("words", {"words": ["hello", "bye"]}).show(picker)
    (chips,), (enter,) = parts_of(page, gr.Dataset), [event.fn for event in page.fns.values()]
    assert chips.samples == [["hello"], ["bye"]]
    assert enter(1, "words->talk") == ["words->talk", "bye"] and enter(0, "->talk") == ["words->song", "hello"]


def test_a_pipeline_without_a_task_to_show_is_refused(page_pipeline, monkeypatch):
    monkeypatch.setattr(type(page_pipeline), "tasks", [])
    with pytest.raises(ValueError, match="'here' knows no task of texts"):
        make_page(page_pipeline, "here")


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape('pip install "diffusers_vqdit[app]"')):
        command.main(command.parse_args([]))


def tokenizer_folder(folder, parts):
    parts.image_vq.save_pretrained(folder)


def foreign_pipeline(folder, parts):
    unet = UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)


def damaged_pipeline(folder, parts):
    parts.save_pretrained(folder)
    for path in folder.glob("transformer/*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (None, "model_index.json"),
        (tokenizer_folder, "model_index.json"),
        (foreign_pipeline, "is a DDPMPipeline"),
        (damaged_pipeline, ""),
    ],
)
def test_what_is_no_pipeline_of_ours_is_refused_in_a_sentence(make_pipeline, tmp_path, make, reason):
    folder = tmp_path / "there"
    if make is not None:
        make(folder, make_pipeline(0))
    named = re.escape(f"pretrained_model_name_or_path={str(folder)!r} must be a folder or Hub id of a VQDiTPipeline")
    with pytest.raises(ValueError, match=f"^{named} or VQDiTLatentPipeline.*{reason}"):
        command.main(command.parse_args(["--pretrained_model_name_or_path", str(folder)]))


def wait_until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_when_too_many_wait_one_more_is_told(page_pipeline, tmp_path, monkeypatch):
    """Two calls run, and as many as may be wait."""
    go_on, running = threading.Event(), threading.Semaphore(0)

    def call(model, ability, values, **options):
        running.release()
        assert go_on.wait(60)
        return {"image": [Image.new("RGB", (8, 8))]}

    monkeypatch.setattr(CodesModel, "__call__", call)
    monkeypatch.setattr(whole_page, "MAX_WAITING", 3)
    page = make_page(page_pipeline, str(tmp_path))
    _, address, _ = launch(page, prevent_thread_lock=True, quiet=True)
    try:
        client = Person(address, tmp_path / "got").client
        jobs = []
        for waiting in (0, 0, 1, 2, 3):
            jobs.append(client.submit(param_1="a dot", param_3=1, api_name="/draw"))
            assert waiting or running.acquire(timeout=60)
            wait_until(lambda waiting=waiting: len(page._queue) == waiting)
        with pytest.raises(QueueError, match="Queue is full"):
            client.submit(param_1="a dot", param_3=1, api_name="/draw").result(timeout=60)
        go_on.set()
        assert all(job.result(timeout=60) for job in jobs)
    finally:
        go_on.set()
        page.close()


def test_who_installs_the_page_has_what_reads_sounds(root):
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    extras = {name: set(lines.split()) for name, lines in setup["options.extras_require"].items()}
    assert extras["audio"] and extras["audio"] <= extras["app"]
