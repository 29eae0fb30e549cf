"""Speaking and listening on the page."""

import sys

import numpy as np
import pytest
import torch


pytest.importorskip("gradio")
soundfile = pytest.importorskip("soundfile")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from diffusers_vqdit.app.page import launch, make_page  # noqa: E402
from diffusers_vqdit.utils.provenance import GENERATED, digital_source_type  # noqa: E402


FIXED = {"A new seed each time": False, "Inference steps": 3}


@pytest.fixture
def tasks():
    """Those that the pipeline keeps; None: all."""


@pytest.fixture
def use(talking_pipeline, tasks, tmp_path):
    """Call the tab of sounds with values by label; what comes out, by label."""
    if tasks is not None:
        talking_pipeline.transformer.register_to_config(tasks=tasks)
    page = make_page(talking_pipeline, str(tmp_path))
    _, address, _ = launch(page, prevent_thread_lock=True, quiet=True)
    client = Client(address, verbose=False, download_files=str(tmp_path / "got"))
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert tasks is not None or {"/sound", "/label", "/find"} <= set(endpoints)
    parameters, returns = (endpoints["/sound"][side] for side in ("parameters", "returns"))

    def use(**values):
        named = {one["parameter_name"]: values.get(one["label"]) for one in parameters}
        given = {one["parameter_name"] for one in parameters if one["label"] in values}
        needed = {one["parameter_name"] for one in parameters if not one["parameter_has_default"]}
        result = client.predict(api_name="/sound", **{key: named[key] for key in given | needed})
        return dict(zip((one["label"] for one in returns), result, strict=True))

    yield use
    page.close()


def test_sounds_are_made_and_heard(use, talking_pipeline, tmp_path):
    made = use(Task="text->sound", text="a red apple", **FIXED)["sound"]
    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    expected = talking_pipeline("a red apple", output="sound", **options)
    samples, rate = soundfile.read(made)
    assert rate == expected.sampling_rate and np.abs(samples - expected.audios[0]).max() < 1e-3
    assert digital_source_type(made) == GENERATED
    soundfile.write(tmp_path / "spoken.wav", np.sin(np.arange(160) / 5), 1600)
    spoken = handle_file(str(tmp_path / "spoken.wav"))
    options["generator"].manual_seed(0)
    text = talking_pipeline(inputs={"sound": str(tmp_path / "spoken.wav")}, output="text", **options)
    assert use(Task="sound->text", sound=spoken, **FIXED)["text"] == text.segments["text"][0]
    assert len(use(Task="sound->image", sound=spoken, **FIXED)["image"]) > 0
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "long.wav", np.zeros(301 * 100), 100)
    for name, reason in (("broken", "can't be read: it is broken"), ("long", "has 301 seconds; at most 300")):
        with pytest.raises(AppError, match=reason):
            use(Task="sound->text", sound=handle_file(str(tmp_path / f"{name}.wav")), **FIXED)


@pytest.mark.parametrize("tasks", [["text->sound", "sound->text"]])
def test_what_is_said_already_is_of_texts_alone(use, tmp_path):
    soundfile.write(tmp_path / "spoken.wav", np.sin(np.arange(160) / 5), 1600)
    known = {"What it says already (may be empty)": "green <mask>"}
    assert use(Task="text->sound", text="a red apple", **known, **FIXED)["sound"]
    spoken = handle_file(str(tmp_path / "spoken.wav"))
    assert use(Task="sound->text", sound=spoken, **known, **FIXED)["text"].startswith("green")


def test_without_a_library_of_sounds_the_page_says_what_to_install(use, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "spoken.wav", np.sin(np.arange(160) / 5), 1600)
    for name in ("soundfile", "soxr"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AppError, match="soundfile is needed to read sounds: pip install"):
        use(Task="sound->text", sound=handle_file(str(tmp_path / "spoken.wav")), **FIXED)
