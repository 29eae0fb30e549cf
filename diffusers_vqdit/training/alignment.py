"""Aligning a transformer's hidden states with a frozen vision encoder's features (REPA, Yu et al. 2024)."""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..pipelines.frozen_encoders import pixel_size
from ..utils.checks import shown
from ..utils.fingerprints import model_fingerprint, tokenizer_fingerprint
from .image_dataset import ImageDataset
from .latent_loss import AlignmentProjector, patch_features
from .picture_tensors import encode_pictures
from .table_files import loading


FEATURES_FILE = "features.safetensors"  # in a run's folder, of pictures that are not kept in memory


def load_alignment_encoder(args: argparse.Namespace) -> tuple[Any, Any] | None:
    """The model of ``--alignment_encoder`` and its image processor; None where there is none."""
    if args.alignment_encoder is None:
        return None
    with loading(f"alignment_encoder={shown(args.alignment_encoder)} can't be loaded"):
        encoder = AutoModel.from_pretrained(args.alignment_encoder, cache_dir=args.cache_dir).eval()
        processor = AutoImageProcessor.from_pretrained(args.alignment_encoder, cache_dir=args.cache_dir)
    return getattr(encoder, "vision_model", encoder), processor


@torch.no_grad()
def cache_features(
    args: argparse.Namespace,
    alignment_encoder: tuple[Any, Any] | None,
    images: ImageDataset,
    grid: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Features (N, variants, grid^2, F) of ``--alignment_encoder``, float16 on the CPU; None where there is none.

    Those of pictures that are not kept in memory are in a file of the run's folder, which all processes write.

    Args:
        alignment_encoder: of [`load_alignment_encoder`].
        grid: positions of a side that the features are brought to.
    """
    if alignment_encoder is None:
        return None
    encoder, processor = alignment_encoder
    encoder.to(device)

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        both = [pictures, pictures.flip(-1)][: 2 if args.random_flip else 1]
        inputs = [encoder_inputs(encoder, processor, one).to(device) for one in both]
        return torch.stack([patch_features(encoder, one, (grid, grid)).half().cpu() for one in inputs], dim=1)

    if images.pictures is not None:
        return torch.cat([encode(part) for part in tqdm(images.pictures.split(64), desc="Features")])
    identity = {name: str(value) for name, value in images.identity().items()}
    identity |= {"resolution": str(images.resolution), "grid": str(grid), "random_flip": str(args.random_flip)}
    identity |= {"encoder": model_fingerprint(encoder), "processor": tokenizer_fingerprint(processor), "of": "whole"}
    path, workers = args.output_dir / FEATURES_FILE, args.dataloader_num_workers
    return encode_pictures(images, encode, path, "features", identity, num_workers=workers).tensor


def encoder_inputs(encoder: Any, processor: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W), uint8, as the encoder takes them, whole: the processors of many, DINOv2's among them,
    would cut off the borders, and the features be of other places than the latents."""
    size = pixel_size(encoder, processor)
    pixels = F.interpolate(pictures.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
    ready = {"do_resize": False, "do_center_crop": False, "do_rescale": False}
    return processor(images=list(pixels), return_tensors="pt", **ready).pixel_values


class AlignedTransformer(torch.nn.Module):
    """The transformer, and the projection of one block's output where it is aligned; one module for one optimizer."""

    def __init__(self, transformer: VQDiTTransformer2DModel, layer: int, feature_dim: int | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = transformer.config
        if feature_dim is not None:
            self.projector = AlignmentProjector(transformer.inner_dim, feature_dim)
            transformer.transformer_blocks[layer - 1].register_forward_hook(self._keep)

    # What the last forward pass is to be aligned by.
    projected: torch.Tensor | None = None

    def _keep(self, block: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._hidden = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A caption passes through the blocks before the latents do, so that the latents' states are kept last.
        output = self.transformer(*args, **kwargs)
        if hasattr(self, "projector"):
            # In the output as well, where DistributedDataParallel looks for what gets gradients.
            output["projected"] = self.projected = self.projector(self._hidden)
        return output
