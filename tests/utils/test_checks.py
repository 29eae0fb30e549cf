"""Checks of arguments: what they let through, and that a refusal names argument, value and what is accepted."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vqdit.utils.checks import check_choice, check_flag, check_integer, check_integers, check_number, shown


@given(st.integers(-100, 100), st.sampled_from([int, np.int8, np.int64]))
def test_integers_of_all_types_are_taken_within_their_bounds(value, kind):
    if 0 <= value <= 50:
        assert check_integer("steps", kind(value), 0, 50) == value
    else:
        with pytest.raises(ValueError, match=r"^steps=.* must be an integer in \[0, 50\]$"):
            check_integer("steps", kind(value), 0, 50)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], math.nan])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(ValueError, match="steps=.* must be an integer of at least 1"):
        check_integer("steps", value, 1)


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_numbers_are_finite_and_within_their_bounds(value):
    if math.isfinite(value) and 0 < value <= 1:
        assert check_number("share", value, 0, 1, above=True) == value
    else:
        with pytest.raises(ValueError, match=r"share=.* must be a finite number in \(0, 1\]"):
            check_number("share", value, 0, 1, above=True)


def test_choices_flags_and_lists():
    assert check_choice("mode", "crop", ("crop", "pad")) == "crop"
    assert check_flag("use_ema", False) is False
    assert check_integers("widths", (8, np.int64(16)), 1) == [8, 16]
    for refused in (
        lambda: check_choice("mode", "Crop", ("crop", "pad")),
        lambda: check_choice("mode", ["crop"], ("crop", "pad")),
        lambda: check_flag("use_ema", 1),
        lambda: check_integers("widths", [], 1),
        lambda: check_integers("widths", [8, 0], 1),
        lambda: check_integers("widths", [8], 1, length=2),
    ):
        with pytest.raises(ValueError, match=r"^(mode|use_ema|widths)(\[1\])?=.* must be "):
            refused()


def test_long_values_and_lone_surrogates_are_shown_safely():
    assert shown("a" * 1000).endswith("...") and len(shown("a" * 1000)) < 130
    shown("\ud800").encode("utf-8")
