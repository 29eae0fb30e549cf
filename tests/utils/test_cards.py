"""Cards of what is published without its training."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import ModelCard, get_hf_file_metadata, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from diffusers_vqdit import ImageVQModel, VQDiTLatentPipeline, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.utils import cards


def test_what_is_pushed_has_a_card_of_ours(hub, client, pipeline, text_vq, tmp_path):
    """In place of diffusers' with nothing filled in; one that someone has written stays."""

    def card(name):
        return ModelCard(hub.repositories[f"alice/{name}"].resolve("main").files["README.md"].content.decode())

    pipeline.push_to_hub("alice/pipe")
    denoiser = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, patch_size=1, num_embeds_ada_norm=3
    )
    latents = VQDiTLatentPipeline(denoiser, pipeline.image_vq, FlowMatchEulerDiscreteScheduler())
    latents.push_to_hub("alice/latents")
    pipeline.image_vq.push_to_hub("alice/image_vq")
    text_vq.push_to_hub("alice/text_vq")
    pipeline.transformer.push_to_hub("alice/transformer")
    pipeline.scheduler.push_to_hub("alice/scheduler")
    pipeline.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/saved")
    pipeline.image_vq.save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="alice/model")
    for name in ("pipe", "latents", "image_vq", "text_vq", "transformer", "scheduler", "saved", "model"):
        text = card(name).content
        assert f"# {name}\n" in text and "More Information Needed" not in text and f'"alice/{name}"' in text, name
        for heading in ("Use", "Intended use", "Limits", "Risks", "Evaluation", "Training", "Data and licences"):
            assert f"\n## {heading}\n" in text, (name, heading)
        assert card(name).data.library_name == "diffusers" and "diffusers_vqdit" in card(name).data.tags
        huggingface_hub.HfApi()._validate_yaml(text)
    assert card("pipe").data.pipeline_tag == "text-to-image" and "flow-matching" in card("latents").data.tags
    assert (tmp_path / "saved" / "README.md").read_text() == card("saved").content

    written = ModelCard("---\nlicense: mit\n---\n\n# Mine\n")
    written.push_to_hub("alice/pipe")
    pipeline.push_to_hub("alice/pipe")
    assert card("pipe").data.license == "mit" and "# Mine" in card("pipe").content
    (tmp_path / "saved" / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine too\n")
    pipeline.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/saved")
    assert card("saved").content == "---\nlicense: mit\n---\n\n# Mine too\n"
    blank = populate_model_card(load_or_create_model_card("alice/nothing"))
    blank.data.license = "apache-2.0"
    blank.push_to_hub("alice/model")  # by an earlier version
    pipeline.image_vq.push_to_hub("alice/model")
    assert card("model").data.license == "apache-2.0" and "* Weights: apache-2.0" in card("model").content


RUN_CARD = """\
---
license: apache-2.0
tags:
- diffusers_vqdit
widget:
- text: a red apple
  output:
    url: samples/0.png
- text: outside
  output:
    url: ../outside.png
- text: outside by a link
  output:
    url: samples/link.png
- text: no picture
  output:
    url: training_args.json
---

# run

Trained for a day. `DiffusionPipeline.from_pretrained("run")`
"""


def test_the_card_beside_the_weights_that_were_loaded_is_kept(hub, client, pipeline, tmp_path):
    """With its pictures; of a folder, whoever wrote it, and of a repository where it is one of ours."""

    def files(name):
        found = hub.repositories[f"alice/{name}"].resolve("main").files
        return {path: file.content for path, file in found.items() if path.endswith((".md", ".png", "_args.json"))}

    run = tmp_path / "run"
    pipeline.save_pretrained(run)
    (run / "samples").mkdir()
    (run / "samples" / "0.png").write_bytes(b"a picture")
    (run / "README.md").write_text(RUN_CARD)
    (tmp_path / "outside.png").write_bytes(b"private")
    (run / "samples" / "link.png").symlink_to(tmp_path / "outside.png")
    (run / "training_args.json").write_text("{}")
    loaded = VQDiTPipeline.from_pretrained(run)
    loaded.push_to_hub("alice/kept")
    here = RUN_CARD.replace('from_pretrained("run")', 'from_pretrained("alice/kept")').encode()
    assert files("kept") == {"README.md": here, "samples/0.png": b"a picture"}
    loaded.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/kept-too")
    assert files("kept-too") == {"README.md": here.replace(b"kept", b"kept-too"), "samples/0.png": b"a picture"}
    assert (tmp_path / "saved" / "README.md").read_bytes() == files("kept-too")["README.md"]

    VQDiTPipeline.from_pretrained("alice/kept").push_to_hub("alice/again")
    assert files("again") == files("kept")
    loaded.transformer.push_to_hub("alice/part")  # which the card of the whole isn't of
    assert b"How it was trained isn't known here." in files("part")["README.md"]
    ModelCard("---\nlicense: mit\n---\n\n# Another's\n").push_to_hub("alice/kept")
    VQDiTPipeline.from_pretrained("alice/kept").push_to_hub("alice/plain")
    assert b"How it was trained isn't known here." in files("plain")["README.md"]

    image_vq = tmp_path / "image_vq"
    pipeline.image_vq.save_pretrained(image_vq)
    for content, kept in (("# Mine\n", True), ("---\n- [\n---\n# Broken\n", False)):
        (image_vq / "README.md").write_text(content)
        ImageVQModel.from_pretrained(image_vq).push_to_hub(f"alice/image-{len(content)}")
        assert (files(f"image-{len(content)}")["README.md"].decode() == content) == kept


def test_a_card_is_not_kept_with_other_weights(hub, client, pipeline, image_vq, tmp_path, caplog):
    """Trained further, exchanged, of another dtype or left out; of what a folder has and a repository."""
    pipeline.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text(RUN_CARD)
    VQDiTPipeline.from_pretrained(tmp_path / "run").push_to_hub("alice/source")

    def trained(pipe):
        next(pipe.transformer.parameters()).data.add_(1)

    def exchanged(pipe):
        pipe.image_vq = ImageVQModel.from_config(image_vq.config)

    def converted(pipe):
        pipe.to(torch.float16)

    def without_texts(pipe):
        pipe.text_vq = pipe.tokenizer = None

    changes = (lambda pipe: None, trained, exchanged, converted, without_texts)
    for place, tried in ((tmp_path / "run", changes), ("alice/source", changes[:2])):
        for number, change in enumerate(tried):
            caplog.clear()
            pipe, name = VQDiTPipeline.from_pretrained(place), f"alice/{Path(place).name}-{number}"
            change(pipe)
            pipe.push_to_hub(name)
            text = hub.repositories[name].resolve("main").files["README.md"].content.decode()
            assert ("Trained for a day" in text) == (number == 0), (place, number)
            assert ("the weights are not those of" in caplog.text) == (number > 0)


@pytest.mark.parametrize("card", ["# Mine\n", RUN_CARD, None])
@pytest.mark.parametrize("change", ["none", "trained", "broken config", "a part"])
def test_a_card_in_the_folder_is_published_with_other_weights_with_a_warning(
    hub, client, pipeline, tmp_path, caplog, card, change
):
    """As it stands, for someone may have written it; what claims nothing is a card of all weights."""
    saved, name = pipeline.transformer if change == "a part" else pipeline, "alice/pipe"
    folder = tmp_path / "run"
    pipeline.save_pretrained(folder, push_to_hub=card is None, repo_id=name)
    if card is not None:
        (folder / "README.md").write_text(card)
    if change == "trained":
        next(pipeline.transformer.parameters()).data.add_(1)
    elif change == "broken config":
        (folder / "model_index.json").write_text("{")
    before = (folder / "README.md").read_text()
    saved.save_pretrained(folder, push_to_hub=True, repo_id=name)
    assert hub.repositories[name].resolve("main").files["README.md"].content.decode() == before
    told = f"{folder / 'README.md'} was there with other weights than those that are saved now"
    assert (told in caplog.text) == (change != "none" and card is not None)


def test_a_card_that_is_there_before_any_weights_is_theirs(hub, client, pipeline, image_vq, tmp_path, caplog):
    for name, saved in (("pipe", pipeline), ("image_vq", image_vq)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("# Mine\n")
        saved.save_pretrained(tmp_path / name, push_to_hub=True, repo_id=f"alice/{name}")
        assert hub.repositories[f"alice/{name}"].resolve("main").files["README.md"].content == b"# Mine\n"
    assert "was there with other weights" not in caplog.text


@pytest.mark.parametrize(
    ("place", "fails"),
    [
        *itertools.product(["config.json", "README.md", "samples/0.png"], ["server", "connection", "missing"]),
        *(("weights", fails) for fails in ("server", "missing")),  # that of the connection is raised as it is
    ],
)
def test_a_card_that_cannot_be_had_now_is_told(hub, client, image_vq, tmp_path, monkeypatch, caplog, place, fails):
    image_vq.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(RUN_CARD)
    (tmp_path / "model" / "samples").mkdir()
    (tmp_path / "model" / "samples" / "0.png").write_bytes(b"a picture")
    client.create_repo("alice/source")
    client.upload_folder(repo_id="alice/source", folder_path=tmp_path / "model")
    model = ImageVQModel.from_pretrained("alice/source")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    answers = {status: SimpleNamespace(status_code=status, headers={}, request=None) for status in (503, 404)}
    errors = {
        "server": HfHubHTTPError("busy", response=answers[503]),
        "connection": LocalEntryNotFoundError("no connection"),
        "missing": HfHubHTTPError("no file", response=answers[404]),
    }

    def failing(function):
        def ask(*args, **kwargs):
            if place in args or (place == "weights" and function is get_hf_file_metadata):
                raise errors[fails]
            return function(*args, **kwargs)

        return ask

    for function in (hf_hub_download, get_hf_file_metadata):
        monkeypatch.setattr(cards, function.__name__, failing(function))
    model.push_to_hub("alice/copy")
    text = hub.repositories["alice/copy"].resolve("main").files["README.md"].content.decode()
    assert ("Trained for a day" in text) == (place == "samples/0.png")
    assert ("can't be read now" in caplog.text) == (fails != "missing")
    assert ("the weights are not those of" in caplog.text) == (place == "weights" and fails == "missing")


@pytest.mark.parametrize("widget", ["5", "text", "[1, {text: x}, {output: 3}, {output: {url: 7}}]"])
def test_a_widget_of_another_shape_is_no_gallery(hub, client, image_vq, tmp_path, widget):
    image_vq.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(f"---\nwidget: {widget}\n---\n# Mine\n")
    ImageVQModel.from_pretrained(tmp_path / "model").push_to_hub("alice/widget")
    assert b"# Mine" in hub.repositories["alice/widget"].resolve("main").files["README.md"].content


@pytest.mark.parametrize("content", [b"\xff\xfe# Mine", None], ids=["not UTF-8", "a folder"])
def test_a_card_that_cannot_be_read_is_not_pushed(hub, client, image_vq, tmp_path, content):
    image_vq.save_pretrained(tmp_path / "model")
    card = tmp_path / "model" / "README.md"
    card.mkdir() if content is None else card.write_bytes(content)
    ImageVQModel.from_pretrained(tmp_path / "model").push_to_hub("alice/unreadable")
    text = hub.repositories["alice/unreadable"].resolve("main").files["README.md"].content
    assert b"How it was trained isn't known here." in text
