"""Texts as segments, on a line of codes."""

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.utils import logging
from transformers import PreTrainedTokenizerFast

from ..models.text_vq import TextVQModel
from ..utils.components import find_beside, find_component, has_file
from ..utils.texts import check_captions, check_counts, check_texts, cut_texts, texts_of, tokenize_to_length
from ..utils.token_ids import load_tokenizer_of_ids
from .segment_base import ColumnReader, EncodedValue, SegmentProcessor, forget_positions


logger = logging.get_logger(__name__)


class TextReader(ColumnReader):
    """A column of texts, or of lists of them."""

    def __init__(self, dataset: Any, column: str, tokenizer: Any = None, beside: Any = None, **options: Any) -> None:
        super().__init__(dataset, column, tokenizer, beside)
        check_captions(self.values(), column)
        self.notes = self._check_texts()
        self.has_variants = any(len(texts_of(value)) > 1 for value in self.values())

    def texts(self) -> Iterator[str]:
        """The texts of all rows."""
        for value in self.values():
            yield from texts_of(value)

    def _check_texts(self) -> list[str]:
        """Warnings of texts that are cut."""
        warning = cut_texts(self.texts(), self.beside, self.tokenizer.config.max_length)
        return [warning] if warning else []

    def read(self, row: int) -> list[str]:
        return texts_of(self.dataset[row][self.column])

    def digest(self, values: list) -> bytes:
        return json.dumps([self.column, values]).encode()

    def encode(self, values: list, batch_size: int) -> list[torch.LongTensor]:
        texts = [text for row in values for text in row]
        codes = encode_texts(texts, self.tokenizer, self.beside, batch_size)
        return list(codes.split([len(row) for row in values]))


def encode_texts(texts: list[str], text_vq: TextVQModel, tokenizer: Any, batch_size: int = 64) -> torch.LongTensor:
    """Codes (N, L) int64 of `texts`, on the CPU."""
    codes = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        ids, mask, _ = tokenize_to_length(tokenizer, part, text_vq.config.max_length)
        codes.append(text_vq.encode_codes(ids.to(text_vq.device), mask.to(text_vq.device)).cpu())
    return torch.cat(codes)


class TextSegment(SegmentProcessor):
    """Texts on a line of codes."""

    tokenizer = "text_vq"
    tokenizer_alone = "tokenizer"
    named_beside: str | None = "tokenizer"
    reader = TextReader
    any_shape = False
    noun = "text"
    output_field = "texts"
    num_inference_steps = None  # its codes hang together more than a picture's
    temperature: float | None = 0.0
    how_to_pass = "a segment is given or generated. Put <mask> where a text is to be filled in"

    @classmethod
    def load_tokenizer(cls, name: str, *, cache_dir: str | None = None, **options: Any) -> tuple[Any, Any]:
        """The text tokenizer in a folder or Hub repository: its own, a pipeline's, or a subfolder such as
        ``user/model/text_vq``; and its `tokenizer`, which stands in the model's folder or, in a pipeline, beside it.
        Where there is no such model, but a tokenizer of transformers, that one, which makes token ids, and None.

        Raises:
            ValueError: if there is a model without a tokenizer.
        """
        source, folder = find_component(name, cls.tokenizer, cache_dir)
        below, config = f"{folder}/" if folder else "", {}
        if has_file(source, f"{below}config.json", cache_dir):
            config = TextVQModel.load_config(source, subfolder=folder or None, cache_dir=cache_dir)
        if "_class_name" not in config:  # as in those of transformers
            files = [f"{below}{parent}tokenizer_config.json" for parent in ("", "tokenizer/")]
            if any(has_file(source, file, cache_dir) for file in files):
                return load_tokenizer_of_ids(name, cache_dir), None
        model = TextVQModel.from_pretrained(source, subfolder=folder or None, cache_dir=cache_dir, **options)
        place = find_beside(source, folder, "tokenizer", "tokenizer_config.json", cache_dir)
        if place is None:
            raise ValueError(f"{cls.tokenizer}={name!r} has no tokenizer, neither in its folder nor beside it")
        source, folder = place
        return model, PreTrainedTokenizerFast.from_pretrained(source, subfolder=folder, cache_dir=cache_dir)

    def read(self, value: Any) -> list:
        return check_texts(self.argument, value)

    def tokenize(self, texts: Any) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Token ids and attention mask (B, T) of texts; what is too long is cut off, with a warning."""
        texts, length = self.read(texts), self.vq.config.max_length
        ids, mask, counts = tokenize_to_length(self.beside, texts, length)
        if warning := check_counts(self.argument, texts, counts, length):
            logger.warning(warning)
        return ids.to(self.device()), mask.to(self.device())

    def encode(self, values: Any) -> torch.LongTensor:
        return self.vq.encode_codes(*self.tokenize(values))

    @property
    def blank(self) -> str | None:
        return getattr(self.components.get(self.needs[1]), "mask_token", None)

    def infill(self, texts: list[str]) -> tuple[torch.LongTensor, torch.LongTensor, torch.BoolTensor]:
        """What texts with blanks tell of a generated text.

        Each ``<mask>`` is one token, and takes the place of the space before it. A code is known where the blanks
        leave it the same whatever stands in them.

        Returns:
            codes (B, *shape) with the vocabulary size where unknown, token ids (B, T), and which tokens are known
            (B, T).
        """
        blank, pad = self.beside.mask_token_id, self.beside.pad_token_id
        closed = [re.sub(rf"\s*{re.escape(self.beside.mask_token)}", self.beside.mask_token, text) for text in texts]
        tokens, attention_mask = self.tokenize(closed)
        known = tokens != blank
        filled = [self.vq.encode_codes(torch.where(known, tokens, token), attention_mask) for token in (pad, blank)]
        touched = (~known).unflatten(1, (-1, self.vq.config.downsample_factor)).any(-1)  # (B, T/r)
        touched = touched.repeat_interleave(filled[0].shape[1] // touched.shape[1], dim=1)
        return forget_positions(filled[0], filled[1], touched, self.vocab_size), tokens, known

    def encode_partial(self, values: list, mask_image: torch.Tensor | None = None) -> EncodedValue:
        codes, *written = self.infill(values)

        def finish(codes: torch.LongTensor, repeats: int, output_type: str) -> list[str]:
            return self.decode(codes, output_type, *(tensor.repeat_interleave(repeats, dim=0) for tensor in written))

        return EncodedValue(codes, self.name, finish)

    def decode(
        self,
        codes: torch.LongTensor,
        output_type: str = "pil",
        tokens: torch.LongTensor | None = None,
        known: torch.BoolTensor | None = None,
    ) -> list[str]:
        """Strings of codes (B, L); with `tokens` (B, T) in place of the decoded ones where they are `known` (B, T)."""
        decoded = self.vq.decode_codes(codes).argmax(-1)
        if tokens is not None:
            decoded = torch.where(known, tokens, decoded)
        return self.beside.batch_decode(decoded, skip_special_tokens=True)
