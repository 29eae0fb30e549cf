"""Texts as token ids of any transformers tokenizer, with an end, in whole blocks."""

from collections.abc import Sequence
from typing import Any

from diffusers.utils import logging
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .checks import shown
from .components import has_file
from .texts import tokenizer_lock


_token_ids_logger = logging.get_logger(__name__)

END_TOKEN = "<|endoftext|>"  # where a tokenizer has no end of its own
BLANK = "<mask>"  # where it has no mask of its own


def add_end_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Give a tokenizer an end of texts, `END_TOKEN`, where it has none; then what to tell of it."""
    if tokenizer.eos_token_id is not None:
        return None
    tokenizer.add_special_tokens({"eos_token": END_TOKEN})
    return f"the tokenizer has no end of texts (eos_token): {END_TOKEN!r}, id {tokenizer.eos_token_id}, was added"


def load_tokenizer_of_ids(name: str, cache_dir: str | None = None, argument: str = "tokenizer") -> Any:
    """A tokenizer of transformers whose ids are the codes of texts: a folder or Hub repository of its own, of a
    model's, or of a pipeline's. One without an end of texts gets it, with a warning.

    Args:
        argument: that names it, for messages.

    Raises:
        ValueError: if there is none.
    """
    folder = "tokenizer" if has_file(name, "tokenizer/tokenizer_config.json", cache_dir) else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=folder, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}={shown(name)} has no tokenizer of transformers: {error}") from error
    if note := add_end_token(tokenizer):
        _token_ids_logger.warning(f"{argument}={shown(name)}: {note}")
    return tokenizer


def makes_token_ids(tokenizer: Any) -> bool:
    """Whether it makes token ids by itself, with no model of its own."""
    return isinstance(tokenizer, PreTrainedTokenizerBase)


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
    """The ids of each text, without special tokens, and of any length. Several threads may use the tokenizer. An end
    that a text names is left out ([`written_ids`] has it)."""
    end = tokenizer.eos_token_id
    return [[code for code in ids if code != end] for ids in written_ids(tokenizer, texts)]


def written_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """[`token_ids`] with the ends that texts name."""
    if not texts:
        return []
    with tokenizer_lock:
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        options = {"add_special_tokens": False, "padding": False, "truncation": False, "verbose": False}
        return tokenizer(list(texts), **options).input_ids


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
