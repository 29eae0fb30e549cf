"""What the masked diffusion scheduler gives out."""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput


@dataclass
class MaskedDiffusionSchedulerOutput(BaseOutput):
    """Output of [`MaskedDiffusionScheduler.step`].

    Args:
        prev_sample (`torch.LongTensor` of shape `(B, N)`): codes at the next, smaller time; K where still masked.
        pred_original_sample (`torch.LongTensor` of shape `(B, N)`): codes with every masked one drawn.
    """

    prev_sample: torch.LongTensor
    pred_original_sample: torch.LongTensor


@dataclass
class MaskedDiffusionEvent:
    """Output of [`MaskedDiffusionScheduler.next_event`]: what the model is needed for next.

    Args:
        timesteps (`torch.FloatTensor` of shape `(B,)`): the time of each row, for the model.
        needs_model (`bool`): whether [`~MaskedDiffusionScheduler.step`] needs the model at all.
        revealed (`torch.BoolTensor` of shape `(B, N)`): codes that are to be revealed, for `step`; None where the
            sampler chooses them by the model's output.
        steps_left (`torch.LongTensor` of shape `(B,)`): steps of each row after this one.
        num_masked (`torch.LongTensor` of shape `(B,)`): masked codes of each row, on the CPU.
        rows (`torch.LongTensor` of shape `(R,)`): the rows that need the model, on the CPU: those with masks, unless
            the scheduler remasks.
    """

    timesteps: torch.Tensor
    needs_model: bool
    revealed: torch.Tensor | None
    steps_left: torch.LongTensor
    num_masked: torch.LongTensor
    rows: torch.LongTensor
