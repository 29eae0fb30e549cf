"""Likelihoods under masked diffusion: bounds on log p(generated | given) of codes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

from ..models.layers import VQDiTModulation
from ..models.transformer_vqdit import VQDiTPrefix, VQDiTTransformer2DModel
from ..utils.checks import check_integer


MAX_MASKS = 65_536


@dataclass
class LikelihoodOutput(BaseOutput):
    """Bounds on the negative log-likelihoods of B samples, float64.

    Args:
        nll (`torch.Tensor` of shape `(B,)`): the bound on -log p(generated | given), in nats.
        standard_error (`torch.Tensor` of shape `(B,)`): of the Monte Carlo estimate `nll` of the bound, in nats; 0
            where it is exact, NaN where it can't be told from the draws.
        num_codes (`int`, or `torch.LongTensor` of shape `(B,)`): how many codes a sample generates; of texts by blocks
            each its own.
    """

    nll: torch.Tensor
    standard_error: torch.Tensor
    num_codes: int | torch.Tensor

    @property
    def nats_per_code(self) -> torch.Tensor:
        return self.nll / self.num_codes

    @property
    def bits_per_code(self) -> torch.Tensor:
        return self.nll / (self.num_codes * math.log(2.0))


def are_possible(*logits: torch.Tensor) -> torch.Tensor:
    """Whether a distribution follows from each row of each of `logits` (..., K); a bool () on their device.

    A code that can't be has the logit -inf, so that a row is refused where it holds NaN or inf, or -inf throughout.
    """
    return torch.stack([value.amax(-1).isfinite().all() for value in logits]).all()


def check_logits(logits: torch.Tensor) -> None:
    """Raise a ValueError unless a transformer's logits [`are_possible`]."""
    if not are_possible(logits):
        raise ValueError("the transformer's logits are not finite")


def constant_modulation(
    transformer: VQDiTTransformer2DModel, generated: dict[str, torch.LongTensor]
) -> dict[str, VQDiTModulation]:
    """What a run's calls of a transformer have in common besides the prefix, as arguments: adaLN, but of the time."""
    if transformer.config.time_conditioned:
        return {}
    return {"modulation": transformer.encode_modulation(generated)}


def check_num_samples(num_samples: int) -> None:
    """Raise unless this many masks fill their strata."""
    if check_integer("num_samples", num_samples, 1, MAX_MASKS) > 1 and num_samples % 2:
        raise ValueError(f"num_samples={num_samples} must be 1 or an even number: the strata have two masks each")


