"""Sampling 256 codes given 256 others: what is given computed once, and at each step as in one sequence of both.

A model of 36 M random weights, twelve steps, batch 1, without guidance.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTTransformer2DModel

from .common import compare


CODES, SIDE, STEPS = 1024, 16, 12


def sample(transformer: VQDiTTransformer2DModel, source: torch.Tensor, once: bool) -> torch.Tensor:
    scheduler = MaskedDiffusionScheduler()
    scheduler.set_timesteps(STEPS, device=source.device)
    generator = torch.Generator().manual_seed(0)
    codes = torch.full_like(source, CODES)
    known = {"prefix": transformer.encode_prefix({"source": source})} if once else {"given": {"source": source}}
    for timestep in scheduler.timesteps:
        logits = transformer({"image": codes}, **known).sample["image"]
        codes = scheduler.step(logits, timestep, codes.flatten(1), generator=generator).prev_sample.view_as(codes)
    return codes


def measure(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    segments = {name: {"vocab_size": CODES, "shape": [SIDE, SIDE]} for name in ("source", "image")}
    model = VQDiTTransformer2DModel(num_attention_heads=8, attention_head_dim=64, num_layers=8, segments=segments)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.eval().to(device)
    source = torch.randint(CODES, (1, SIDE, SIDE), device=device)
    functions = {
        "ours: given codes once": partial(sample, model, source, True),
        "ours: given codes at each step": partial(sample, model, source, False),
    }
    yield compare(f"256 codes given 256, {STEPS} steps", functions, rounds=rounds, device=device)
