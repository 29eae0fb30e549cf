"""Prompts of a pipeline over codes: which segment they are of, ready states in their place, and negative ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..models.layers import VQDiTPrefix
from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..tasks import Task
from ..utils.checks import shown
from .coding_mixin import CodingMixin
from .frozen_encoders import check_sequence_length
from .segment_base import TEXT, EncodedValue, SegmentProcessor
from .states_segment import PaddedStates, StatesSegment, TextStatesSegment, check_states_of


@dataclass
class GuidedPrefix(VQDiTPrefix):
    """A prefix, and the one that takes the place of nothing in the other half of guidance.

    Args:
        negative: of as many samples.
    """

    negative: VQDiTPrefix | None = None

    def _map(self, function: Any) -> "GuidedPrefix":
        own = super()._map(function)
        negative = None if self.negative is None else self.negative._map(function)
        return GuidedPrefix(own.names, own.keys, own.values, own.mask, negative)


def predict_halves(
    transformer: VQDiTTransformer2DModel,
    codes: dict[str, torch.LongTensor],
    prefix: VQDiTPrefix | None,
    guided: bool,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Logits (B, N, K) by segment; of guidance (2B, N, K), those with the prefix first, and those without it, or with
    its negative, after them.

    A negative prefix has a pass of its own, of the same shape: equal prefixes so give equal logits, bit for bit.
    """
    negative = prefix.negative if guided and isinstance(prefix, GuidedPrefix) else None
    logits = transformer(codes, prefix=prefix, with_unconditional=guided and negative is None, **options).sample
    if negative is None:
        return logits
    other = transformer(codes, prefix=negative, **options).sample
    return {name: torch.cat([value, other[name]]) for name, value in logits.items()}


