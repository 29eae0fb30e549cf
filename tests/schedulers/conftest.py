"""A table of three codes, small enough for every law to be enumerated."""

import itertools

import pytest
import torch


class ExactDenoiser:
    """The true conditionals p(x_i | visible codes) of a table over 3 codes with 3 values each."""

    mask = 3

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.table = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64) ** 3
        self.table /= self.table.sum()
        self.logits = torch.empty(4, 4, 4, 3, 3, dtype=torch.float64)
        for pattern in itertools.product(range(4), repeat=3):  # 3 is the mask
            visible = self.table[tuple(slice(None) if x == 3 else slice(x, x + 1) for x in pattern)]
            for position in range(3):
                others = [d for d in range(3) if d != position]
                self.logits[pattern][position] = (visible.sum(others) / visible.sum()).expand(3).log()

    def __call__(self, sample):
        return self.logits[sample.unbind(1)]


@pytest.fixture(scope="session")
def denoiser():
    return ExactDenoiser()
