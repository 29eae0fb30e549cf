"""Masked diffusion over codes: the draws of a training step, and its loss."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ..schedulers.samplers import Generators, SharedGenerator, uniform
from ..tasks import Task
from ..utils.checks import check_choice
from ..utils.distributed import mean_over_processes
from .codes import CodeDataset
from .draws import step_generator
from .optimization import unwrap
from .state_files import PaddedStates, split_padded


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


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one task, on the device.

    Args:
        task: what is given and what is generated.
        given, generated: name -> codes (B, *shape) int64; of what is given also states.
        timesteps: times (B,) in (0, 1], on the CPU.
        generator: draws the masks, on the CPU.
    """

    task: Task
    given: dict[str, torch.Tensor | PaddedStates]
    generated: dict[str, torch.Tensor]
    timesteps: torch.Tensor
    generator: SharedGenerator


def draw_batch(
    codes: CodeDataset,
    tasks: list[tuple[Task, float]],
    rows: torch.LongTensor,
    accelerator: Accelerator,
    *,
    seed: int,
    step: int,
) -> Batch:
    """What is drawn for rows of a micro-step, as for the global batch, however many processes share it: one task, so
    that all train the same parameters, and each row's time, wording and masks."""
    rank, generator = accelerator.process_index, step_generator(seed, step)
    task = draw_task(tasks, generator)
    times = stratified_timesteps(len(rows), generator, rank=rank, world_size=accelerator.num_processes)
    shared = SharedGenerator(generator, rank, accelerator.num_processes)
    given, generated = codes.batch(rows, task, generator=shared)
    given, generated = (
        {name: value.to(accelerator.device) for name, value in side.items()} for side in (given, generated)
    )
    return Batch(task, given, generated, times, shared)


def track_loss(accelerator: Accelerator, losses: dict[str, float], task: Task, loss: torch.Tensor) -> float:
    """The mean of all processes' losses of a micro-batch, by which the running mean of its task in `losses` goes on,
    unless it is not finite."""
    average = accelerator.reduce(loss.detach(), "mean").item()
    if math.isfinite(average):
        losses[str(task)] = 0.95 * losses.get(str(task), average) + 0.05 * average
    return average


def block_timesteps(timesteps: torch.Tensor, blocks: int, generator: Generators = None) -> torch.Tensor:
    """Times (B, blocks) of each block: those of a row are its time and others at equal distances from it in (0, 1],
    where the ends meet, in random order. Each is as uniform as its row's.

    Args:
        timesteps: times (B,) in (0, 1].
        blocks: of a row.
        generator: draws the order; one, or one a row.
    """
    order = uniform(torch.Size([len(timesteps), blocks]), generator, timesteps.device).argsort(1)
    return 1.0 - (1.0 - timesteps[:, None] + order / blocks) % 1.0


def masked_diffusion_loss(
    transformer: torch.nn.Module,
    scheduler,
    given: dict[str, torch.Tensor | PaddedStates],
    generated: dict[str, torch.Tensor],
    *,
    weighting: str = "flat",
    timesteps: torch.Tensor | None = None,
    generator: Generators = None,
) -> torch.Tensor:
    """Cross-entropy at the masked codes of one batch of one task.

    Args:
        transformer: a `VQDiTTransformer2DModel` with segments, possibly wrapped.
        scheduler: the `MaskedDiffusionScheduler` that masks.
        given, generated: name -> (B, *shape) int64 codes; of what is given also the [`PaddedStates`] of an encoder.
            Of a generated segment with a ``block_length`` all blocks are trained at once, each with a time of its own
            ([`block_timesteps`]).
        weighting: ``"nelbo"`` weighs each row by -alpha'(t) / (1 - alpha(t)), so that the mean is the exact bound in
            nats per generated code (Sahoo et al. 2024, eq. 10); ``"flat"`` takes the mean over
            the masked codes (MaskGIT).
        timesteps: times (B,) in (0, 1] on the CPU; by default [`stratified_timesteps`] of this batch.
        generator: draws the masks, and the times where they are not given, which take a single one; on the CPU.

    Returns:
        the loss, a scalar. With several processes all must call this together, and the mean of their losses, as of
        their gradients, is that of the global batch: each counts by its share of the masked codes.
    """
    check_choice("weighting", weighting, ("flat", "nelbo"))
    device, batch_size = next((codes.device, len(codes)) for codes in generated.values())
    if timesteps is None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(
                f"generator is a {type(generator).__name__}, which can't draw stratified times: it must be a single "
                "torch.Generator, or give timesteps"
            )
        timesteps = stratified_timesteps(batch_size, generator)
    segments = unwrap(transformer).config.segments
    vocab_sizes = {name: segments[name]["vocab_size"] for name in generated}
    noised, masked = {}, {}
    options: dict[str, Any] = {}
    length = next((segments[name]["block_length"] for name in generated if "block_length" in segments[name]), None)
    if length is not None:
        (blocks,) = {codes.shape[1] // length for codes in generated.values()}  # of one segment
        timesteps, options = block_timesteps(timesteps, blocks, generator), {"clean": generated}  # (B, blocks)
        if isinstance(generator, list):
            generator = [one for one in generator for _ in range(blocks)]
    for name, codes in generated.items():
        # A row of noise is a row of codes, or a block.
        rows = codes.flatten(1) if length is None else codes.reshape(-1, length)
        corrupted = scheduler.add_noise(
            rows, timesteps.flatten(), mask_token_id=vocab_sizes[name], generator=generator
        )
        noised[name] = corrupted.view_as(codes)
        masked[name] = noised[name].flatten(1) == vocab_sizes[name]
    timesteps = timesteps.to(device)
    given, padding = split_padded(given)
    options |= {"given": given, "given_mask": padding or None, "masked": masked}
    logits = transformer(noised, timestep=timesteps, **options).sample
    weights = scheduler.loss_weight(timesteps).view(len(timesteps), -1)  # (B, 1 or blocks)
    total, count = 0.0, 0
    for name, codes in generated.items():
        hidden = masked[name]
        error = F.cross_entropy(logits[name].float(), codes.flatten(1)[hidden], reduction="none")  # (M,)
        if weighting == "nelbo":
            error = error * weights.repeat_interleave(hidden.shape[1] // weights.shape[1], dim=1)[hidden]
            count += hidden.numel()
        else:
            count += error.numel()
        total = total + error.sum()
    # Where nothing is masked at all, the loss is 0.
    return total / mean_over_processes(torch.tensor(float(count), device=device)).clamp_min(1e-6)
