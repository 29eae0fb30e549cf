"""Prompts of the pipeline over latents: texts, or ready states in their place, and negative ones."""

from typing import Any

import torch
from diffusers.utils import logging

from ..models.layers import VQDiTPrefix
from ..models.text_vq import TextVQModel
from ..utils.checks import shown
from ..utils.texts import check_counts, check_texts
from .frozen_encoders import check_sequence_length, encode_captions
from .padded_states import PaddedStates, check_states_of


logger = logging.get_logger(__name__)


class LatentPromptsMixin:
    """The part of [`VQDiTLatentPipeline`] that reads and encodes prompts."""

    # The pipeline's
    transformer: Any
    text_encoder: Any
    tokenizer: Any
    config: Any
    _execution_device: torch.device
    _repeated: Any

    @torch.no_grad()
    def encode_prompt(
        self, prompt: list[str], max_sequence_length: int | None = None
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """States (B, S, caption_channels) of texts and which of them count (B, S): ``prompt_embeds`` and
        ``prompt_attention_mask``.

        Raises:
            ValueError: if a text is empty, and the encoder is a [`TextVQModel`] or its tokenizer adds no tokens; or if
                the pipeline has no text encoder.
        """
        self._check_encoder(max_sequence_length)
        return self._encode_texts(check_texts("prompt", prompt, self._takes_empty_texts), max_sequence_length)

    def _encode_texts(
        self, texts: list[str], length: int | None, argument: str = "prompt"
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        length = self.length_of_texts(length)
        states, mask, counts = encode_captions(
            self.text_encoder, self.tokenizer, texts, length, self._execution_device
        )
        if warning := check_counts(argument, texts, counts, length):
            logger.warning(warning)
        return states, mask

    def _encode_caption(
        self, value: list[str] | PaddedStates | None, total: int, max_sequence_length: int | None, argument: str
    ) -> VQDiTPrefix | None:
        """Texts, or their states, as a prefix of `total` samples; None where there are none."""
        if value is None:
            return None
        if not isinstance(value, PaddedStates):
            value = PaddedStates(*self._encode_texts(value, max_sequence_length, argument))
        mask = None if value.mask is None else self._repeated(value.mask, total)
        return self.transformer.encode_caption(self._repeated(value.states, total), mask)

    def _check_encoder(self, max_sequence_length: int | None = None) -> None:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("prompt needs a text_encoder and a tokenizer, which this pipeline doesn't have")
        self.length_of_texts(max_sequence_length)

    @property
    def _takes_empty_texts(self) -> bool:
        """An empty text, usual as a negative prompt, has the states of the tokens that a tokenizer adds."""
        return not isinstance(self.text_encoder, TextVQModel)

    def length_of_texts(self, max_sequence_length: int | None) -> int:
        """Tokens of a text for the text encoder, at most."""
        if not isinstance(self.text_encoder, TextVQModel):
            if max_sequence_length is None:
                return self.config.max_sequence_length
            return check_sequence_length(max_sequence_length, self.text_encoder, self.tokenizer)
        length = self.text_encoder.config.max_length
        if max_sequence_length not in (None, length):
            raise ValueError(f"max_sequence_length={shown(max_sequence_length)} must be its TextVQModel's, {length}")
        return length

    def _read_prompts(
        self, texts: dict[str, Any], embeds: dict[str, Any], masks: dict[str, Any], max_sequence_length: int | None
    ) -> list[list[str] | PaddedStates | None]:
        """A prompt and a negative one for it, by these names: as texts or as ready states, or None.

        Raises:
            ValueError: naming the argument.
        """
        found: list[list[str] | PaddedStates | None] = []
        for name, text in texts.items():
            value, mask = embeds[name], masks[name]
            if value is None and mask is not None:
                raise ValueError(f"{name}_attention_mask needs {name}_embeds: it is the mask of these")
            if value is not None and text is not None:
                raise ValueError(f"give {name} or {name}_embeds, not both: they say the same")
            channels = self.transformer.config.get("caption_channels")
            if channels is None and not (value is None and text is None):
                argument = name if value is None else f"{name}_embeds"
                raise ValueError(f"{argument} needs a transformer with caption_channels; this one has none")
            if value is not None:
                found.append(check_states_of(f"{name}_embeds", value, channels, mask, f"{name}_attention_mask"))
            elif text is not None:
                self._check_encoder(max_sequence_length)
                found.append(check_texts(name, text, name == "negative_prompt" and self._takes_empty_texts))
            else:
                found.append(None)
        prompt, negative = found
        argument = "negative_prompt" if isinstance(negative, list) else "negative_prompt_embeds"
        if negative is not None and prompt is None:
            raise ValueError(f"{argument} needs a prompt, in whose place it stands")
        if negative is not None and prompt is not None and len(negative) not in (1, len(prompt)):
            raise ValueError(f"{argument} has {len(negative)} texts, but prompt {len(prompt)}: give one, or as many")
        if max_sequence_length is not None and not any(isinstance(one, list) for one in found):
            raise ValueError(f"max_sequence_length={shown(max_sequence_length)} is for texts; none was passed")
        return found
