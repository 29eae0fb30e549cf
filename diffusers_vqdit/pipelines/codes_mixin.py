"""Pictures, texts and labels to codes and back."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import logging

from ..utils.checks import shown
from ..utils.images import (
    back_project,
    cut_out,
    fill_with_surroundings,
    fit_images,
    join_tiles,
    own_size,
    read_images,
    read_mask,
    resize,
    resize_pixels,
    split_tiles,
    touched_patches,
)
from ..utils.texts import check_texts, tokenize_to_length
from .check_inputs import check_labels


logger = logging.get_logger(__name__)


@dataclass
class PictureSource:
    """The picture that a generated one is made from.

    Args:
        pixels: (B, C, H, W) in [0, 1].
        mask: (B, 1, H, W), ones where to repaint; None for a picture to enlarge or to repair.
        tiles: how many tiles each picture was cut into, to enlarge it; None otherwise.
    """

    pixels: torch.Tensor
    mask: torch.Tensor | None = None
    tiles: int | None = None


class CodesMixin:
    """The part of [`VQDiTPipeline`] that encodes what is given and decodes what is generated."""

    def _tokenize(self, prompt: list[str]) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Token ids and attention mask (B, T) of texts; what is too long is cut off, with a warning."""
        prompt, length = check_texts("prompt", prompt), self.text_vq.config.max_length
        ids, mask, counts = tokenize_to_length(self.tokenizer, prompt, length)
        for text, count in zip(prompt, counts, strict=True):
            if not count:
                raise ValueError(f"prompt {shown(text)} has nothing to read")
            if count > length:
                logger.warning(f"prompt {text!r} has {count} tokens; only the first {length} are used")
        return ids.to(self._execution_device), mask.to(self._execution_device)

    def encode_prompt(self, prompt: list[str]) -> torch.LongTensor:
        """Codes (B, L) of texts; what is longer than the text tokenizer's length is cut off, with a warning."""
        return self.text_vq.encode_codes(*self._tokenize(prompt))

    def _infill(self, prompt: list[str], segment: str) -> tuple[torch.LongTensor, torch.LongTensor, torch.BoolTensor]:
        """What texts with blanks tell of a generated text.

        Each ``<mask>`` is one token, and takes the place of the space before it. A code is known where the blanks
        leave it the same whatever stands in them.

        Returns:
            codes (B, L) with the segment's vocabulary size where unknown, token ids (B, T), and which tokens are
            known (B, T).
        """
        blank, pad = self.tokenizer.mask_token_id, self.tokenizer.pad_token_id
        closed = [re.sub(rf"\s*{re.escape(self.tokenizer.mask_token)}", self.tokenizer.mask_token, t) for t in prompt]
        tokens, attention_mask = self._tokenize(closed)
        known = tokens != blank
        filled = [
            self.text_vq.encode_codes(torch.where(known, tokens, token), attention_mask) for token in (pad, blank)
        ]
        per_code = filled[0].shape[1] * self.text_vq.config.downsample_factor // known.shape[1]
        touched = (~known).unflatten(1, (-1, self.text_vq.config.downsample_factor)).any(-1)
        touched = touched.repeat_interleave(per_code, dim=1) | (filled[0] != filled[1])
        size = self.transformer.config.segments[segment]["vocab_size"]
        return filled[0].masked_fill(touched, size), tokens, known

    def _has_blank(self, prompt: Any) -> bool:
        """Whether a text asks to be filled in."""
        mask = getattr(self.tokenizer, "mask_token", None)
        texts = prompt if isinstance(prompt, list) else [prompt]
        return mask is not None and any(isinstance(text, str) and mask in text for text in texts)

    def _own_size(self, image: PipelineImageInput) -> torch.Tensor:
        """Pictures at their own size, (B, C, H, W) in [0, 1]; all must have one size."""
        return own_size(read_images(image, self.image_vq.config.in_channels)).to(self._execution_device)

    def _resolution(self, segment: str) -> tuple[int, int]:
        """Height and width in pixels of a segment's pictures."""
        height, width = self.transformer.config.segments[segment]["shape"]
        return height * self.image_vq.downsample_factor, width * self.image_vq.downsample_factor

    def encode_image(self, image: PipelineImageInput, segment: str = "image") -> torch.LongTensor:
        """Codes (B, h, w) of pictures, resized to the size that the model was trained for, without distortion.

        What isn't of their aspect ratio is cropped or padded as the training did, by ``resize_mode`` of the config.
        """
        images = read_images(image, self.image_vq.config.in_channels)
        pixels = fit_images(images, self._resolution(segment), self.config.resize_mode)  # (B, C, H, W) in [0, 1]
        return self.image_vq.encode_codes((2.0 * pixels - 1.0).to(self._execution_device))

    def _encode_lowres(self, image: PipelineImageInput) -> tuple[torch.LongTensor, PictureSource]:
        """Codes (B * T, h, w) of small pictures in T tiles each, and the pictures."""
        pixels = self._own_size(image)
        height, width = self._resolution("image_lowres")
        factor = self.config.lowres_factor
        tiles = split_tiles(2.0 * pixels - 1.0, (height // factor, width // factor))
        codes = self.image_vq.encode_codes(resize(tiles, (height, width)))
        return codes, PictureSource(pixels, tiles=len(tiles) // len(pixels))

    def _encode_holes(
        self, image: PipelineImageInput, mask_image: PipelineImageInput
    ) -> tuple[torch.LongTensor, PictureSource]:
        """Codes (B, h, w) of pictures, unknown where the mask touches them, and the pictures with their masks.

        A picture of another aspect ratio than the grid's is fitted in whole, and white around it is known.

        Two fillings of the holes are encoded, a smooth and a grey one: a code that tells them apart is one of the
        hole's too.
        """
        pixels = self._own_size(image)
        mask = read_mask(mask_image, tuple(pixels.shape[-2:]), len(pixels)).to(pixels)
        size, segment = self._resolution("image"), self.transformer.config.segments["image"]
        smooth = fill_with_surroundings(2.0 * pixels - 1.0, mask)
        codes, other = (
            self.image_vq.encode_codes(resize_pixels(filled, size))
            for filled in (smooth, smooth.masked_fill(mask > 0, 0.0))
        )
        unknown = touched_patches(mask, size, tuple(segment["shape"])) | (codes != other)
        return codes.masked_fill(unknown, segment["vocab_size"]), PictureSource(pixels, mask)

    def encode_label(self, class_label: list[int | str]) -> torch.LongTensor:
        """Codes (B, 1) of labels, given by number or by name."""
        codes = check_labels("class_label", class_label, self._label_numbers(), self._num_labels())
        return torch.tensor(codes, device=self._execution_device)[:, None]

    def _num_labels(self) -> int:
        return self.transformer.config.segments["label"]["vocab_size"]

    def _label_numbers(self) -> dict[str, int]:
        """The codes of the labels' names; of equal names the first."""
        return {name: code for code, name in reversed(list(enumerate(self.config.labels)))}

    def _modality(self, segment: str) -> str:
        """What a segment holds: ``"image"``, ``"text"`` or ``"label"``."""
        if segment == "label":
            return "label"
        return "image" if len(self.transformer.config.segments[segment]["shape"]) == 2 else "text"

    def _encode(self, passed: dict[str, Any]) -> dict[str, torch.LongTensor]:
        """Codes of what was passed, by segment."""
        codes = {}
        for name, value in passed.items():
            modality = self._modality(name)
            if modality == "image":
                codes[name] = (
                    self._encode_lowres(value)[0] if name == "image_lowres" else self.encode_image(value, name)
                )
            else:
                encode = self.encode_prompt if modality == "text" else self.encode_label
                codes[name] = encode(value if isinstance(value, list) else [value])
        return codes

    # -----------------------------------------------------------------------------------------------------------------
    # What is generated

    def decode_image(self, codes: torch.LongTensor, output_type: str = "pil") -> Any:
        """Pictures of codes (B, h, w), as ``"pil"``, ``"np"`` or ``"pt"``."""
        return self.image_processor.postprocess(self.image_vq.decode_codes(codes).sample, output_type=output_type)

    def _finish(self, codes: torch.LongTensor, source: PictureSource, repeats: int, output_type: str) -> Any:
        """Pictures of codes (B, h, w) that were made from others: pasted into them, or joined from tiles."""
        drawn = self.image_vq.decode_codes(codes).sample.float()
        pixels = source.pixels.repeat_interleave(repeats, dim=0)
        size = tuple(pixels.shape[-2:])
        if source.mask is None:
            enlarged = join_tiles(drawn, size, self.config.lowres_factor)
            return self.image_processor.postprocess(back_project(enlarged, 2.0 * pixels - 1.0), output_type)
        repainted = cut_out(drawn, size) / 2 + 0.5
        mask = source.mask.repeat_interleave(repeats, dim=0) > 0
        return self.pixel_processor.postprocess(torch.where(mask, repainted, pixels), output_type)

    def decode_text(
        self, codes: torch.LongTensor, tokens: torch.LongTensor | None = None, known: torch.BoolTensor | None = None
    ) -> list[str]:
        """Strings of codes (B, L); with `tokens` (B, T) in place of the decoded ones where they are `known` (B, T)."""
        decoded = self.text_vq.decode_codes(codes).argmax(-1)
        if tokens is not None:
            decoded = torch.where(known, tokens, decoded)
        return self.tokenizer.batch_decode(decoded, skip_special_tokens=True)

    def decode_label(self, codes: torch.LongTensor) -> list[str]:
        """Names of label codes (B, 1); their numbers where the checkpoint has no names."""
        names = list(self.config.labels)
        return [names[code] if code < len(names) else str(code) for code in codes[:, 0].tolist()]
