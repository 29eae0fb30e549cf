"""Draws that depend on what is drawn for alone: a resumed run, more processes or more data draw the same."""

import hashlib

import numpy as np
import torch


def step_generator(seed: int, step: int, *path: int) -> torch.Generator:
    """A CPU generator that depends on (seed, step) alone, so that a resumed run draws as an unbroken one; for what all
    processes draw alike. More integers of at least 0 name one of many of the step's."""
    # Sums of them would give neighbours the same draws: row 1 of a step might have the numbers of row 0 of the next.
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step, *path)).generate_state(1)[0]))


def row_generators(seed: int, step: int, batch_size: int, *, rank: int = 0) -> list[torch.Generator]:
    """CPU generators of a process's rows, that depend on (seed, step, row of the global batch) alone: what they draw
    is the same however many processes share the batch.

    Args:
        batch_size: rows B of each process; the process `rank` has the rows `rank` B to (`rank` + 1) B - 1.
    """
    # Counted from 1: trailing zeros don't change a SeedSequence.
    return [step_generator(seed, step, rank * batch_size + row + 1) for row in range(batch_size)]


def fraction(*texts: str) -> float:
    """A number, uniform in [0, 1), that depends on texts alone: whose are below a share is a split that more rows, or
    others, leave as it is."""
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:8], "big") / 2**64
