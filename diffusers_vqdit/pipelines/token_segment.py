"""Texts of any length as segments: token ids of a transformers tokenizer, generated block by block."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import logging

from ..utils.checks import check_integer
from ..utils.token_ids import end_token_id, in_blocks, token_ids
from .text_segment import TextReader, TextSegment


_token_logger = logging.get_logger(__name__)


class TokenReader(TextReader):
    """A column of texts of any length.

    Args:
        block_length: codes a block.
        max_text_length: codes of a text at most, in whole blocks; a longer one is cut, and has no end.
    """

    def __init__(
        self,
        dataset: Any,
        column: str,
        tokenizer: Any = None,
        beside: Any = None,
        *,
        block_length: int = 16,
        max_text_length: int | None = None,
        **options: Any,
    ) -> None:
        self.block_length, self.end = check_integer("block_length", block_length, 1), end_token_id(tokenizer)
        limit = None
        if max_text_length is not None:
            limit = check_integer("max_text_length", max_text_length, 1) // block_length * block_length
            if not limit:
                raise ValueError(f"max_text_length={max_text_length} must be at least block_length={block_length}")
        self.limit = limit
        super().__init__(dataset, column, tokenizer, beside)

    def _check_texts(self) -> list[str]:
        if several := [row for row, texts in enumerate(self.lists) if len(texts) > 1]:
            raise ValueError(
                f"column {self.column!r} has several texts in row {several[0]}: with token ids a row has one text"
            )
        texts, longest, cut = [text for (text,) in self.lists], 0, 0
        for start in range(0, len(texts), 1024):
            counts = [len(ids) + 1 for ids in token_ids(self.tokenizer, texts[start : start + 1024])]
            longest, cut = max(longest, *counts), cut + sum(count > (self.limit or count) for count in counts)
        longest = min(longest, self.limit or longest)
        self.shape = [-(-longest // self.block_length) * self.block_length]
        self.geometry = {"block_length": self.block_length}
        if not cut:
            return []
        return [
            f"column {self.column!r}: {cut} of {len(texts)} texts have more than max_text_length={self.limit} tokens "
            "with their end, and are cut"
        ]

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def encode(self, values: list, batch_size: int) -> list[torch.LongTensor]:
        ids = token_ids(self.tokenizer, [text for (text,) in values])
        return [torch.tensor([in_blocks(one, self.end, self.block_length, self.limit)]) for one in ids]


class TokenSegment(TextSegment):
    """Texts as the ids of the pipeline's own tokenizer, in whole blocks."""

    tokenizer = "tokenizer"
    named_beside = None
    reader = TokenReader

    @classmethod
    def check_entry(cls, where: str, entry: dict[str, Any], name: str, segments: Mapping[str, Any]) -> dict[str, Any]:
        if "block_length" not in segments[name]:
            raise ValueError(
                f"{where}['tokenizer']={entry['tokenizer']!r} makes token ids, which need a block_length: the "
                f"transformer has {name!r} as {segments[name]}"
            )
        return entry

    @classmethod
    def known_options(cls, entry: Mapping[str, Any], geometry: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        return {"block_length": geometry["block_length"]}
