"""Texts as token ids of any transformers tokenizer, with an end, in whole blocks."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .checks import shown
from .texts import tokenizer_lock


END_TOKEN = "<|endoftext|>"  # where a tokenizer has no end of its own
BLANK = "<mask>"  # where it has no mask of its own


def add_end_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Give a tokenizer an end of texts, `END_TOKEN`, where it has none; then what to tell of it."""
    if tokenizer.eos_token_id is not None:
        return None
    tokenizer.add_special_tokens({"eos_token": END_TOKEN})
    return f"the tokenizer has no end of texts (eos_token): {END_TOKEN!r}, id {tokenizer.eos_token_id}, was added"


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a text.

    Raises:
        ValueError: if the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer has no eos_token, which ends texts: tokenizer.add_special_tokens({'eos_token': ..})"
        )
    return tokenizer.eos_token_id


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without special tokens, and of any length. Several threads may use the tokenizer."""
    if not texts:
        return []
    with tokenizer_lock:
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
        found = tokenizer(list(texts), **options).input_ids
    return [[code for code in ids if code != tokenizer.eos_token_id] for ids in found]  # of a text that names it


def blank_of(tokenizer: Any) -> str:
    """What stands for one token to fill in."""
    return getattr(tokenizer, "mask_token", None) or BLANK


def in_blocks(ids: Sequence[int], end: int, block_length: int, limit: int | None = None) -> list[int]:
    """A text's ids with the end after them, which fills the last block, too; of more than `limit` ids with the end
    (whole blocks) the first, without an end."""
    if limit is not None and len(ids) >= limit:
        return list(ids[:limit])
    return [*ids, *[end] * (block_length - len(ids) % block_length)]


def before_end(ids: Sequence[int], end: int) -> list[int]:
    """The ids before the first end."""
    ids = list(ids)
    return ids[: ids.index(end)] if end in ids else ids


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise a ValueError unless a segment of token ids has as many codes as the tokenizer has ids."""
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} ids, but the transformer {vocab_size} codes: {shown(type(tokenizer))} is "
            "not the one that made the codes"
        )
