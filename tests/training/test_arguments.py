import argparse
from pathlib import Path

import pytest

from diffusers_vqdit.training.arguments import add_patch_argument, tracker_config, with_patches


SEGMENTS = {
    "image": {"vocab_size": 30, "shape": [4, 4]},
    "image_lowres": {"vocab_size": 30, "shape": [4, 4], "shared_with": "image"},
    "text": {"vocab_size": 20, "shape": [6]},
}


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_patch_argument(parser)
    return parser


def test_patches_are_read_and_given_to_their_segments(parser):
    assert with_patches(SEGMENTS, parser.parse_args([]).patch) == SEGMENTS
    args = parser.parse_args(["--patch", "image=2x4", "--patch", "text=3"])
    expected = {name: dict(segment) for name, segment in SEGMENTS.items()}
    expected["image"]["patch"], expected["text"]["patch"] = [2, 4], [3]
    assert with_patches(SEGMENTS, args.patch) == expected
    assert "patch" not in SEGMENTS["image"]


@pytest.mark.parametrize(
    "text", ["image", "image=", "2x2", "=2x2", "image=2x", "image=axb", "image=2x2x2x2", "image=-1"]
)
def test_what_is_no_patch_is_named(parser, text):
    with pytest.raises(argparse.ArgumentError, match=f"'{text}' must be a segment and its patch"):
        parser.parse_args([f"--patch={text}"])


@pytest.mark.parametrize("name", ["image_lowres", "sound"])
def test_a_segment_that_has_no_embeddings_of_its_own_takes_no_patch(name):
    with pytest.raises(ValueError, match=rf"patch: '{name}' must be a segment .* one of \['image', 'text'\]"):
        with_patches(SEGMENTS, [(name, [2, 2])])


def test_trackers_get_what_they_take():
    args = argparse.Namespace(
        steps=3, rate=0.5, name="x", prompts=["a", "b"], folder=Path("out"), hub_token=None, on=True
    )
    expected = {"steps": 3, "rate": 0.5, "name": "x", "prompts": "['a', 'b']", "folder": "out"}
    assert tracker_config(args) == {**expected, "on": True}


def test_trackers_are_given_no_token(script):
    args = script("train_image_vq").parse_args(["--hub_token", "secret"])
    assert "secret" not in str(tracker_config(args)) and tracker_config(args)["seed"] == 0