def stratified_masks(
    num_codes: int, num_samples: int, generator: torch.Generator | None = None
) -> tuple[torch.BoolTensor, torch.Tensor]:
    """Masks for [`negative_elbo`]: the number k of masked codes is uniform in 1..N, its strata have two masks each.

    Each mask comes from N uniform numbers: the k smallest are masked, and the k-th smallest is the mask ratio, which
    so has the distribution that masked diffusion gives it for k masked codes, Beta(k, N - k + 1).

    Args:
        num_codes: N.
        num_samples: how many masks, 1 or an even number. One code needs one mask, and gets one.
        generator: on the CPU.

    Returns:
        masks (S, N) bool, and mask ratios (S,) float64.

    Raises:
        ValueError: if `num_samples` is neither 1 nor even, or more than `MAX_MASKS`.
    """
    check_num_samples(num_samples)
    if num_codes == 1:
        num_samples = 1
    strata = max(num_samples // 2, 1)
    place = (torch.arange(num_samples) % strata + torch.rand(num_samples, generator=generator).double()) / strata
    count = (place * num_codes).long().clamp_max(num_codes - 1)  # k - 1
    uniform = torch.rand(num_samples, num_codes, generator=generator, dtype=torch.float64)
    ratios = uniform.sort(dim=1).values.gather(1, count[:, None])  # (S, 1)
    return uniform <= ratios, ratios[:, 0]


@torch.no_grad()
def negative_elbo(
    transformer: VQDiTTransformer2DModel,
    generated: dict[str, torch.LongTensor],
    prefix: VQDiTPrefix | None,
    masks: torch.BoolTensor,
    *,
    times: torch.Tensor | None = None,
    batch_size: int = 64,
    progress: Callable[[], None] | None = None,
) -> LikelihoodOutput:
    """The negative ELBO of samples, estimated with masks that all samples share.

    The bound of continuous-time masked diffusion (Sahoo et al. 2024, eq. 10) is the same for every masking schedule,
    and with the mask ratio integrated out it is the mean over k in 1..N and over all sets of k masked codes of

        (N / k) sum over the masked codes of -log p(code | visible codes, given)

    (Hoogeboom et al. 2022, eq. 4; Ou et al. 2024, eq. 3.8). Since the masks are shared, the difference of two
    samples' bounds has far less variance than either.

    Args:
        transformer: a model with segments.
        generated: name -> codes (B, *shape), all known.
        prefix: of the given segments, for one sample (which all share) or for B; None where nothing is given.
        masks: (S, N) bool from [`stratified_masks`], over the generated codes, segments in the order of their names.
        times: (S,) for a model that is conditioned on the time.
        batch_size: samples a forward pass.
        progress: called after each forward pass.

    Returns:
        [`LikelihoodOutput`].

    Raises:
        ValueError: if the masks have another shape, the prefix has other samples, or the transformer's logits are not
            finite.
    """
    names = sorted(generated)
    flat = {name: generated[name].flatten(1) for name in names}
    size, device = len(flat[names[0]]), flat[names[0]].device
    lengths = [flat[name].shape[1] for name in names]
    total = sum(lengths)
    if masks.shape[1] != total:
        raise ValueError(f"masks must have shape (S, {total}), got {tuple(masks.shape)}")
    constant = constant_modulation(transformer, generated)
    estimates = torch.empty(len(masks), size, dtype=torch.float64)
    for start in range(0, size, batch_size):
        rows = slice(start, min(start + batch_size, size))
        count = rows.stop - rows.start
        part = prefix if prefix is None else prefix.part(rows, size)
        for index, mask in enumerate(masks.to(device)):
            hidden = dict(zip(names, mask.split(lengths), strict=True))
            noised, masked = {}, {}
            for name in names:
                masked[name] = hidden[name].expand(count, -1)
                mask_token_id = transformer.config.segments[name]["vocab_size"]
                noised[name] = flat[name][rows].masked_fill(masked[name], mask_token_id).view_as(generated[name][rows])
            timestep = None if times is None else times[index].to(device).expand(count)
            logits = transformer(
                noised, timestep=timestep, prefix=part, masked=masked, check_values=index == 0, **constant
            ).sample
            nll = torch.zeros(count, dtype=torch.float64)
            for name in names:
                if hidden[name].any():
                    check_logits(logits[name])
                    codes = flat[name][rows][:, hidden[name]]  # (count, k)
                    scores = torch.log_softmax(logits[name].float(), dim=-1).view(*codes.shape, -1)
                    nll -= scores.gather(2, codes[..., None]).double().sum((1, 2)).cpu()
            estimates[index, rows] = nll * (total / int(mask.sum()))
            if progress is not None:
                progress()
    return LikelihoodOutput(nll=estimates.mean(0), standard_error=standard_error(estimates, total), num_codes=total)


@torch.no_grad()
def code_log_probabilities(
    transformer: VQDiTTransformer2DModel,
    generated: dict[str, torch.LongTensor],
    prefix: VQDiTPrefix | None = None,
    *,
    rounds: int = 4,
    times: Callable[[float], torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """How well each code fits the others: its log-probability where it and a random half of the codes are masked.

    Args:
        transformer: a model with segments.
        generated: name -> codes (B, *shape), all known.
        prefix: of the given segments, for B samples; None where nothing is given.
        rounds: halves and their complements, the same for all samples; the result is the mean.
        times: the time of a mask ratio, for a model that is conditioned on the time.
        generator: on the CPU.

    Returns:
        name -> (B, N) float32.
    """
    names = sorted(generated)
    flat = {name: generated[name].flatten(1) for name in names}
    lengths = [flat[name].shape[1] for name in names]
    size, device = len(flat[names[0]]), flat[names[0]].device
    constant = constant_modulation(transformer, generated)
    totals = {name: torch.zeros(value.shape, device=device) for name, value in flat.items()}
    for _ in range(rounds):
        half = torch.randperm(sum(lengths), generator=generator) < sum(lengths) // 2
        for mask in (half, ~half):
            hidden = dict(zip(names, mask.to(device).split(lengths), strict=True))
            noised, masked = {}, {}
            for name in names:
                masked[name] = hidden[name].expand(size, -1)
                mask_token_id = transformer.config.segments[name]["vocab_size"]
                noised[name] = flat[name].masked_fill(masked[name], mask_token_id).view_as(generated[name])
            timestep = None if times is None else times(float(mask.double().mean())).to(device).expand(size)
            logits = transformer(noised, timestep=timestep, prefix=prefix, masked=masked, **constant).sample
            for name in names:
                check_logits(logits[name])
                codes = flat[name][:, hidden[name]]  # (B, k)
                scores = torch.log_softmax(logits[name].float(), dim=-1).view(*codes.shape, -1)
                totals[name][:, hidden[name]] += scores.gather(2, codes[..., None])[..., 0] / rounds
    return totals


def standard_error(estimates: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Of the mean over S stratified estimates (S, B), of which i and i + S / 2 are in one stratum."""
    if num_codes == 1:
        return torch.zeros_like(estimates[0])
    if len(estimates) == 1:
        return torch.full_like(estimates[0], math.nan)
    first, second = estimates.chunk(2)
    return (first - second).square().sum(0).sqrt() / len(estimates)
