"""The pictures that figures are of, as they are, as the tokenizer decodes them, and as a judge sees them."""

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..models.image_vq import ImageVQModel
from ..utils.decoding import to_pixels
from .data import MissingSplitError, decoded_batches, load_training_dataset
from .file_lists import in_file
from .image_losses import BackboneFeatures


def batched(size: int, batch_size: int, description: str) -> Iterator[slice]:
    for start in tqdm(range(0, size, batch_size), desc=description):
        yield slice(start, min(start + batch_size, size))


def check_room(
    argument: str, size: Sequence[int], image_vq: ImageVQModel, *, count: int, drawn: int, batch_size: int
) -> None:
    """See that what pictures of a size take at the least is there: a size is bounded by the machine alone.

    Args:
        argument: for the message.
        size: height and width in pixels.
        count: pictures of the data, which [`read_pictures`] and [`reconstruct`] put into temporary files.
        drawn: pictures that are drawn, of which there are two copies in memory when they are looked at.
        batch_size: pictures that are encoded at once.

    Raises:
        ValueError: if the disk or the memory of the device that `image_vq` is on is smaller.
    """
    pixels, folder, device = math.prod(size), tempfile.gettempdir(), image_vq.device
    encoded = image_vq.config.in_channels + image_vq.config.block_out_channels[0]  # with its first layer's features
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    if device.type == "cuda":
        _, memory = torch.cuda.mem_get_info(device)
    needed = {
        f"free on the disk of {folder}": (3 * pixels * count * (1 + 4), shutil.disk_usage(folder).free),
        f"memory of {device}": (4 * pixels * max(2 * 3 * drawn, encoded * min(batch_size, count)), memory),
    }
    for what, (wanted, there) in needed.items():
        if wanted > there:
            raise ValueError(
                f"{argument}={list(size)} needs {wanted / 2**30:.3g} GiB {what} at the least, and there are "
                f"{there / 2**30:.3g}: give a smaller one, or less in max_samples, num_samples or batch_size"
            )


def load_measured_split(dataset_name: str, split: str, **options: Any) -> Any:
    """[`~training.data.load_training_dataset`] of a split that evaluation needs.

    Raises:
        MissingSplitError: that says what would do, if there is none.
    """
    try:
        return load_training_dataset(dataset_name=dataset_name, split=split, **options)
    except MissingSplitError as error:
        raise MissingSplitError(
            f"{error}. The split 'test' is measured, and compared with 'train': give --dataset_name data that have "
            "both, such as a table with a column 'split' of these"
        ) from None


def read_pictures(
    splits: list[Any], column: str, resolution: int | tuple[int, int], resize_mode: str
) -> tuple[torch.Tensor, list[Any]]:
    """Pictures (N, 3, H, W) uint8 of all splits that can be read, and the splits with their rows alone."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    pictures, count, kept = in_file((sum(map(len, splits)), 3, height, width), np.uint8), 0, []
    for split in splits:
        rows: list[int] = []
        for batch, own in decoded_batches(split, column, resolution, resize_mode=resize_mode):
            pictures[count : count + len(own)] = batch
            count, rows = count + len(own), rows + own
        kept.append(split if len(rows) == len(split) else split.select(rows))
    return pictures[:count], kept


@torch.no_grad()
def unit_features(judge: BackboneFeatures, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Features (N, C) of pictures (N, 3, H, W) in [-1, 1], of unit length, on the CPU."""
    device = next(judge.parameters()).device
    parts = [judge.pooled(pixels[part].to(device)).cpu() for part in batched(len(pixels), batch_size, "Features")]
    return F.normalize(torch.cat(parts), dim=1)


@torch.no_grad()
def reconstruct(image_vq: ImageVQModel, pictures: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of all pictures, and the pictures they decode to, in [-1, 1]."""
    codes, decoded = [], in_file(pictures.shape, np.float32)
    for part in batched(len(pictures), batch_size, "Reconstructing"):
        batch = image_vq.encode_codes(to_pixels(pictures[part]).to(image_vq.device))
        codes.append(batch.cpu())
        decoded[part] = image_vq.decode_codes(batch).sample.clamp(-1, 1).cpu()
    return torch.cat(codes), decoded
