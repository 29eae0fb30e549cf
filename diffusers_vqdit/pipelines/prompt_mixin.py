"""Prompts of a pipeline over codes: which segment they are of, ready states in their place, and negative ones."""

from collections.abc import Mapping
from typing import Any

import torch

from ..models.layers import VQDiTPrefix
from ..tasks import Task
from ..utils.checks import shown
from .coding_mixin import CodingMixin
from .frozen_encoders import check_sequence_length
from .guided_prefix import GuidedPrefix
from .padded_states import PaddedStates, check_states_of
from .ready_codes import are_codes, check_codes_dtype, read_value
from .segment_base import TEXT, SegmentProcessor
from .states_segment import StatesSegment, TextStatesSegment


def text_states_of(segments: Mapping[str, SegmentProcessor]) -> list[str]:
    """The segments of states of texts."""
    return [name for name, one in segments.items() if isinstance(one, TextStatesSegment)]


def prompt_segment_of(segments: Mapping[str, SegmentProcessor]) -> str:
    """The segment that ``prompt`` is of: ``text`` where there is one, else the only one of states of texts."""
    states = text_states_of(segments)
    return states[0] if TEXT not in segments and len(states) == 1 else TEXT


class PromptMixin(CodingMixin):
    """The part of [`VQDiTPipeline`] that knows which segment a prompt is of."""

    # The pipeline's
    _encode_inputs: Any

    def _text_states(self) -> list[str]:
        return text_states_of(self._segments)

    def _prompt_segment(self) -> str:
        return prompt_segment_of(self._segments)

    def _prompts(
        self,
        passed: dict[str, Any],
        prompt_embeds: Any,
        prompt_attention_mask: Any,
        negative_prompt: Any,
        negative_prompt_embeds: Any,
        negative_prompt_attention_mask: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], str]:
        """What is passed by segment, with ready states; the negative of one of these segments, or nothing; and the
        argument that says it, or "".

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
                there = f"there are {states}" if states else "this checkpoint has none"
                raise ValueError(f"prompt_embeds is for a segment of a text encoder's states; {there}{also}")
            if states[0] in passed:
                raise ValueError("give prompt or prompt_embeds, not both: they say the same")
            passed = {**passed, states[0]: self._embeds("prompt", states[0], prompt_embeds, prompt_attention_mask)}
        given = {"negative_prompt": negative_prompt, "negative_prompt_embeds": negative_prompt_embeds}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return passed, {}, ""
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
        return passed, {found[0]: value}, argument

    def _embeds(self, prompt: str, name: str, value: Any, mask: Any) -> PaddedStates:
        channels = self._segments[name].channels
        return check_states_of(f"{prompt}_embeds", value, channels, mask, f"{prompt}_attention_mask")

    def _read_negative(
        self, task: Task, passed: dict[str, list], negative: dict[str, Any], argument: str
    ) -> dict[str, list]:
        """The negative prompts, which `argument` says, as many as what they stand for.

        Raises:
            ValueError: naming the argument.
        """
        found = {}
        for name, value in negative.items():
            if name not in task.given:
                raise ValueError(f"{argument} is for a prompt that is given; the task {str(task)!r} makes {name!r}")
            segment = self._segments[name]
            if not are_codes(segment, value) and needs_encoder(segment, value):  # the prompt's may be ready
                self._check_components(name, f"{argument}={shown(value)}")
            check_codes_dtype(segment, argument, value)
            segment.check_whole(argument, value)
            try:
                values = (
                    read_value(segment, value, False) if are_codes(segment, value) else segment.read_negative(value)
                )
            except ValueError as error:
                raise ValueError(f"{argument}={shown(value)}: {error}") from error
            if len(values) not in (1, len(passed[name])):
                raise ValueError(
                    f"{argument} has {len(values)} texts, but prompt {len(passed[name])}: give one, or as many"
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
        other = self._encode_inputs(task, given, None, None, repeats, shapes, negative=negative)[0]
        return GuidedPrefix(**vars(prefix), negative=other)

    def _sequence_shapes(
        self, passed: dict[str, list], negative: dict[str, list], max_sequence_length: int | None
    ) -> dict[str, tuple[int, ...]]:
        """The shapes that ``max_sequence_length`` gives to states of texts that are passed, negative ones too.

        Raises:
            ValueError: if there is none, or their encoder takes fewer tokens.
        """
        if max_sequence_length is None:
            return {}
        segments = self._segments
        read = [name for side in (passed, negative) for name in side if not isinstance(side[name][0], PaddedStates)]
        found = [name for name in self._text_states() if name in read]
        if not found:
            raise ValueError(
                f"max_sequence_length={max_sequence_length} is for texts that a text encoder reads; none was passed"
            )
        return {
            name: (check_sequence_length(max_sequence_length, segments[name].vq, segments[name].beside),)
            for name in found
        }


def needs_encoder(segment: SegmentProcessor, value: Any) -> bool:
    """Whether something passed is a value, and not the states that are made of it."""
    ready = isinstance(segment, StatesSegment) and isinstance(value, PaddedStates)
    return not (ready or isinstance(segment, TextStatesSegment) and isinstance(value, torch.Tensor))
