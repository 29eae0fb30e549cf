"""States of frozen encoders as segments, which are given and never generated: of texts, and of pictures."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import logging

from ..utils.decoding import as_picture_column, decode_image, place, to_bytes
from ..utils.fingerprints import tensor_sha256
from ..utils.images import fit_images, read_images
from ..utils.texts import check_captions, check_counts, check_texts, cut_texts, texts_of
from .frozen_encoders import (
    check_sequence_length,
    encode_images_to_states,
    encode_texts_to_states,
    load_image_encoder,
    load_text_encoder,
    pixel_size,
    state_channels,
)
from .padded_states import PaddedStates, check_states_of, join_states, to_halves
from .segment_base import ColumnReader, EncodedValue, SegmentProcessor


_states_logger = logging.get_logger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Columns of a dataset


class StatesReader(ColumnReader):
    """A column that an encoder makes states of, in half precision. Each row has a list of variants (n, channels)."""

    def __init__(self, dataset: Any, column: str, tokenizer: Any = None, beside: Any = None, **options: Any) -> None:
        super().__init__(dataset, column, tokenizer, beside)
        self.state_channels = state_channels(tokenizer)


class TextStatesReader(StatesReader):
    """A column of texts, or of lists of them. Takes ``"max_sequence_length"``."""

    def __init__(
        self,
        dataset: Any,
        column: str,
        tokenizer: Any = None,
        beside: Any = None,
        *,
        max_sequence_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, column, tokenizer, beside)
        self.length = check_sequence_length(max_sequence_length, tokenizer, beside)
        self.shape = [self.length]
        check_captions(self.values(), column)
        texts = (text for value in self.values() for text in texts_of(value))
        warning = cut_texts(texts, beside, self.length, "max_sequence_length")
        self.notes = [f"column {column!r}: {warning}"] if warning else []

    def read(self, row: int) -> list[str]:
        return texts_of(self.dataset[row][self.column])

    def digest(self, values: list) -> bytes:
        return json.dumps([self.column, values]).encode()

    def encode(self, values: list, batch_size: int) -> list[Any]:
        texts, parts = [text for row in values for text in row], []
        for start in range(0, len(texts), batch_size):
            states, mask, _ = encode_texts_to_states(
                self.tokenizer, self.beside, texts[start : start + batch_size], self.length, self.tokenizer.device
            )
            parts += [
                one[:count] for one, count in zip(to_halves(states, self.column), mask.sum(1).tolist(), strict=True)
            ]
        found = iter(parts)
        return [[next(found) for _ in row] for row in values]


class ImageStatesReader(StatesReader):
    """A column of pictures. Takes ``"resize_mode"`` and ``"interpolation"``."""

    feature = "Image"

    def __init__(
        self,
        dataset: Any,
        column: str,
        tokenizer: Any = None,
        beside: Any = None,
        *,
        resize_mode: str = "crop",
        interpolation: str = "lanczos",
        **options: Any,
    ) -> None:
        super().__init__(dataset, column, tokenizer, beside)
        self.size, self.resize_mode = pixel_size(tokenizer, beside), resize_mode
        self.interpolation = interpolation
        blank = torch.zeros(1, 3, *self.size)
        self.shape = [encode_images_to_states(tokenizer, beside, blank, tokenizer.device).shape[1]]

    @classmethod
    def cast(cls, dataset: Any, column: str) -> Any:
        return as_picture_column(dataset, column)

    @property
    def reads(self) -> tuple:
        return (*super().reads, *self.size, self.resize_mode, self.interpolation)

    def read(self, row: int) -> torch.Tensor:
        """uint8 (3, height, width)."""
        value = self.dataset[row][self.column]
        return to_bytes(decode_image(value, self.size, self.resize_mode, interpolation=self.interpolation))

    def placed(self, row: int) -> str:
        return place(self.dataset[row][self.column], row)

    def digest(self, values: list) -> bytes:
        return tensor_sha256(torch.stack(values)).encode()

    def encode(self, values: list, batch_size: int) -> list[Any]:
        found = []
        for start in range(0, len(values), batch_size):
            pixels = torch.stack(values[start : start + batch_size]).float() / 255
            states = encode_images_to_states(self.tokenizer, self.beside, pixels, self.tokenizer.device)
            found += [[one] for one in to_halves(states, self.column)]
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Pipelines


class StatesSegment(SegmentProcessor):
    """States of an encoder; ``shape`` is about how many. Values may be such states themselves: [`PaddedStates`]."""

    given_only = True
    ndims = (1,)

    def read(self, value: Any) -> list:
        if isinstance(value, PaddedStates):
            return check_states_of(self.argument, value.states, self.channels, value.mask).rows()
        if isinstance(value, list) and value and isinstance(value[0], PaddedStates):  # read already
            return value
        return self.read_values(value)

    @abstractmethod
    def read_values(self, value: Any) -> list:
        """What the encoder takes, checked."""

    @abstractmethod
    def states_of(self, values: list) -> PaddedStates:
        """What the encoder makes of it."""

    def encode(self, values: Any) -> torch.Tensor:
        """States (B, n, channels)."""
        return self.encode_given(self.read(values)).codes

    def encode_given(self, values: list) -> EncodedValue:
        ready = isinstance(values[0], PaddedStates)
        found = join_states(values) if ready else self.states_of(values)
        found = found.to(self.device())
        return EncodedValue(found.states, mask=found.mask)

    def decode(self, codes: torch.Tensor, output_type: str = "pil") -> Any:
        raise ValueError(f"{self.name!r} has states of an encoder, which are given, never generated")


class TextStatesSegment(StatesSegment):
    """States of texts by a text encoder, with their mask; ``shape`` is how many tokens are read at most. Values may be
    a tensor (B, n, channels) of such states, too."""

    tokenizer = "text_encoder"
    named_beside = "tokenizer_2"
    reader = TextStatesReader
    noun = "text"
    given_field = "texts"

    @classmethod
    def load_tokenizer(cls, name: str, *, cache_dir: str | None = None, **options: Any) -> tuple[Any, Any]:
        return load_text_encoder(name, cache_dir)

    @classmethod
    def known_options(cls, entry: Mapping[str, Any], geometry: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        return {"max_sequence_length": geometry["shape"][0]}

    def read_values(self, value: Any) -> list:
        if isinstance(value, torch.Tensor):
            return check_states_of(self.argument, value, self.channels).rows()
        return check_texts(self.argument, value)

    def read_negative(self, value: Any) -> list:
        # An empty one is usual: it has the states of the tokens that a tokenizer adds.
        ready = isinstance(value, torch.Tensor | PaddedStates)
        return self.read(value) if ready else check_texts(self.argument, value, empty=True)

    def states_of(self, values: list) -> PaddedStates:
        """As they are read; what is too long is cut off, with a warning."""
        states, mask, counts = encode_texts_to_states(self.vq, self.beside, values, self.shape[0], self.device())
        if warning := check_counts(self.argument, values, counts, self.shape[0]):
            _states_logger.warning(warning)
        return PaddedStates(states, mask)


class ImageStatesSegment(StatesSegment):
    """States of pictures by a vision encoder, which sees them without distortion: cropped or padded by `resize_mode`,
    of the size that its feature extractor says."""

    tokenizer = "image_encoder"
    named_beside = "feature_extractor"
    reader = ImageStatesReader
    noun = "picture"
    given_field = "images"

    @classmethod
    def load_tokenizer(cls, name: str, *, cache_dir: str | None = None, **options: Any) -> tuple[Any, Any]:
        return load_image_encoder(name, cache_dir)

    def read_values(self, value: Any) -> list:
        try:
            return read_images(value, 3)
        except ValueError as error:
            raise ValueError(f"{self.argument}: {error}") from error

    def states_of(self, values: list) -> PaddedStates:
        pixels = fit_images(values, pixel_size(self.vq, self.beside), self.resize_mode)  # (B, 3, H, W) in [0, 1]
        return PaddedStates(encode_images_to_states(self.vq, self.beside, pixels, self.device()))
