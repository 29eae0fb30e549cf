"""A training step of DiT-S/2, batch 4: ours and diffusers' `DiTTransformer2DModel`, with and without fused AdamW."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from diffusers_vqdit import VQDiTTransformer2DModel

from .common import compare


CONFIG = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64, "in_channels": 4, "sample_size": 32}


def measure(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    inputs = (
        torch.randn(4, 4, 32, 32, device=device),
        torch.randint(1000, (4,), device=device),
        torch.randint(1000, (4,), device=device),
    )

    def stepper(model: torch.nn.Module, fused: bool):
        model.train().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

        @torch.enable_grad()
        def step() -> torch.Tensor:
            loss = model(*inputs).sample.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    functions = {
        "ours": stepper(VQDiTTransformer2DModel(**CONFIG).share_embedder(), True),
        "ours, AdamW not fused": stepper(VQDiTTransformer2DModel(**CONFIG).share_embedder(), False),
        "diffusers: DiT, AdamW not fused": stepper(DiTTransformer2DModel(**CONFIG), False),
        "diffusers: DiT, fused AdamW": stepper(DiTTransformer2DModel(**CONFIG), True),
    }
    yield compare(
        "training step, DiT-S/2, batch 4",
        functions,
        rounds=rounds,
        device=device,
        difference=lambda a, b: "own weights",
    )
