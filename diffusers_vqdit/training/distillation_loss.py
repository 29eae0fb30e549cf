"""Self-distillation through time: a student learns from several steps of its teacher (Deschenaux & Gulcehre 2024).

A step of a sampler draws all codes that it reveals independently of one another, which is right only where these are
few. A teacher that takes several small steps sees what it has revealed so far; the student learns to predict in one
step what the teacher predicts on this way.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..likelihood.bounds import constant_modulation
from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..schedulers.samplers import Generators, draw, uniform
from ..schedulers.scheduling_masked_diffusion import MaskedDiffusionScheduler
from ..utils.checks import check_integer
from ..utils.distributed import mean_over_processes
from .optimization import unwrap
from .state_files import PaddedStates, split_padded


@torch.no_grad()
def teacher_probabilities(
    teacher: VQDiTTransformer2DModel,
    scheduler: MaskedDiffusionScheduler,
    given: Mapping[str, torch.Tensor | PaddedStates],
    noised: dict[str, torch.LongTensor],
    steps_left: torch.LongTensor,
    *,
    num_inference_steps: int,
    num_steps: int,
    guidance_scale: float = 1.0,
    temperature: float | None = None,
    generator: Generators = None,
) -> dict[str, torch.Tensor]:
    """What a teacher draws each masked code from on its way of several ancestral steps: where it reveals a code, the
    distribution at that step, and of the codes still masked at the end that of the last step (algorithm 2).

    Args:
        teacher: with segments.
        scheduler: its masking schedule, temperature and guidance schedule are the teacher's.
        given, noised: name -> (B, *shape) int64 codes, the generated ones K where masked.
        steps_left: the steps (B,) that each row has left of `num_inference_steps`, at least `num_steps`.
        num_steps: how many of them to take.
        guidance_scale: of classifier-free guidance, which needs something given; 1 is none.
        temperature: by default the scheduler's; at 0 a distribution is one code.
        generator: one, or one a row.

    Returns:
        name -> (M, K) float32 probabilities of the M masked codes, in the order of the rows.
    """
    temperature = scheduler.config.temperature if temperature is None else temperature
    sizes = {name: teacher.config.segments[name]["vocab_size"] for name in noised}
    device, steps_left = next(iter(noised.values())).device, steps_left.cpu()
    ratios = scheduler.mask_ratio(torch.arange(num_inference_steps + 1, dtype=torch.float64) / num_inference_steps)
    given, padding = split_padded(given)
    prefix = teacher.encode_prefix(given, padding) if given else None
    options = {"check_values": False, **constant_modulation(teacher, noised)}
    first = {name: codes.flatten(1) == sizes[name] for name, codes in noised.items()}  # (B, N)
    found: dict[str, torch.Tensor] = {}
    for step in range(num_steps):
        left = steps_left - step
        masked = {name: codes.flatten(1) == sizes[name] for name, codes in noised.items()}
        share = torch.cat(list(masked.values()), dim=1).double().mean(1)
        scale = scheduler.guidance_scale_at(share, guidance_scale)  # (B,)
        guided = prefix is not None and guidance_scale != 1.0
        logits = teacher(
            noised,
            timestep=(left / num_inference_steps).to(device),
            prefix=prefix,
            masked=masked,
            with_unconditional=guided,
            **options,
        ).sample  # (M, K), or (2M, K) with and without what is given
        revealed = (1.0 - ratios[left - 1] / ratios[left]).to(device)  # (B,), the probability
        for name, where in masked.items():
            scores = logits[name].float()
            if guided:
                own, free = scores.chunk(2)
                scores = torch.lerp(free, own, scale[:, None].expand_as(where)[where].to(free)[:, None])
            noise, chance = (uniform(where.shape, generator, device) for _ in range(2))
            codes, _, probabilities = draw(scores, noise[where], temperature)
            if temperature == 0:
                probabilities = F.one_hot(codes, sizes[name]).to(probabilities)
            if step == 0:
                found[name] = probabilities
            else:
                found[name][where[first[name]]] = probabilities
            drawn = noised[name].flatten(1).masked_scatter(where, codes)
            keep = where & (chance >= revealed[:, None])
            noised = noised | {name: drawn.masked_fill(keep, sizes[name]).view_as(noised[name])}
    return found


def distillation_loss(
    student: torch.nn.Module,
    teacher: VQDiTTransformer2DModel,
    scheduler: MaskedDiffusionScheduler,
    given: Mapping[str, torch.Tensor | PaddedStates],
    generated: dict[str, torch.LongTensor],
    *,
    timesteps: torch.Tensor,
    num_inference_steps: int,
    num_steps: int = 2,
    guidance_scale: float = 1.0,
    temperature: float | None = None,
    generator: Generators = None,
) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's prediction from the teacher's ([`teacher_probabilities`]), in nats
    a masked code, of one batch of one task.

    Args:
        student: a `VQDiTTransformer2DModel` with segments, possibly wrapped, with the teacher's segments.
        given, generated: name -> (B, *shape) int64 codes.
        timesteps: times (B,) in (0, 1] on the CPU, rounded up to those of the student's steps.
        num_inference_steps: of the teacher.
        num_steps: how many of them are one of the student's; divides them.
        generator: draws the masks and the teacher's codes; one, or one a row, on the CPU.

    Returns:
        the loss, a scalar. As of [`masked_diffusion_loss`], the mean over processes is that of the global batch.

    Raises:
        ValueError: if `num_steps` doesn't divide `num_inference_steps`.
    """
    num_steps = check_integer("num_steps", num_steps, 1)
    students = check_integer("num_inference_steps", num_inference_steps, num_steps) // num_steps
    if students * num_steps != num_inference_steps:
        raise ValueError(f"num_steps={num_steps} must divide num_inference_steps={num_inference_steps}")
    segments = unwrap(student).config.segments
    steps_left = (timesteps * students).ceil().long().clamp(1, students) * num_steps
    times = steps_left / num_inference_steps
    noised, masked = {}, {}
    for name, codes in generated.items():
        size = segments[name]["vocab_size"]
        corrupted = scheduler.add_noise(codes.flatten(1), times, mask_token_id=size, generator=generator)
        masked[name], noised[name] = corrupted == size, corrupted.view_as(codes)
    wanted = teacher_probabilities(
        teacher,
        scheduler,
        given,
        noised,
        steps_left,
        num_inference_steps=num_inference_steps,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        temperature=temperature,
        generator=generator,
    )
    device = next(iter(noised.values())).device
    given, padding = split_padded(given)
    options = {"given": given, "given_mask": padding or None, "masked": masked}
    logits = student(noised, timestep=times.to(device), **options).sample
    total, count = 0.0, 0
    for name, probabilities in wanted.items():
        total = total + F.kl_div(F.log_softmax(logits[name].float(), dim=-1), probabilities, reduction="sum")
        count += len(probabilities)
    # Where nothing is masked at all, the loss is 0.
    return total / mean_over_processes(torch.tensor(float(count), device=device)).clamp_min(1e-6)
