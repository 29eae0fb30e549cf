"""Checks of arguments: each raises a ValueError that names the argument, the value it had and what is accepted."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch.nn as nn


MAX_NAME = 200  # characters: with an ending, a file's or folder's name


def shown(value: Any, length: int = 120) -> str:
    """A value as an error message shows it, cut to `length` characters and free of lone surrogates."""
    text = repr(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= length else f"{text[:length]}..."


def check_integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int: any integer type but bool, from `low` to `high`, both included; None is no bound."""
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name}={shown(value)} must be an integer{_bounds(low, high)}")
    return int(value)


def check_number(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """`value` as a finite float from `low` to `high`, both included; None is no bound.

    `above` leaves `low` out, and `below` leaves `high` out.
    """
    try:
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        fits = False
    if fits and low is not None:
        fits = value > low if above else value >= low
    if fits and high is not None:
        fits = value < high if below else value <= high
    if not fits:
        raise ValueError(f"{name}={shown(value)} must be a finite number{_bounds(low, high, above, below)}")
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """`value` itself, which must be one of `choices`."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{name}={shown(value)} must be one of {list(choices)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """`value` itself, which must be True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False")
    return value


def check_module_name(where: str, name: Any) -> str:
    """`name` itself, which must be one that a module in a `torch.nn.ModuleDict` can have."""
    fits = isinstance(name, str) and name.isidentifier() and len(name) <= MAX_NAME
    if not fits or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{where}: {shown(name)} can't be a name; use letters, digits and underscores, {MAX_NAME} at most, and no "
            "attribute that PyTorch's modules have"
        )
    return name


def check_integers(name: str, value: Any, low: int, length: int | None = None) -> list[int]:
    """`value` as a list of integers of at least `low`; of `length` entries where that is given."""
    if not isinstance(value, list | tuple) or not value or (length is not None and len(value) != length):
        count = "one or more" if length is None else str(length)
        raise ValueError(f"{name}={shown(value)} must be a list of {count} integers of at least {low}")
    return [check_integer(f"{name}[{index}]", entry, low) for index, entry in enumerate(value)]


def _bounds(low: float | None, high: float | None, above: bool = False, below: bool = False) -> str:
    if low is not None and high is not None:
        return f" in {'(' if above else '['}{low}, {high}{')' if below else ']'}"
    if low is not None:
        return f" above {low}" if above else f" of at least {low}"
    if high is not None:
        return f" below {high}" if below else f" of at most {high}"
    return ""
