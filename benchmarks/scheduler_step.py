"""A step of the scheduler with 8,192 codes at 256 positions, batch 4: beside diffusers' `AmusedScheduler`.

Both choose as MaskGIT does; each draws its own noise, so that samples can't be compared one by one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AmusedScheduler

from diffusers_vqdit import MaskedDiffusionScheduler

from .common import compare


SIZE, STEPS = 8192, 12


def measure(rounds: int, device: str) -> Iterator[dict[str, Any]]:
    logits = torch.randn(4, 256, SIZE, device=device)
    theirs = AmusedScheduler(mask_token_id=SIZE)
    theirs.set_timesteps(STEPS, temperature=(2, 0), device=device)
    ours = {name: MaskedDiffusionScheduler(sampler=name) for name in ("confidence", "entropy_bound")}
    for scheduler in ours.values():
        scheduler.set_timesteps(STEPS, device=device)
    for share in (1.0, 0.5):
        sample = torch.randint(SIZE, (4, 256), device=device)
        sample[torch.rand(sample.shape, device=device) < share] = SIZE
        functions = {
            f"ours, {name}": lambda s=scheduler, x=sample: s.step(logits, s.timesteps[STEPS // 2], x).prev_sample
            for name, scheduler in ours.items()
        }
        functions["diffusers: AmusedScheduler"] = lambda x=sample: (
            theirs.step(logits, theirs.timesteps[STEPS // 2], x).prev_sample
        )

        def masks(first: torch.Tensor, second: torch.Tensor) -> str:
            return f"masks left {(second == SIZE).sum()} (ours {(first == SIZE).sum()})"

        read = 4 * float((sample == SIZE).sum()) * SIZE
        case = f"scheduler step, {100 * share:.0f} % masked"
        yield compare(case, functions, rounds=rounds, device=device, read=read, difference=masks)
