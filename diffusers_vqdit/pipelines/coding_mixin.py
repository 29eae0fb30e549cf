"""Values of a pipeline's segments to codes, or to an encoder's states, and back."""

from abc import abstractmethod
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput

from .segment_base import IMAGE, LABEL, TEXT, SegmentProcessor


class CodingMixin:
    """The part of [`VQDiTPipeline`] that encodes and decodes by hand."""

    # The pipeline's
    @property
    @abstractmethod
    def _segments(self) -> dict[str, SegmentProcessor]: ...

    @abstractmethod
    def _prompt_segment(self) -> str: ...

    _tokenizing_components: Any

    def _segment(self, name: str) -> SegmentProcessor:
        segments = self._segments
        if name not in segments:
            raise ValueError(f"this checkpoint has no segment {name!r}; it has {sorted(segments)}")
        return segments[name]

    def _check_components(self, name: str, what: str) -> None:
        components = self._tokenizing_components
        for component in self._segment(name).needs:
            if components.get(component) is None:
                raise ValueError(f"{what} needs the component {component}, which is None")

    def _whole_segment(self, name: str) -> SegmentProcessor:
        """A segment with all that it needs to encode and decode.

        Raises:
            ValueError: if a component is missing.
        """
        self._check_components(name, f"to encode or decode {name!r}")
        return self._segment(name)

    @torch.no_grad()
    def encode_prompt(
        self, prompt: list[str], segment: str | None = None
    ) -> torch.LongTensor | tuple[torch.Tensor, torch.Tensor]:
        """Codes (B, L) of texts; what is longer than the text tokenizer's length is cut off, with a warning. Of a
        text encoder its states (B, n, channels) and their mask (B, n), which are ``prompt_embeds`` and
        ``prompt_attention_mask``, or those with ``negative_`` before them: an encoder takes empty texts, too. By
        default for the segment that ``prompt`` is of."""
        one = self._whole_segment(self._prompt_segment() if segment is None else segment)
        value = one.encode_given(one.read_negative(prompt))
        return value.codes if value.mask is None or not one.given_only else (value.codes, value.mask)

    def encode_image(self, image: PipelineImageInput, segment: str = IMAGE) -> torch.LongTensor:
        """Codes (B, h, w) of pictures, resized to the size that the model was trained for, without distortion; where
        there were several, the first.

        What isn't of their aspect ratio is cropped or padded as the training did, by ``resize_mode`` of the config.
        """
        return self._whole_segment(segment).encode(image)

    def encode_label(self, class_labels: list[int | str], segment: str = LABEL) -> torch.LongTensor:
        """Codes (B, 1) of labels, given by number or by name."""
        return self._whole_segment(segment).encode(class_labels)

    @torch.no_grad()
    def decode_image(self, codes: torch.LongTensor, output_type: str = "pil", segment: str = IMAGE) -> Any:
        """Pictures of codes (B, h, w), as ``"pil"``, ``"np"`` or ``"pt"``."""
        return self._whole_segment(segment).decode(codes, output_type)

    def decode_text(
        self,
        codes: torch.LongTensor,
        tokens: torch.LongTensor | None = None,
        known: torch.BoolTensor | None = None,
        segment: str = TEXT,
    ) -> list[str]:
        """Strings of codes (B, L); with `tokens` (B, T) in place of the decoded ones where they are `known` (B, T)."""
        texts: Any = self._whole_segment(segment)
        return texts.decode(codes, tokens=tokens, known=known)

    def decode_label(self, codes: torch.LongTensor, segment: str = LABEL) -> list[str]:
        """Names of label codes (B, 1); their numbers where the checkpoint has no names."""
        return self._whole_segment(segment).decode(codes)
