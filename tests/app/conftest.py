"""Pipelines for the page, pages that are served on this machine, and people who visit them in a browser."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTLatentPipeline, VQDiTPipeline, VQDiTTransformer2DModel


TASKS = [
    *("text->image", "label->image", "->image", "image->text", "image->text_zh", "image->label", "text->label"),
    *("->image+text", "->text", "text->text_zh", "image_lowres->image", "image_lowres+text->image"),
    *("sketch->image", "sketch+text->image"),
]


@pytest.fixture(scope="session")
def page_pipeline(make_pipeline):
    """A tiny pipeline with a task for each tab."""
    parts = make_pipeline(0)
    text, image = {"vocab_size": 64, "shape": [12]}, {"vocab_size": 32, "shape": [4, 4]}
    segments = {
        **{"text": text, "text_zh": text, "label": {"vocab_size": 3, "shape": [1]}},
        **{"image": image, "image_lowres": image, "sketch": image},
    }
    torch.manual_seed(0)
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, segments=segments, tasks=TASKS
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    components = (parts.image_vq, parts.text_vq, parts.tokenizer)
    return VQDiTPipeline(
        transformer.eval(), MaskedDiffusionScheduler(), *components, labels=["fruit", "box", "dot"], lowres_factor=2
    )


@pytest.fixture(scope="session")
def latent_page_pipeline(make_pipeline, make_latent_transformer):
    """A tiny pipeline over latents, of prompts and labels."""
    parts = make_pipeline(0)
    torch.manual_seed(0)
    transformer = make_latent_transformer()
    return VQDiTLatentPipeline(
        transformer.eval(), parts.image_vq, DDIMScheduler(), parts.text_vq, parts.tokenizer, id2label={0: "apple"}
    )


@pytest.fixture
def served_sounds(talking_pipeline, tmp_path):
    """The address of the page of a pipeline that speaks and listens, with a sound and a prompt to try."""
    from diffusers_vqdit.app.page import launch, make_page

    examples = tmp_path / "talking" / "examples"
    examples.mkdir(parents=True)
    (examples / "prompts.json").write_text(json.dumps({"text": ["a blue box"]}))
    (examples / "captions.json").write_text(json.dumps({"0.wav": "a red apple"}))
    soundfile.write(examples / "0.wav", np.sin(np.arange(1600) / 5), 1600)
    page = make_page(talking_pipeline, str(examples.parent))
    yield launch(page, prevent_thread_lock=True, quiet=True)[1]
    page.close()


@pytest.fixture(scope="session")
def served(page_pipeline, latent_page_pipeline, tmp_path_factory):
    """Addresses of the pages of both pipelines."""
    pytest.importorskip("gradio")
    from diffusers_vqdit.app.page import launch, make_page

    pipelines = {"codes": page_pipeline, "latents": latent_page_pipeline}
    folders = {name: tmp_path_factory.mktemp(name) for name in pipelines}
    examples = folders["codes"] / "examples"
    examples.mkdir()
    prompts = {"text": ["a red apple", "a blue box"], "text_zh": ["红苹果"]}
    (examples / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    (examples / "captions.json").write_text(json.dumps({"0.png": "a yellow dot", "1.png": "green"}), encoding="utf-8")
    for index, color in enumerate(("yellow", "green")):
        Image.new("RGB", (16, 16), color).save(examples / f"{index}.png")
    pages = {name: make_page(one, str(folders[name])) for name, one in pipelines.items()}
    yield {name: launch(page, prevent_thread_lock=True, quiet=True)[1] for name, page in pages.items()}
    for page in pages.values():
        page.close()


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory):
    """Makes a file with a picture of a size."""
    folder = tmp_path_factory.mktemp("files")

    def make(width, height, color="red"):
        picture = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(picture).rectangle((width // 4, height // 4, width // 2, height // 2), fill=color)
        path = folder / f"{color}-{width}-{height}.png"
        picture.save(path)
        return str(path)

    return make


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Visit an address."""
    spec = importlib.util.spec_from_file_location("visitor", Path(__file__).with_name("visitor.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    visitors = []

    def visit(address, **options):
        visitors.append(module.Visitor(browser, address, **options))
        return visitors[-1]

    yield visit
    for one in visitors:
        one.page.context.close()
