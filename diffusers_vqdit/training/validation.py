"""Samples of a run that is going on: as PNG files in its folder, and in the trackers that show pictures."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image


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

    Args:
        argument: of the pipeline's call, that takes them: ``"prompt"`` or ``"class_labels"``.
    """
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(wanted))]
    images = pipeline(**{argument: list(wanted)}, generator=generators).images
    save_grid(images, min(8, len(images)), args.output_dir, step)
    log_images(accelerator, "validation", images, step)
