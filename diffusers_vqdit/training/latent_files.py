"""A file of latents for the next run, which says what they were made from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..models.vae_latents import raw_latents
from ..utils.fingerprints import model_fingerprint, tensor_sha256
from ..utils.weight_files import replacing_file
from .data import to_pixels
from .files import check_output_file


def latents_identity(vae: torch.nn.Module, pictures: torch.Tensor, random_flip: bool) -> dict[str, str]:
    """What latents depend on: the pictures (N, 3, H, W) uint8, the tokenizer, and whether mirrored ones are there."""
    return {
        "pictures": tensor_sha256(pictures),
        "resolution": str(pictures.shape[-1]),
        "random_flip": str(random_flip),
        "vae": model_fingerprint(vae),
    }


def save_latents(path: Path, latents: torch.Tensor, identity: dict[str, str]) -> None:
    """Write latents (N, variants, C, h, w), under a temporary name until the file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as unfinished:
        save_file({"latents": latents}, unfinished, metadata={**identity, "latents": tensor_sha256(latents)})


def check_latents_file(path: Path) -> None:
    """See, before anything is decoded or encoded, that a file of latents can be read, or one be written there.

    Raises:
        ValueError: that says what is wrong with it.
    """
    if path.is_file():
        with _opened(path) as file:
            file.get_slice("latents")
    else:
        check_output_file("latents_file", path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(
            f"latents_file={str(path)!r} is damaged, or no file of latents ({error}); delete it or name another"
        ) from error


def load_latents(path: Path, identity: dict[str, str]) -> torch.Tensor:
    """The latents that [`save_latents`] wrote.

    Raises:
        ValueError: if the file is damaged, or its latents are of other data or another tokenizer; it names which.
    """
    named = f"latents_file={str(path)!r}"
    with _opened(path) as file:
        metadata = file.metadata() or {}
        latents = file.get_tensor("latents")
    if "latents" not in metadata:
        raise ValueError(
            f"{named} is from an older version, and doesn't say what it was made from; delete it or name another"
        )
    # Another resolution makes other pictures; the reason is named alone.
    differing = [name for name in identity if metadata.get(name) != identity[name]]
    if "resolution" in differing:
        differing = [name for name in differing if name != "pictures"]
    if differing:
        raise ValueError(f"{named} was made with other {' and '.join(differing)}; delete it or name another")
    if metadata["latents"] != tensor_sha256(latents):
        raise ValueError(f"{named} is damaged: its latents' SHA-256 is not the one in it; delete it or name another")
    return latents


@torch.no_grad()
def cache_latents(
    vae: torch.nn.Module, pictures: torch.Tensor, path: Path | None, *, random_flip: bool, device: torch.device
) -> torch.Tensor:
    """Raw latents (N, variants, C, h, w) on the CPU, float32, read from a file if it is there.

    Args:
        pictures: (N, 3, H, W) uint8.
        path: the file, which is written if it isn't there; None for no file.
        random_flip: whether each picture's mirror image is a second variant.
    """
    identity = latents_identity(vae, pictures, random_flip) if path is not None else {}
    if path is not None and path.exists():
        return load_latents(path, identity)
    parts = []
    for part in tqdm(pictures.split(64), desc="Latents"):
        pixels = to_pixels(part.to(device))
        both = [pixels, pixels.flip(-1)][: 2 if random_flip else 1]
        parts.append(torch.stack([raw_latents(vae, one).float().cpu() for one in both], dim=1))
    latents = torch.cat(parts)
    if path is not None:
        save_latents(path, latents, identity)
    return latents
