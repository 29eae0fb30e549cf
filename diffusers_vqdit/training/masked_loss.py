"""Masked diffusion over codes: the draws of a training step, and its loss."""

from typing import Any

import torch
import torch.nn.functional as F

from ..tasks import Task
from ..utils.checks import check_choice
from ..utils.distributed import mean_over_processes
from .optimization import unwrap
from .state_files import split_padded


def draw_task(tasks: list[tuple[Task, float]], generator: torch.Generator) -> Task:
    """One task, drawn by weight."""
    weights = torch.tensor([weight for _, weight in tasks], dtype=torch.float64)
    return tasks[int(torch.multinomial(weights, 1, generator=generator))][0]


def stratified_timesteps(
    batch_size: int, generator: torch.Generator | None = None, *, rank: int = 0, world_size: int = 1
) -> torch.Tensor:
    """Times (B,) in (0, 1], one in each of as many equal intervals as the global batch has rows, in random order:
    uniform, with less variance (Kingma et al. 2021, appendix I.1).

    Args:
        batch_size: rows B of each process.
        generator: the same on all processes, as [`step_generator`] is; on the CPU.
        rank, world_size: the part of the global batch's times to take.
    """
    count = batch_size * world_size
    offset = torch.rand(count, generator=generator)
    times = (torch.randperm(count, generator=generator) + 1.0 - offset) / count
    return times[rank * batch_size : (rank + 1) * batch_size]


def masked_diffusion_loss(
    transformer: torch.nn.Module,
    scheduler,
    given: dict[str, Any],
    generated: dict[str, torch.Tensor],
    *,
    weighting: str = "flat",
    timesteps: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Cross-entropy at the masked codes of one batch of one task.

    Args:
        transformer: a `VQDiTTransformer2DModel` with segments, possibly wrapped.
        scheduler: the `MaskedDiffusionScheduler` that masks.
        given, generated: name -> (B, *shape) int64 codes; of what is given also the [`PaddedStates`] of an encoder.
        weighting: ``"nelbo"`` weighs each row by -alpha'(t) / (1 - alpha(t)), so that the mean is the exact bound in
            nats per generated code (Sahoo et al. 2024, eq. 10); ``"flat"`` takes the mean over
            the masked codes (MaskGIT).
        timesteps: times (B,) in (0, 1] on the CPU; by default [`stratified_timesteps`] of this batch.
        generator: draws the masks, and the times where they are not given; one, or one a row, on the CPU.

    Returns:
        the loss, a scalar. With several processes all must call this together, and the mean of their losses, as of
        their gradients, is that of the global batch: each counts by its share of the masked codes.
    """
    check_choice("weighting", weighting, ("flat", "nelbo"))
    device, batch_size = next((codes.device, len(codes)) for codes in generated.values())
    if timesteps is None:
        if isinstance(generator, list):
            raise ValueError("generator is a list of one a row, which can't draw stratified times: give timesteps")
        timesteps = stratified_timesteps(batch_size, generator)
    segments = unwrap(transformer).config.segments
    vocab_sizes = {name: segments[name]["vocab_size"] for name in generated}
    noised, masked = {}, {}
    for name, codes in generated.items():
        corrupted = scheduler.add_noise(
            codes.flatten(1), timesteps, mask_token_id=vocab_sizes[name], generator=generator
        )
        masked[name] = corrupted == vocab_sizes[name]
        noised[name] = corrupted.view_as(codes)
    timesteps = timesteps.to(device)
    given, padding = split_padded(given)
    logits = transformer(noised, timestep=timesteps, given=given, given_mask=padding or None, masked=masked).sample
    weights = scheduler.loss_weight(timesteps)  # (B,)
    total, count = 0.0, 0
    for name, codes in generated.items():
        hidden = masked[name]
        error = F.cross_entropy(logits[name].float(), codes.flatten(1)[hidden], reduction="none")  # (M,)
        if weighting == "nelbo":
            error = error * weights[:, None].expand_as(hidden)[hidden]
            count += hidden.numel()
        else:
            count += error.numel()
        total = total + error.sum()
    # Where nothing is masked at all, the loss is 0.
    return total / mean_over_processes(torch.tensor(float(count), device=device)).clamp_min(1e-6)
