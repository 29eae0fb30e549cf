"""Samples of a run that is going on: as PNG files in its folder, and in the trackers that show pictures."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image

from ..pipelines.segment_base import ARGUMENTS, TEXT
from ..pipelines.segment_processors import modality_of
from ..pipelines.text_segment import TextSegment
from ..tasks import Task


def steps_of(args: argparse.Namespace) -> dict[str, int]:
    """The arguments of a call that draws as the run's model does: in few steps if it is distilled to them."""
    steps = getattr(args, "num_student_steps", None)
    return {} if steps is None else {"num_inference_steps": steps}


def passing(pipeline: DiffusionPipeline, argument: str, wanted: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call that draws from values.

    Prompts are the texts that the tasks have given, where these are of one segment and not ``text``.
    """
    entries = pipeline.config.get("segments") or {}
    texts = {name for name, entry in entries.items() if entry["modality"] == modality_of(TextSegment)}
    given = {name for task in pipeline.transformer.config.tasks or [] for name in Task.parse(task).given} & texts
    if ARGUMENTS.get(argument) == TEXT and TEXT not in given and len(given) == 1:
        return {"inputs": {given.pop(): list(wanted)}}
    return {argument: list(wanted)}


def save_grid(images: Sequence[Image.Image], columns: int, output_dir: Path, step: int) -> Image.Image:
    """Keep images of one size as ``samples/step-{step}.png``, so many in a row."""
    folder = output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    blank = [images[0].copy() for _ in range(-len(images) % columns)]
    grid = make_image_grid([*images, *blank], rows=math.ceil(len(images) / columns), cols=columns)
    grid.save(folder / f"step-{step:06d}.png")
    return grid


def log_images(accelerator: Accelerator, name: str, images: Sequence[Image.Image], step: int) -> None:
    """Show images of one size in those trackers that can."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images(name, pixels, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: list(images)}, step=step)


def draw_validation(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    wanted: Sequence[str],
    step: int,
    *,
    argument: str = "prompt",
) -> None:
    """Draw the validation prompts or labels with a fixed seed; keep them as a PNG and send them to the trackers.

    Where texts or labels are generated, they are kept as a text file.

    Args:
        argument: of the pipeline's call, that takes them: ``"prompt"`` or ``"class_labels"``.
    """
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(wanted))]
    drawn = pipeline(**passing(pipeline, argument, wanted), **steps_of(args), generator=generators)
    images = drawn.images
    if images is None:  # texts, or labels
        (args.output_dir / "samples").mkdir(parents=True, exist_ok=True)
        lines = [f"{one}: {made}" for one, made in zip(wanted, drawn.texts or drawn.labels, strict=True)]
        (args.output_dir / "samples" / f"step-{step:06d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    save_grid(images, min(8, len(images)), args.output_dir, step)
    log_images(accelerator, "validation", images, step)
