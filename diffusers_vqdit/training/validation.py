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

from ..pipelines.segment_base import ARGUMENTS, IMAGE, TEXT
from ..pipelines.segment_processors import modality_of
from ..pipelines.text_segment import TextSegment
from ..tasks import Task
from ..utils.images import to_rgb


def steps_of(args: argparse.Namespace) -> dict[str, int]:
    """The arguments of a call that draws as the run's model does: in few steps if it is distilled to them."""
    steps = getattr(args, "num_student_steps", None)
    return {} if steps is None else {"num_inference_steps": steps}


def passing(pipeline: DiffusionPipeline, argument: str, wanted: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call that draws from values.

    Prompts are the texts that the tasks have given, where these are of one segment and not ``text``. Pictures are
    files, each as ``SEGMENT=FILE`` or the file alone, of one segment: by default the only picture that the tasks have
    given, or ``image``.

    Raises:
        ValueError: for a file that is no picture, or pictures of several segments.
    """
    if ARGUMENTS.get(argument) == IMAGE:
        return _pictures(pipeline, wanted)
    entries = pipeline.config.get("segments") or {}
    texts = {name for name, entry in entries.items() if entry["modality"] == modality_of(TextSegment)}
    given = {name for task in pipeline.transformer.config.tasks or [] for name in Task.parse(task).given} & texts
    if ARGUMENTS.get(argument) == TEXT and TEXT not in given and len(given) == 1:
        return {"inputs": {given.pop(): list(wanted)}}
    return {argument: list(wanted)}


def _pictures(pipeline: DiffusionPipeline, wanted: Sequence[str]) -> dict[str, Any]:
    segments = pipeline._segments
    tasks = [Task.parse(task) for task in pipeline.transformer.config.tasks or []]
    given = {name for task in tasks for name in task.given if segments[name].output_field == "images"}
    parts = [one.partition("=") for one in wanted]
    named = {name if equals and name in segments else None for name, equals, _ in parts}
    if len(named) > 1:
        raise ValueError(f"{list(wanted)} are of several segments; give those of one")
    name = named.pop() or (given.pop() if len(given) == 1 else IMAGE)
    files = [file if equals and first in segments else f"{first}{equals}{file}" for first, equals, file in parts]
    try:
        pictures = [to_rgb(Image.open(file)) for file in files]
    except OSError as error:
        raise ValueError(f"{files} must be files of pictures: {error}") from error
    argument = next((argument for argument, segment in ARGUMENTS.items() if segment == name), None)
    return {"inputs": {name: pictures}} if argument is None else {argument: pictures}


def columns_of_grid(width: int, most: int) -> int:
    """How many images of a width stand in a row of a grid: at most so many, and as 2,048 pixels hold, but four."""
    return min(most, max(4, 2048 // width))


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
        argument: of the pipeline's call, that takes them: ``"prompt"``, ``"class_labels"`` or ``"image"``, which takes
            files ([`passing`]).
    """
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(wanted))]
    drawn = pipeline(**passing(pipeline, argument, wanted), **steps_of(args), generator=generators)
    images = drawn.images
    written = drawn.get("texts") or drawn.get("labels")  # of the latent pipeline there are neither
    if images is None and written is None:  # codes
        return
    if images is None:
        (args.output_dir / "samples").mkdir(parents=True, exist_ok=True)
        lines = [f"{one}: {made}" for one, made in zip(wanted, written, strict=True)]
        (args.output_dir / "samples" / f"step-{step:06d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    save_grid(images, min(columns_of_grid(images[0].width, 8), len(images)), args.output_dir, step)
    log_images(accelerator, "validation", images, step)