def encode_given(transformer: VQDiTTransformer2DModel, given: Mapping[str, EncodedValue]) -> VQDiTPrefix:
    """The prefix of given values, of which there are some: each has as many rows as the others, or a part of so many,
    each of which then stands for equally many next to one another."""
    size = max(len(value.codes) for value in given.values())
    codes = {n: v.codes.repeat_interleave(size // len(v.codes), dim=0) for n, v in given.items()}
    masks = {n: v.mask.repeat_interleave(size // len(v.mask), dim=0) for n, v in given.items() if v.mask is not None}
    return transformer.encode_prefix(codes, masks)


class PromptMixin(CodingMixin):
    """The part of [`VQDiTPipeline`] that knows which segment a prompt is of."""

    _encode_inputs: Any  # the pipeline's

    def _text_states(self) -> list[str]:
        """The segments of states of texts."""
        return [name for name, one in self._segments.items() if isinstance(one, TextStatesSegment)]

    def _prompt_segment(self) -> str:
        """The segment that ``prompt`` is of: ``text`` where there is one, else the only one of states of texts."""
        states = self._text_states()
        return states[0] if TEXT not in self._segments and len(states) == 1 else TEXT

    def _prompts(
        self,
        passed: dict[str, Any],
        prompt_embeds: Any,
        prompt_attention_mask: Any,
        negative_prompt: Any,
        negative_prompt_embeds: Any,
        negative_prompt_attention_mask: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is passed by segment, with ready states; and the negative of one of these segments, or nothing.

        Raises:
            ValueError: if two say the same, or there is no segment for it.
        """
        for name, value, mask in (
            ("prompt_embeds", prompt_embeds, prompt_attention_mask),
            ("negative_prompt_embeds", negative_prompt_embeds, negative_prompt_attention_mask),
        ):
            if value is None and mask is not None:
                raise ValueError(f"{name.replace('embeds', 'attention_mask')} needs {name}: it is the mask of these")
        states = self._text_states()
        if prompt_embeds is not None:
            if len(states) != 1:
                also = "; pass inputs={...} by name" if states else ""
                raise ValueError(f"prompt_embeds is for a segment of a text encoder's states; there is {states}{also}")
            if states[0] in passed:
                raise ValueError("give prompt or prompt_embeds, not both: they say the same")
            passed = {**passed, states[0]: self._embeds("prompt", states[0], prompt_embeds, prompt_attention_mask)}
        given = {"negative_prompt": negative_prompt, "negative_prompt_embeds": negative_prompt_embeds}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return passed, {}
        if len(given) > 1:
            raise ValueError("give negative_prompt or negative_prompt_embeds, not both: they say the same")
        ((argument, value),) = given.items()
        prompts = [self._prompt_segment()] if argument == "negative_prompt" else []
        found = [name for name in dict.fromkeys([*prompts, *states]) if name in passed]
        if not found or len(found) > 1 and found[0] not in prompts:
            raise ValueError(
                f"{argument} needs a prompt, in whose place it stands"
                + (f"; {found} were passed" if found else ", or prompt_embeds" if states else "")
            )
        if argument == "negative_prompt_embeds":
            value = self._embeds("negative_prompt", found[0], value, negative_prompt_attention_mask)
        return passed, {found[0]: value}

    def _embeds(self, prompt: str, name: str, value: Any, mask: Any) -> PaddedStates:
        channels = self._segments[name].channels
        return check_states_of(f"{prompt}_embeds", value, channels, mask, f"{prompt}_attention_mask")

    def _read_negative(self, task: Task, passed: dict[str, list], negative: dict[str, Any]) -> dict[str, list]:
        """The negative prompts, as many as what they stand for.

        Raises:
            ValueError: naming the argument.
        """
        found = {}
        for name, value in negative.items():
            if name not in task.given:
                raise ValueError(
                    f"negative_prompt is for a prompt that is given; the task {str(task)!r} makes {name!r}"
                )
            try:
                values = self._segments[name].read_negative(value)
            except ValueError as error:
                raise ValueError(f"negative_prompt={shown(value)}: {error}") from error
            if len(values) not in (1, len(passed[name])):
                raise ValueError(
                    f"negative_prompt has {len(values)} texts, but prompt {len(passed[name])}: give one, or as many"
                )
            found[name] = values * (len(passed[name]) // len(values))
        return found

    def _with_negative(
        self,
        prefix: VQDiTPrefix | None,
        task: Task,
        passed: dict[str, list],
        negative: dict[str, list],
        repeats: int,
        shapes: dict[str, tuple[int, ...]],
    ) -> VQDiTPrefix | None:
        """The prefix, and that of the same with the negative prompts in their place."""
        if prefix is None or not negative:
            return prefix
        given = {name: passed[name] for name in task.given} | negative
        other = self._encode_inputs(task, given, None, None, repeats, shapes)[0]
        return GuidedPrefix(**vars(prefix), negative=other)

    def _sequence_shapes(
        self, passed: Mapping[str, Any], max_sequence_length: int | None
    ) -> dict[str, tuple[int, ...]]:
        """The shapes that ``max_sequence_length`` gives to states of texts that are passed.

        Raises:
            ValueError: if there is none, or their encoder takes fewer tokens.
        """
        if max_sequence_length is None:
            return {}
        segments = self._segments
        found = [name for name in self._text_states() if name in passed]
        if not found:
            raise ValueError(
                f"max_sequence_length={max_sequence_length} is for texts that a text encoder reads; none was passed"
            )
        encoded = [name for name in found if not isinstance(passed[name][0], PaddedStates)]
        lengths = {
            name: check_sequence_length(max_sequence_length, segments[name].vq, segments[name].beside)
            for name in encoded
        }
        return {name: (length,) for name, length in lengths.items()}


def needs_encoder(segment: SegmentProcessor, value: Any) -> bool:
    """Whether something passed is a value, and not the states that are made of it."""
    ready = isinstance(segment, StatesSegment) and isinstance(value, PaddedStates)
    return not (ready or isinstance(segment, TextStatesSegment) and isinstance(value, torch.Tensor))
