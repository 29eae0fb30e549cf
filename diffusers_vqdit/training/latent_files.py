"""A file of latents for the next run, which says what they were made from."""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..models.vae_latents import raw_latents
from ..utils.decoding import to_pixels
from ..utils.fingerprints import model_fingerprint, tensor_sha256
from ..utils.weight_files import replacing_file
from .files import check_output_file
from .image_dataset import ImageDataset
from .picture_tensors import PictureTensors, check_tensor_file, encode_pictures, map_tensor, opened_tensors


LATENTS_FILE = "latents.safetensors"  # in a run's folder, of pictures that are not kept in memory


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
        with opened_tensors(path, "latents_file") as file:
            file.get_slice("latents")
    else:
        check_output_file("latents_file", path)


def load_latents(path: Path, identity: dict[str, str]) -> torch.Tensor:
    """The latents that [`save_latents`] wrote, mapped into memory.

    Raises:
        ValueError: if the file is damaged, or its latents are of other data or another tokenizer; it names which.
    """
    check_tensor_file(path, "latents", identity, "latents_file")
    return map_tensor(path, "latents")


@torch.no_grad()
def cache_latents(
    args: argparse.Namespace, vae: torch.nn.Module, images: ImageDataset, device: torch.device
) -> PictureTensors:
    """Raw latents (N, variants, C, h, w) on the CPU, float32, of a run's pictures; with ``--random_flip`` each one's
    mirror image is a second variant. All processes must call it.

    They are read from ``--latents_file`` if it is there, else written into it. Without, those of pictures that are
    kept in memory are made by each process, and others by all in a file of the run's folder.
    """
    path, random_flip = args.latents_file, args.random_flip

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        pixels = to_pixels(pictures.to(device))
        both = [pixels, pixels.flip(-1)][: 2 if random_flip else 1]
        return torch.stack([raw_latents(vae, one).float().cpu() for one in both], dim=1)

    if images.pictures is None:
        identity = {name: str(value) for name, value in images.identity().items()}
        identity |= {"resolution": str(images.resolution), "random_flip": str(random_flip)}
        identity["vae"] = model_fingerprint(vae)
        own, argument = args.output_dir / LATENTS_FILE, None if path is None else "latents_file"
        workers = args.dataloader_num_workers
        options: dict[str, Any] = {"argument": argument, "num_workers": workers}
        return encode_pictures(images, encode, path or own, "latents", identity, **options)
    with PartialState().main_process_first():  # the others read the file, if there is to be one
        latents_of = latents_identity(vae, images.pictures, random_flip) if path is not None else {}
        if path is not None and path.exists():
            latents = load_latents(path, latents_of)
        else:
            latents = torch.cat([encode(part) for part in tqdm(images.pictures.split(64), desc="Latents")])
            if path is not None:
                save_latents(path, latents, latents_of)
    return PictureTensors(latents, images.rows)
