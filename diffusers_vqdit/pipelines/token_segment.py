"""Texts of any length as segments: token ids of a transformers tokenizer, generated block by block."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from ..utils.checks import check_integer, shown
from ..utils.texts import check_counts, in_parts, length_warning, texts_of
from ..utils.token_ids import (
    before_end,
    blank_of,
    check_vocabulary,
    end_token_id,
    in_blocks,
    token_ids,
    written_ids,
)
from .segment_base import ENCODERS, EncodedValue
from .text_segment import TextReader, TextSegment


_token_logger = logging.get_logger(__name__)

_MODELS = {"image_vq", TextSegment.tokenizer, *ENCODERS}  # components that make no token ids


@dataclass
class _Found:
    """Texts of a kind: how many, and the first."""

    count: int = 0
    first: str = ""

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.first = self.first if self.count else text
            self.count += 1


class TokenReader(TextReader):
    """A column of texts of any length.

    Args:
        block_length: codes a block.
        max_text_length: codes of a text at most, in whole blocks; a longer one is cut, and has no end.
        turns: by column, which text of its list each row is for ([`~training.text_rows.one_text_a_row`]).
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
        turns: Mapping[str, list[int]] | None = None,
        **options: Any,
    ) -> None:
        self.turns = (turns or {}).get(column)
        self.block_length, self.end = check_integer("block_length", block_length, 1), end_token_id(tokenizer)
        limit = None
        if max_text_length is not None:
            limit = check_integer("max_text_length", max_text_length, 1) // block_length * block_length
            if not limit:
                raise ValueError(f"max_text_length={max_text_length} must be at least block_length={block_length}")
        self.limit = limit
        super().__init__(dataset, column, tokenizer, beside)
        self.has_variants = False

    def _check_texts(self) -> list[str]:
        longest, total, blank = 0, 0, blank_of(self.tokenizer)
        empty, ended, blanks = _Found(), _Found(), _Found()

        def counted() -> Iterator[tuple[list[str], list[int]]]:
            nonlocal longest, total
            for part in in_parts(self.texts(), 1024):
                written = written_ids(self.tokenizer, part)
                ends = [ids.count(self.end) for ids in written]
                counts = [len(ids) - end + 1 for ids, end in zip(written, ends, strict=True)]
                longest, total = max(longest, *counts), total + len(part)
                empty.add(text for text, count in zip(part, counts, strict=True) if count == 1)
                ended.add(text for text, end in zip(part, ends, strict=True) if end)
                blanks.add(text for text in part if blank in text)
                yield part, counts

        problem = f"texts have more than max_text_length={self.limit} tokens with their end, and are cut"
        warning = length_warning(counted(), self.limit or math.inf, problem)
        if empty.count:
            raise ValueError(
                f"column {self.column!r}: {empty.count} of {total} texts have no tokens but the end of a text, the "
                f"first is {shown(empty.first, 60)}: leave these rows out"
            )
        longest = min(longest, self.limit or longest)
        self.shape = [-(-longest // self.block_length) * self.block_length]
        self.geometry = {"block_length": self.block_length}
        notes = [warning] if warning else []
        for found, what in (
            (ended, f"name the end of a text, {self.tokenizer.eos_token!r}, which is left out of them"),
            (
                blanks,
                f"have {blank!r}, which is learned as it is written, and asks to be filled in where it is passed",
            ),
        ):
            if found.count:
                notes.append(f"{found.count} of {total} texts {what}; the first is {shown(found.first, 60)}")
        return [f"column {self.column!r}: {note}" for note in notes]

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def read(self, row: int) -> list[str]:
        return self._own(row, super().read(row))

    def texts(self) -> Iterator[str]:
        for row, value in enumerate(self.values()):
            yield from self._own(row, texts_of(value))

    def _own(self, row: int, texts: list[str]) -> list[str]:
        """The one of a row's texts that the row is for."""
        return texts if self.turns is None else [texts[self.turns[row]]]

    def encode(self, values: list, batch_size: int) -> list[torch.LongTensor]:
        ids = token_ids(self.tokenizer, [text for (text,) in values])
        return [torch.tensor([in_blocks(one, self.end, self.block_length, self.limit)]) for one in ids]


class TokenSegment(TextSegment):
    """Texts as the ids of the pipeline's own tokenizer, or of one of its `segment_tokenizers`, in whole blocks."""

    tokenizer = "tokenizer"
    named_beside = None
    reader = TokenReader
    continues = True
    has_length = True
    temperature = None  # a long text of the likeliest codes repeats itself

    @classmethod
    def check_entry(cls, where: str, entry: dict[str, Any], name: str, segments: Mapping[str, Any]) -> dict[str, Any]:
        if entry["tokenizer"] in _MODELS:
            raise ValueError(
                f"{where}: the transformer has {name!r} with a block_length, which is for token ids, and "
                f"{entry['tokenizer']!r} makes none: {{'modality': 'text', 'tokenizer': 'tokenizer'}}, or one of "
                "segment_tokenizers"
            )
        if "block_length" not in segments[name]:
            raise ValueError(
                f"{where}['tokenizer']={entry['tokenizer']!r} makes token ids, which need a block_length: the "
                f"transformer has {name!r} as {segments[name]}"
            )
        return entry

    @classmethod
    def known_options(cls, entry: Mapping[str, Any], geometry: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        return {"block_length": geometry["block_length"]}

    @property
    def end(self) -> int:
        """The code that ends a text."""
        return end_token_id(self.vq)

    @property
    def blank(self) -> str | None:
        tokenizer = self.components.get(self.needs[0])
        return None if tokenizer is None else blank_of(tokenizer)

    def ids_of(self, values: Any) -> list[list[int]]:
        """The token ids of texts, without an end. Texts longer than those trained on are told of."""
        texts = self.read(values)
        check_vocabulary(self.vq, self.vocab_size)
        found = token_ids(self.vq, texts)
        outcome = "are longer than those that the model was trained on"
        if warning := check_counts(self.argument, texts, [len(ids) for ids in found], self.shape[0] - 1, outcome):
            _token_logger.warning(warning)
        return found

    def encode(self, values: Any) -> torch.LongTensor:
        """Codes (B, n) of texts, in whole blocks, the end after each; n is the longest text's."""
        rows = [in_blocks(ids, self.end, self.block_length or 1) for ids in self.ids_of(values)]
        return self._padded(rows, self.end)

    def lengths(self, codes: torch.LongTensor) -> torch.LongTensor:
        """The codes (B,) of each text of [`encode`], in whole blocks; of one without an end all of them."""
        size = self.block_length or 1
        ended = ((codes != self.end).long().cumprod(1).sum(1) // size + 1) * size
        return ended.clamp_max(codes.shape[1])

    def encode_given(self, values: list) -> EncodedValue:
        return self.given_codes(self.encode(values))

    def given_codes(self, codes: torch.LongTensor) -> EncodedValue:
        """Codes (B, n) of texts, filled up to whole blocks; what comes after a text's last block is padding."""
        codes = F.pad(codes, (0, -codes.shape[1] % (self.block_length or 1)), value=self.end)
        mask = torch.arange(codes.shape[1], device=codes.device) < self.lengths(codes)[:, None]
        return EncodedValue(codes, mask=None if mask.all() else mask)

    def encode_partial(self, values: list, mask_image: torch.Tensor | None = None) -> EncodedValue:
        """Codes (B, n) of texts that begin so, or of whole ones with blanks: each ``<mask>`` is one token, and takes
        the place of the space before it."""
        blank, end = blank_of(self.vq), self.end
        check_vocabulary(self.vq, self.vocab_size)
        rows, texts = [], self.read(values)
        beginnings = [text for text in texts if blank not in text]
        begun = iter(self.ids_of(beginnings) if beginnings else [])
        for text in texts:
            if blank not in text:
                rows.append(next(begun))
                continue
            pieces = re.split(rf"\s*{re.escape(blank)}", text)
            parts = token_ids(self.vq, pieces)
            ids = [code for part in parts for code in (*part, self.vocab_size)][:-1]
            rows.append([*ids, end])
        used = [len(row) for row in rows]

        def finish(codes: torch.LongTensor, repeats: int, output_type: str) -> list[str]:
            return self.decode(codes, output_type, used=[size for size in used for _ in range(repeats)])

        return EncodedValue(self._padded(rows, self.vocab_size), self.name, finish)

    def decode(
        self,
        codes: torch.LongTensor,
        output_type: str = "pil",
        tokens: torch.LongTensor | None = None,
        known: torch.BoolTensor | None = None,
        used: list[int] | None = None,
    ) -> list[str]:
        """Strings of codes (B, n), each up to its end. An end among the first `used` codes, of which more is known, is
        none."""
        check_vocabulary(self.vq, self.vocab_size)
        codes = codes if tokens is None else torch.where(known, tokens, codes)
        texts = []
        for row, size in zip(codes.tolist(), used or [0] * len(codes), strict=True):
            before = [code for code in row[: max(size - 1, 0)] if code != self.end]
            rest = before_end(before_end(row[max(size - 1, 0) :], self.end), self.vocab_size)
            texts.append(self.vq.decode([*before, *rest], skip_special_tokens=True))
        return texts

    def _padded(self, rows: list[list[int]], fill: int) -> torch.LongTensor:
        """Rows of codes as (B, n)."""
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=self.device())
