"""Texts to token ids of one length, with any tokenizer of transformers."""

import itertools
import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .checks import shown


# A fast tokenizer holds the last call's truncation and padding: two threads that set others raise "Already borrowed".
tokenizer_lock = threading.Lock()

# Control characters but white space, the soft hyphen, zero-width space and word joiner, the byte order mark.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f\xad\u200b\u2060\ufeff]")


def check_texts(name: str, texts: Any, empty: bool = False) -> list[str]:
    """One or several texts as a list: each a string that UTF-8 can hold, not blank unless `empty` is allowed.

    Raises:
        ValueError: for an empty list, what is no string, a blank string, or one with lone surrogates.
    """
    texts = list(texts) if isinstance(texts, list | tuple) else [texts]
    if not texts:
        raise ValueError(f"{name}=[] is an empty list; give at least one, or None")
    for text in texts:
        if not isinstance(text, str) or not (empty or text.strip()):
            raise ValueError(f"{name} must be a non-empty string or a list of them, got {shown(text)}")
        lone = next((char for char in text if "\ud800" <= char <= "\udfff"), None)
        if lone is not None:
            raise ValueError(
                f"{name}={shown(text)} has the lone surrogate U+{ord(lone):04X}, half a character: decode the text "
                "as it was encoded"
            )
    return texts


def visible(text: str) -> str:
    """A text in composed characters (NFC), without invisible ones, and without white space around it."""
    return _INVISIBLE.sub("", unicodedata.normalize("NFC", text)).strip()


def tokenize_to_length(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int, padding: str = "max_length"
) -> tuple[torch.LongTensor, torch.LongTensor, list[int]]:
    """Token ids (B, length) and their attention mask, both int64, and how many tokens each text has uncut.

    What is longer is cut off. The tokenizer may be used by several threads at once.

    Args:
        tokenizer: of transformers; its special tokens stay where it cuts.
        texts: strings.
        length: tokens that are kept at most.
        padding: ``"max_length"`` to `length`, or ``"longest"`` to the longest text that is left.
    """
    options = {"padding": padding, "truncation": True, "max_length": length, "return_tensors": "pt"}
    options |= {"padding_side": "right", "return_attention_mask": True}  # those of decoders pad on the left
    with tokenizer_lock:
        tokens = tokenizer(texts, **options)
        if tokens.encodings is None:  # a tokenizer in Python
            counts = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
        else:
            counts = [sum(map(_own_tokens, [one, *one.overflowing])) + _added_tokens(one) for one in tokens.encodings]
    return tokens.input_ids, tokens.attention_mask, counts


def _added_tokens(encoding: Any) -> int:
    """Tokens of an encoding that the tokenizer adds itself, such as the end of a text."""
    added = zip(encoding.special_tokens_mask, encoding.attention_mask, strict=True)
    return sum(special and attended for special, attended in added)


def _own_tokens(encoding: Any) -> int:
    return sum(encoding.attention_mask) - _added_tokens(encoding)


def normalized(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text as a fast tokenizer reads it: after its normaliser, where it has one."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return normalizer.normalize_str(text) if normalizer is not None else text


# ---------------------------------------------------------------------------------------------------------------------
# Columns of a dataset


def check_captions(captions: Iterable[Any], column: str) -> None:
    """Raise a ValueError unless each caption is a string with some text, or a list of one or more of them.

    The message names the column, and the first rows whose caption is missing or of another type.
    """
    missing, wrong = [], []
    for row, value in enumerate(captions):
        texts = value if isinstance(value, list | tuple) else [value]
        if not texts or any(text is None for text in texts):
            missing.append(row)
        elif odd := [text for text in texts if not isinstance(text, str)]:
            wrong.append((row, odd[0]))
        elif not all(visible(text) for text in texts):
            missing.append(row)
    if wrong:
        kinds = sorted({type(value).__name__ for _, value in wrong})
        raise ValueError(
            f"column {column!r} has {len(wrong)} rows of the type {' and '.join(kinds)}, the first are rows "
            f"{[row for row, _ in wrong[:5]]} with {shown(wrong[0][1], 40)}; captions must be strings or lists of them"
        )
    if missing:
        raise ValueError(f"column {column!r}: {len(missing)} rows have no caption, the first are rows {missing[:5]}")


def texts_of(value: str | Sequence[str]) -> list[str]:
    """The captions of a row, one or several."""
    return [value] if isinstance(value, str) else list(value)


def cut_texts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, argument: str = "max_length"
) -> str | None:
    """[`length_warning`] of texts that are cut to `length` tokens; `argument` is what says it."""
    counted = ((part, tokenize_to_length(tokenizer, part, length)[2]) for part in in_parts(texts, 1024))
    return length_warning(counted, length, f"captions have more than {argument}={length} tokens and are cut")


def check_counts(
    argument: str, texts: Sequence[str], counts: Sequence[int], length: int, outcome: str = "are cut"
) -> str | None:
    """[`length_warning`] of the texts of a pipeline's argument, by their numbers of tokens.

    Args:
        outcome: what becomes of texts of more than `length` tokens.

    Raises:
        ValueError: if a text has no tokens.
    """
    empty = next((text for text, count in zip(texts, counts, strict=True) if not count), None)
    if empty is not None:
        raise ValueError(f"{argument} {shown(empty)} has nothing to read")
    problem = f"texts of {argument} have more than {length} tokens and {outcome}"
    return length_warning([(texts, counts)], length, problem)


def length_warning(counted: Iterable[tuple[Sequence[str], Sequence[int]]], length: float, problem: str) -> str | None:
    """A warning where texts, of which some at a time come with their numbers of tokens, have more than `length`: how
    many of how many, the `problem`, and the first, shortened. Else None."""
    long, total, first = 0, 0, ""
    for texts, counts in counted:
        longer = [text for text, count in zip(texts, counts, strict=True) if count > length]
        first = longer[0] if longer and not long else first
        long, total = long + len(longer), total + len(counts)
    return f"{long} of {total} {problem}; the first is {shown(first, 60)}" if long else None


def in_parts(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """The texts, so many at a time."""
    found = iter(texts)
    while part := list(itertools.islice(found, size)):
        yield part
