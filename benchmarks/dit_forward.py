"""One forward pass of a DiT: `VQDiTTransformer2DModel` beside diffusers' `DiTTransformer2DModel`, with equal weights.

Ours computes the conditioning of time and label once where the blocks' weights for it are equal, as in all checkpoints
that come from the original DiT; stock DiT computes it in every block.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from diffusers_vqdit import VQDiTTransformer2DModel

from .common import compare


# DiT-S/2 of Peebles & Xie 2023, table 1, for latents of 32 x 32
CONFIG = {
    "num_layers": 12,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
}


def both_models(device: str) -> tuple[VQDiTTransformer2DModel, DiTTransformer2DModel]:
    """Ours and diffusers' own, of equal random weights."""
    ours = VQDiTTransformer2DModel(**CONFIG).share_embedder().eval().to(device)
    for parameter in ours.parameters():  # a new DiT gives zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    stock = DiTTransformer2DModel(**CONFIG).eval().to(device)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def forward(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return model(*inputs).sample


def measure(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    models = dict(zip(("ours", "diffusers: DiT"), both_models(device), strict=True))
    for dtype in (torch.float32, torch.bfloat16):
        for batch_size in (1, 8):
            inputs = (
                torch.randn(batch_size, 4, 32, 32, device=device, dtype=dtype),
                torch.randint(1000, (batch_size,), device=device),
                torch.randint(1000, (batch_size,), device=device),
            )
            functions = {name: partial(forward, model.to(dtype), inputs) for name, model in models.items()}
            case = f"DiT-S/2, forward, batch {batch_size}, {str(dtype).removeprefix('torch.')}"
            yield compare(case, functions, rounds=rounds, device=device, dtype=dtype)
