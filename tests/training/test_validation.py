"""Which segment the values of --validation_prompts and --validation_images are of, and what is kept of them."""

import argparse

import pytest
import soundfile
from accelerate import Accelerator
from PIL import Image

from diffusers_vqdit import ImageVQModel, MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.training.publish import draw_gallery
from diffusers_vqdit.training.validation import draw_validation, passing


CODES, STATES, IMAGE = (
    {"vocab_size": 9, "shape": [4]},
    {"channels": 16, "shape": [9]},
    {"vocab_size": 9, "shape": [2, 2]},
)
ENTRIES = {"prompt": {"modality": "states"}, "reference": {"modality": "image_states"}}


def make(names, tasks):
    kinds = {"text": CODES, "title": CODES, "prompt": STATES, "reference": STATES, "image": IMAGE, "source": IMAGE}
    segments = {name: kinds[name] for name in names}
    model = VQDiTTransformer2DModel(2, 8, num_layers=1, segments=segments, tasks=tasks)
    entries = {name: entry for name, entry in ENTRIES.items() if name in names}
    return VQDiTPipeline(model.eval(), MaskedDiffusionScheduler(), segments=entries)


@pytest.mark.parametrize(
    ("names", "tasks", "wanted", "expected"),
    [
        (["text", "image"], ["text->image"], ["a"], {"prompt": ["a"]}),
        (["text", "image"], ["text->image"], ["text=a", "text=b=c"], {"prompt": ["a", "b=c"]}),
        (["text", "image"], ["text->image"], ["x=a", "1+1=2"], {"prompt": ["x=a", "1+1=2"]}),
        (["text", "prompt", "image"], ["prompt->image", "image->text"], ["a"], {"inputs": {"prompt": ["a"]}}),
        (["text", "prompt", "image"], ["prompt->image", "text->image"], ["a"], {"prompt": ["a"]}),
        (["text", "prompt", "image"], ["prompt->image", "text->image"], ["prompt=a"], {"inputs": {"prompt": ["a"]}}),
        (["prompt", "image"], ["prompt->image"], ["prompt=a"], {"prompt": ["a"]}),
        (["title", "image"], ["title->image"], ["a"], {"inputs": {"title": ["a"]}}),
        (["text", "title", "image"], ["title->image", "text->image"], ["title=a"], {"inputs": {"title": ["a"]}}),
    ],
)
def test_prompts_are_of_the_segment_that_is_named_or_given(names, tasks, wanted, expected):
    assert passing(make(names, tasks), "prompt", wanted) == expected


def test_values_of_several_segments_are_refused_and_labels_pass(tmp_path):
    pipe = make(["text", "title", "image", "source", "reference"], ["title->image", "text->image", "source->image"])
    for wanted in (["text=a", "title=b"], ["text=a", "b"]):
        with pytest.raises(ValueError, match="are of several segments; give those of one"):
            passing(pipe, "prompt", wanted)
    assert passing(pipe, "class_labels", ["text=a"]) == {"class_labels": ["text=a"]}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, segment in ((f"{tmp_path / 'a.png'}", "source"), (f"reference={tmp_path / 'a.png'}", "reference")):
        (found,) = passing(pipe, "image", [name])["inputs"].items()
        assert found[0] == segment and found[1][0].size == (8, 8)


def test_sounds_are_kept_and_shown(talking_pipeline, tmp_path):
    talking_pipeline.transformer.register_to_config(tasks=["text->sound", "->sound"])
    args = argparse.Namespace(output_dir=tmp_path, seed=0)
    draw_validation(args, Accelerator(), talking_pipeline, ["a dot", "green"], 7)
    kept = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert kept == ["step-000007-0.wav", "step-000007-1.wav"]
    gallery = draw_gallery(talking_pipeline, ["a dot", "green"], tmp_path, "alice/speaks")
    assert gallery == {"samples/0.wav": "a dot", "samples/1.wav": "green"}
    for file in (tmp_path / "samples").iterdir():
        sound, rate = soundfile.read(file)
        assert len(sound) and rate == talking_pipeline("a dot").sampling_rate


def test_grey_pictures_are_shown_too(make_pipeline, tmp_path):
    pipe = make_pipeline(0)
    grey = ImageVQModel.from_config({**pipe.image_vq.config, "in_channels": 1, "out_channels": 1}).eval()
    parts = (pipe.transformer, pipe.scheduler, grey, pipe.text_vq, pipe.tokenizer)
    pipe = VQDiTPipeline(*parts, labels=["fruit", "box", "dot"])
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("logs")
    draw_validation(argparse.Namespace(output_dir=tmp_path, seed=0), accelerator, pipe, ["a dot", "green"], 7)
    accelerator.end_training()
    assert (tmp_path / "samples/step-000007.png").is_file()
