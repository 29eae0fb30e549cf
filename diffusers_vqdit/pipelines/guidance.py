"""Classifier-free guidance of what is given, all at once or each segment on its own: which prefixes it needs, and how
their logits are joined."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ..likelihood.bounds import are_possible
from ..models.layers import VQDiTPrefix
from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..schedulers.scheduling_masked_diffusion import MaskedDiffusionEvent, MaskedDiffusionScheduler
from ..tasks import Task
from ..utils.checks import check_number, shown
from .guided_prefix import GuidedPrefix
from .segment_base import EncodedValue, SegmentProcessor


# One scale of all that is given, or one a segment, in the order in which guidance adds them.
Scales: TypeAlias = float | dict[str, float]


def encode_given(
    transformer: VQDiTTransformer2DModel, given: Mapping[str, EncodedValue], parts: Iterable[tuple[str, ...]] = ()
) -> VQDiTPrefix:
    """The prefix of given values, of which there are some, with those of `parts` of them.

    Each value has as many rows as the others, or a part of so many, each of which then stands for equally many next
    to one another.
    """
    size = max(len(value.codes) for value in given.values())
    codes = {n: v.codes.repeat_interleave(size // len(v.codes), dim=0) for n, v in given.items()}
    masks = {n: v.mask.repeat_interleave(size // len(v.mask), dim=0) for n, v in given.items() if v.mask is not None}

    def encoded(names: Iterable[str]) -> VQDiTPrefix:
        return transformer.encode_prefix({n: codes[n] for n in names}, {n: masks[n] for n in names if n in masks})

    prefix = encoded(codes)
    found = {names: encoded(names) for names in parts}
    return GuidedPrefix(**vars(prefix), parts=found) if found else prefix


# ---------------------------------------------------------------------------------------------------------------------
# Scales


def check_scales(guidance_scale: Any, image_guidance_scale: Any) -> None:
    """Raise a ValueError unless the scales of a call are finite numbers, or a dict of them, or None."""
    if isinstance(guidance_scale, dict):
        for name, scale in guidance_scale.items():
            check_number(f"guidance_scale[{name!r}]", scale)
        if image_guidance_scale is not None:
            raise ValueError(
                f"guidance_scale={shown(guidance_scale)} and image_guidance_scale={shown(image_guidance_scale)} both "
                "say the scales of segments; give one of them"
            )
    elif guidance_scale is not None:
        check_number("guidance_scale", guidance_scale)
    if image_guidance_scale is not None:
        check_number("image_guidance_scale", image_guidance_scale)


def _given_pictures(task: Task, segments: Mapping[str, SegmentProcessor]) -> list[str]:
    return [n for n in task.given if segments[n].kind == "images"]


def check_scales_are_used(
    task: Task, guidance_scale: Any, image_guidance_scale: Any, segments: Mapping[str, SegmentProcessor]
) -> None:
    """Raise a ValueError if a call says both scales, and nothing but pictures is given."""
    if None not in (guidance_scale, image_guidance_scale) and task.given == tuple(_given_pictures(task, segments)):
        raise ValueError(
            f"guidance_scale={shown(guidance_scale)} is that of what is given beside pictures where there is an "
            f"image_guidance_scale, here {shown(image_guidance_scale)}; the task {str(task)!r} has pictures alone: "
            "give one of the two"
        )


def guidance_scales(
    task: Task, guidance_scale: Scales, image_guidance_scale: float | None, segments: Mapping[str, SegmentProcessor]
) -> Scales:
    """One scale of all that is given, or one a segment: pictures first, then the others, in the order of a dict.

    Raises:
        ValueError: if a scale is of a segment that isn't given, or a given one has none.
    """
    pictures = _given_pictures(task, segments)
    if isinstance(guidance_scale, dict):
        if set(guidance_scale) != set(task.given):
            raise ValueError(
                f"guidance_scale={shown(guidance_scale)} must have a scale of each given segment; these are "
                f"{list(task.given)}"
            )
        order = [*(n for n in guidance_scale if n in pictures), *(n for n in guidance_scale if n not in pictures)]
        return {name: float(guidance_scale[name]) for name in order}
    if image_guidance_scale is None:
        return guidance_scale
    if not pictures:
        raise ValueError(
            f"image_guidance_scale={image_guidance_scale} needs a given picture, and the task {str(task)!r} has none"
        )
    scales = dict.fromkeys(pictures, float(image_guidance_scale))
    return scales | {name: float(guidance_scale) for name in task.given if name not in pictures}


def guidance_steps(given: Sequence[str], scales: Scales) -> tuple[list[tuple[str, ...]], list[float]]:
    """The segments of each prefix that guidance needs, from the least to all, and the scale of each step to the next.

    Segments that stand next to one another with equal scales are one step, and what is taken away whole again has no
    prefix: with a first scale of 1 that is nothing.
    """
    each = scales if isinstance(scales, dict) else dict.fromkeys(given, scales)
    prefixes: list[tuple[str, ...]] = [()]
    steps: list[float] = []
    for name, scale in each.items():
        longer = (*prefixes[-1], name)
        if steps and steps[-1] == scale:
            prefixes[-1] = longer
        else:
            prefixes.append(longer)
            steps.append(scale)
    if steps and steps[0] == 1.0:
        return prefixes[1:], steps[1:]
    return prefixes, steps


def check_guidance(task: Task, scales: Scales, known: Iterable[str], negative: str) -> None:
    """Raise a ValueError unless a checkpoint with the tasks `known` can be guided by these scales; `negative` is the
    argument that says what to be guided away from, or empty."""
    prefixes, _ = guidance_steps(task.given, scales)
    if not task.given and scales != 1.0:
        raise ValueError(f"guidance_scale={scales} needs a given segment; use 1")
    if negative and any(prefixes[:-1]):
        raise ValueError(f"{negative} with guidance_scale={scales}: it needs one scale of all that is given")
    tasks = {str(Task.parse(arrow)) for arrow in known}
    needed = [str(Task(names, task.generated)) for names in prefixes[:-1] if not negative]
    missing = [arrow for arrow in needed if arrow not in tasks]
    if not missing:
        return
    if isinstance(scales, dict):
        unknown = "which this checkpoint doesn't know"
        unknown = unknown if missing == needed else f"of {unknown} {missing}"
        raise ValueError(f"guidance_scale={scales} needs the tasks {needed}, {unknown}; it knows {sorted(tasks)}")
    raise ValueError(
        f"guidance_scale={scales} needs the task {missing[0]!r}, which this checkpoint doesn't know, or a "
        "negative_prompt; use 1"
    )


def scales_at(
    scheduler: MaskedDiffusionScheduler,
    steps: Sequence[float],
    event: MaskedDiffusionEvent,
    masked: torch.Tensor,
    *,
    leave_out: bool = True,
) -> list[torch.Tensor]:
    """The scales (B,) of steps where the codes `masked` (B, N) are left; with `leave_out` none where all rows have 1
    of each."""
    share = event.num_masked.double() / masked.shape[1]  # on the CPU
    if leave_out and all(bool((scheduler.guidance_scale_at(share, scale) == 1.0).all()) for scale in steps):
        return []
    ratio = masked.double().mean(1)
    return [scheduler.guidance_scale_at(ratio, scale) for scale in steps]


# ---------------------------------------------------------------------------------------------------------------------
# Logits


def predict_event(
    transformer: VQDiTTransformer2DModel,
    codes: dict[str, torch.LongTensor],
    event: MaskedDiffusionEvent,
    prefix: VQDiTPrefix | None,
    prefixes: Sequence[tuple[str, ...]],
    scales: Sequence[torch.Tensor],
    **options: Any,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """[`predict_guided`] for the rows that an event of the scheduler is about; the logits of rows that are done are
    0."""
    size, timesteps, rows = len(event.num_masked), event.timesteps, event.rows
    if len(rows) == size:
        return predict_guided(transformer, codes, prefix, prefixes, scales, timestep=timesteps, **options)
    rows = rows.to(timesteps.device)
    codes, scales = {name: value[rows] for name, value in codes.items()}, [scale[rows] for scale in scales]
    prefix = prefix if prefix is None else prefix.select(rows)
    logits, *finite = predict_guided(transformer, codes, prefix, prefixes, scales, timestep=timesteps[rows], **options)
    every = {n: v.new_zeros(size, *v.shape[1:]).index_copy(0, rows, v) for n, v in logits.items()}
    return every, finite[0], finite[1]


def predict_guided(
    transformer: VQDiTTransformer2DModel,
    codes: dict[str, torch.LongTensor],
    prefix: VQDiTPrefix | None,
    prefixes: Sequence[tuple[str, ...]],
    scales: Sequence[torch.Tensor],
    **options: Any,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Logits (B, N, K) by segment with guidance; whether they can be, and whether those can that they are joined from.

    What sees nothing shares the pass of what sees all. Every other prefix has a pass of its own, of the same shape:
    equal prefixes so give equal logits, bit for bit, and no attention mask is needed.

    Args:
        transformer: the model.
        codes: of the generated segments.
        prefix: of all that is given.
        prefixes: from [`guidance_steps`].
        scales: (B,), of each step; empty for no guidance.
        options: of the transformer's call.

    Raises:
        ValueError: for a prefix that `prefix` doesn't bring.
    """
    plain = {name: value for name, value in options.items() if name != "cache"}  # which is of one prefix
    brought = prefix if isinstance(prefix, GuidedPrefix) else GuidedPrefix((), [], [])
    fewer: list[dict[str, torch.Tensor]] = []
    alone = bool(scales) and not prefixes[0] and brought.negative is None
    logits = transformer(codes, prefix=prefix, with_unconditional=alone, **options).sample
    finite = are_possible(*logits.values())
    if not scales:
        return logits, finite, finite
    parts = [finite]
    if alone:
        halves = {name: value.chunk(2) for name, value in logits.items()}
        logits, nothing = ({name: both[i] for name, both in halves.items()} for i in range(2))
        fewer.append(nothing)
    for names in prefixes[alone:-1]:
        less = brought.parts.get(names) if names else brought.negative
        if less is None:
            raise ValueError(f"guidance_scale needs {list(names)} alone, which it didn't when the call began")
        fewer.append(transformer(codes, prefix=less, **plain).sample)
        parts.append(are_possible(*fewer[-1].values()))
    joined = {name: join_logits(value, [part[name] for part in fewer], scales) for name, value in logits.items()}
    return joined, are_possible(*joined.values()), torch.stack(parts).all()


def join_logits(full: torch.Tensor, fewer: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> torch.Tensor:
    """l_0 + s_1 (l_1 - l_0) + ... + s_n (l_n - l_(n-1)) (Brooks et al. 2023, eq. 3) of l_0, ..., l_(n-1) = `fewer` and
    l_n = `full`, all (B, N, K), with scales (B,). It is `full` exactly where all scales are 1."""
    steps = [scale.to(full)[:, None, None] for scale in scales]
    joined = torch.lerp(fewer[0], full, steps[0])
    for less, scale, following in zip(fewer[1:], steps, steps[1:], strict=False):
        joined = joined + (scale - following) * (less - full)
    return joined
