"""What goes wrong is told once, when it does, in the log and in the trackers; what goes right isn't told."""

import argparse
import logging
import math
import re

import pytest
import torch
from accelerate import Accelerator

from diffusers_vqdit.models.quantizers import ResidualVectorQuantizer, VectorQuantizer
from diffusers_vqdit.training.watch import CLIPPED_STEPS, LOSS_STEPS, SETTLING, USAGE_STEPS, TrainingWatch


CODES = 64
FEW, ALL = torch.zeros(4, 8, 8, dtype=torch.int64), torch.arange(256).view(4, 8, 8) % CODES


CLIPPING = argparse.Namespace(max_grad_norm=1.0, restart_threshold=0.0)


def watched(
    monkeypatch,
    caplog,
    *,
    steps,
    first=1,
    args=CLIPPING,
    loss=lambda step: 1.0 / step,
    norm=lambda step: 0.1,
    codes=None,
    levels=1,
):
    """The texts of the warnings, and what the trackers got: (name, step)."""
    tracked = []
    accelerator = Accelerator()
    monkeypatch.setattr(accelerator, "log", lambda values, step: tracked.extend((name, step) for name in values))
    quantizer = VectorQuantizer(CODES, 2)
    if levels > 1:
        quantizer = ResidualVectorQuantizer(VectorQuantizer(CODES, 2) for _ in range(levels))
    watch = TrainingWatch(accelerator, args, quantizer=quantizer if codes is not None else None)
    with caplog.at_level(logging.WARNING, "diffusers_vqdit"):
        for step in range(first, first + steps):
            found = None if codes is None else codes(step)
            usage = None if found is None else len(found.unique()) / CODES
            watch.look(step, loss(step), norm(step), found, usage)
    return [record.message for record in caplog.records], tracked


def test_a_run_that_goes_well_is_told_nothing(monkeypatch, caplog):
    assert watched(monkeypatch, caplog, steps=3 * LOSS_STEPS, codes=lambda step: ALL) == ([], [])


@pytest.mark.parametrize("start", [1, 2 * SETTLING])
def test_a_codebook_that_collapses_is_told_with_the_step(monkeypatch, caplog, start):
    texts, tracked = watched(monkeypatch, caplog, steps=120, codes=lambda step: FEW if step >= start else ALL)
    first = max(start, SETTLING + 1) + USAGE_STEPS - 1
    assert ("warnings/usage", first) in tracked and tracked.count(("warnings/usage", first)) == 1
    assert any(text.startswith(f"step {first}: ") and "--restart_threshold" in text for text in texts)


def test_a_batch_too_small_to_show_many_codes_is_no_collapse(monkeypatch, caplog):
    """Two positions of 64 codes show 3 % of them at most."""
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(CODES, (1, 1, 2), generator=generator) for _ in range(400)]
    _, tracked = watched(monkeypatch, caplog, steps=400, codes=lambda step: codes[step - 1])
    assert ("warnings/usage") not in [name for name, _ in tracked]


@pytest.mark.parametrize("levels", [1, 3])
def test_codes_that_lie_dead_are_told(monkeypatch, caplog, levels):
    """An eighth of the codes, which is no collapse."""
    part = ALL % (CODES // 8)
    part = part if levels == 1 else part[..., None].expand(-1, -1, -1, levels)
    texts, tracked = watched(monkeypatch, caplog, steps=200, codes=lambda step: part)
    assert [name for name, _ in tracked] == ["warnings/dead_codes"] and "88 % of the codes" in texts[0]


@pytest.mark.parametrize("loss", [lambda step: 2.0, lambda step: 1.0 + step, lambda step: math.nan])
def test_a_loss_that_does_not_fall_is_told(monkeypatch, caplog, loss):
    texts, tracked = watched(monkeypatch, caplog, steps=2 * LOSS_STEPS, loss=loss)
    assert tracked == [("warnings/loss", LOSS_STEPS)] and "--learning_rate" in texts[0]


def test_a_loss_that_fell_before_the_run_was_resumed_is_not_told(monkeypatch, caplog):
    assert watched(monkeypatch, caplog, steps=2 * LOSS_STEPS, first=700, loss=lambda step: 2.0) == ([], [])


@pytest.mark.parametrize("every", [0, CLIPPED_STEPS // 2])
def test_gradients_that_are_always_clipped_are_told(monkeypatch, caplog, every):
    """Not so where a step now and then is not."""
    steps = 2 * CLIPPED_STEPS + 5
    _, tracked = watched(
        monkeypatch, caplog, steps=steps, norm=lambda step: 0.5 if every and not step % every else 3.0
    )
    assert tracked == ([] if every else [("warnings/clipping", CLIPPED_STEPS)])


@pytest.mark.parametrize(
    ("script_name", "flags", "collapsed", "dead"),
    [
        ("train_image_vq", "", "", "--restart_threshold --num_vq_embeddings"),
        (
            "train_image_vq",
            "--restart_threshold 0",
            "--restart_threshold 0.1",
            "--restart_threshold --num_vq_embeddings",
        ),
        (
            "train_image_vq",
            "--codebook_update gradient --codebook_init data",
            "--codebook_update ema --codebook_init kmeans",
            "--restart_threshold --num_vq_embeddings",
        ),
        ("train_image_vq", "--quantizer_type fsq --fsq_levels 8 5 5", "", "--fsq_levels"),
        ("train_image_vq", "--quantizer_type lfq", "--entropy_weight 0.1", "--vq_embed_dim"),
        ("train_image_vq", "--quantizer_type simvq --entropy_weight 0.2", "", "--num_vq_embeddings"),
        ("train_image_vq", "--pretrained_model_name_or_path p", "", "--learning_rate"),
        ("train_text_vq", "--pretrained_model_name_or_path p", "", "--learning_rate"),
        ("train_audio_vq", "--pretrained_model_name_or_path p", "", "--learning_rate"),
        ("train_text_vq", "", "", "--restart_threshold --num_codes"),
        ("train_text_vq", "--restart_threshold 0", "--restart_threshold 0.1", "--restart_threshold --num_codes"),
        ("train_audio_vq", "", "", "--restart_threshold --num_vq_embeddings"),
    ],
)
def test_what_would_help_is_a_flag_that_the_run_has_and_has_not_set(
    script, monkeypatch, caplog, script_name, flags, collapsed, dead
):
    data = {"train_text_vq": "--dataset_name d", "train_audio_vq": "--train_data_dir d"}
    args = script(script_name).parse_args([*data.get(script_name, "--train_data_dir d").split(), *flags.split()])
    texts, _ = watched(monkeypatch, caplog, steps=200, args=args, codes=lambda step: FEW)
    usage, unused = (next(text for text in texts if word in text) for word in ("collapses", "not used once"))
    assert usage[usage.index("--") :] == "--learning_rate" + (f", or train with {collapsed}" if collapsed else "")
    assert re.findall(r"--\w+", unused) == dead.split()
