"""Columns of captions: one drawn for each row, and how many are cut. What they may hold stands in ``utils``."""

import logging

import torch

from ..schedulers.samplers import Generators, uniform
from ..utils.texts import cut_texts


logger = logging.getLogger(__name__)


def draw_captions(
    captions: dict[str, list[list[str]]], rows: torch.LongTensor, generator: Generators = None
) -> list[str]:
    """One caption for each of `rows`: a column drawn evenly, then one of its texts there.

    `generator` may be a list with one a row.
    """
    wordings = list(captions.values())
    columns = (uniform(rows.shape, generator, rows.device) * len(wordings)).long().tolist()
    shares = uniform(rows.shape, generator, rows.device).tolist()
    chosen = [wordings[column][row] for column, row in zip(columns, rows.tolist(), strict=True)]
    return [texts[int(share * len(texts))] for texts, share in zip(chosen, shares, strict=True)]


def warn_of_cut(texts: list[str], tokenizer, length: int, argument: str = "max_length") -> None:
    """One warning, with the count, where texts have more than `length` tokens; `argument` is what says it."""
    if warning := cut_texts(texts, tokenizer, length, argument):
        logger.warning(warning)
