"""Fractions that splits are drawn by."""

import numpy as np
import pytest

from diffusers_vqdit.training.draws import fraction


def test_fractions_of_texts_are_uniform_and_independent():
    """10,000 each: shares of tenths within five standard deviations (0.015), correlations within four (0.04)."""
    drawn = np.array([[fraction(f"{what} {n}") for n in range(10_000)] for what in ("role", "pair")])
    for one in drawn:
        shares = np.histogram(one, bins=10, range=(0, 1))[0] / len(one)
        assert abs(shares - 0.1).max() < 0.015
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.04
    assert abs(np.corrcoef(drawn[0, :-1], drawn[0, 1:])[0, 1]) < 0.04


def test_what_was_drawn_stays():
    """Published splits depend on it."""
    assert fraction("role 1F600") == pytest.approx(0.6648447, abs=1e-7)
    assert fraction("a dog", "en-us") == fraction("a dog\nen-us") != fraction("a dogen-us")
