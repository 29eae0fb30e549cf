"""Samples of a run that is going on: as files in its folder, and pictures in the trackers that show them."""

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
from ..tasks import Task
from ..utils.images import to_rgb
from ..utils.provenance import save_generated
from ..utils.weight_files import replacing_file


def steps_of(args: argparse.Namespace) -> dict[str, int]:
    """The arguments of a call that draws as the run's model does: in few steps if it is distilled to them."""
    steps = getattr(args, "num_student_steps", None)
    return {} if steps is None else {"num_inference_steps": steps}


def passing(pipeline: DiffusionPipeline, argument: str, wanted: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call that draws from values.

    Prompts are texts, and pictures files, each as ``SEGMENT=VALUE`` or the value alone, all of one segment: by default
    that of the argument, or, where no task has this given, the only one of its kind that the tasks have given.

    Raises:
        ValueError: for a file that is no picture, or values of several segments.
    """
    kind = {TEXT: "texts", IMAGE: "images"}.get(ARGUMENTS[argument])
    if kind is None or not hasattr(pipeline, "_segments"):
        return {argument: list(wanted)}
    segments = pipeline._segments
    usual = next((name for name, one in segments.items() if one.argument == argument), None)
    own = {name for name, one in segments.items() if kind == one.kind}
    given = {name for task in pipeline.transformer.config.tasks or [] for name in Task.parse(task).given} & own
    parts = [one.partition("=") for one in wanted]
    named = {name if equals and name in own else None for name, equals, _ in parts}
    if len(named) > 1:
        raise ValueError(f"{list(wanted)} are of several segments; give those of one")
    name = named.pop() if named else None
    values: list[Any] = list(wanted) if name is None else [value for *_, value in parts]
    if name is None:
        name = given.pop() if usual not in given and len(given) == 1 else usual
    if kind == "images":
        try:
            values = [to_rgb(Image.open(file)) for file in values]
        except OSError as error:
            raise ValueError(f"{values} must be files of pictures: {error}") from error
    title = argument if name == usual else segments[name].argument
    return {title: values} if title in ARGUMENTS else {"inputs": {name: values}}


def columns_of_grid(width: int, most: int) -> int:
    """How many images of a width stand in a row of a grid: at most so many, and as 2,048 pixels hold, but four."""
    return min(most, max(4, 2048 // width))


def save_grid(images: Sequence[Image.Image], columns: int, output_dir: Path, step: int) -> Image.Image:
    """Keep images of one size as ``samples/step-{step}.png``, so many in a row."""
    folder = output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    blank = [images[0].copy() for _ in range(-len(images) % columns)]
    grid = make_image_grid([*images, *blank], rows=math.ceil(len(images) / columns), cols=columns)
    with replacing_file(folder / f"step-{step:06d}.png") as unfinished:  # others may be looking at it
        grid.save(unfinished, format="PNG")
    return grid


def log_images(accelerator: Accelerator, name: str, images: Sequence[Image.Image], step: int) -> None:
    """Show images of one size in those trackers that can."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
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

    Where texts or labels are generated, they are kept as a text file, and sounds as WAV files.

    Args:
        argument: of the pipeline's call, that takes them: ``"prompt"``, ``"class_labels"`` or ``"image"``, which takes
            files ([`passing`]).
    """
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(wanted))]
    drawn = pipeline(**passing(pipeline, argument, wanted), **steps_of(args), generator=generators)
    images = drawn.images
    if images is not None:
        save_grid(images, min(columns_of_grid(images[0].width, 8), len(images)), args.output_dir, step)
        log_images(accelerator, "validation", images, step)
        return
    written, sounds = drawn.get("texts") or drawn.get("labels"), drawn.get("audios")
    if not written and not sounds:  # codes
        return
    folder = args.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    if written:
        lines = [f"{one}: {made}" for one, made in zip(wanted, written, strict=True)]
        (folder / f"step-{step:06d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for index, (one, sound) in enumerate(zip(wanted, sounds, strict=True) if sounds else ()):
        file, rate = folder / f"step-{step:06d}-{index}.wav", drawn.sampling_rate
        save_generated(sound, file, sampling_rate=rate, model_id=args.output_dir.name, description=str(one))
