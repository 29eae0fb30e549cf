"""Likelihoods of texts by blocks: the chain rule over blocks, with a bound on each (Arriola et al. 2025, eq. 5)."""

from collections.abc import Callable

import torch

from ..models.transformer_vqdit import VQDiTPrefix, VQDiTTransformer2DModel
from .bounds import LikelihoodOutput, check_logits, standard_error, stratified_masks


def block_masks(
    num_blocks: int, block_length: int, num_samples: int, generator: torch.Generator | None = None
) -> tuple[torch.BoolTensor, torch.Tensor]:
    """Masks (S, blocks, L) and mask ratios (S, blocks), for each block as [`stratified_masks`] draws them.

    The strata are in an order of their own in each block; the two masks of one stay S / 2 apart.
    """
    masks, ratios = [], []
    for _ in range(num_blocks):
        mask, ratio = stratified_masks(block_length, num_samples, generator)
        half = max(len(mask) // 2, 1)
        order = torch.randperm(half, generator=generator)
        order = torch.cat([order, order + half])[: len(mask)]
        masks.append(mask[order])
        ratios.append(ratio[order])
    return torch.stack(masks, 1), torch.stack(ratios, 1)


def block_log_probabilities(
    transformer: VQDiTTransformer2DModel,
    segment: str,
    codes: torch.LongTensor,
    lengths: torch.LongTensor,
    prefix: VQDiTPrefix | None,
    *,
    batch_size: int = 64,
) -> torch.Tensor:
    """log p (B,) of texts, float32, where each block is generated in one step: the sum over the codes of a block, all
    masked, of log p(code | the blocks before it, given). The probabilities of all texts of so many blocks sum to 1.

    Args:
        segment: one of blocks.
        codes: (B, n) int64, n whole blocks.
        lengths, prefix, batch_size: as in [`negative_elbo_of_blocks`].
    """
    length = transformer.config.segments[segment]["block_length"]
    masks = torch.ones(1, codes.shape[1] // length, length, dtype=torch.bool)
    times = torch.ones(1, masks.shape[1]) if transformer.config.time_conditioned else None
    options = {"lengths": lengths, "times": times, "batch_size": batch_size}
    return -negative_elbo_of_blocks(transformer, {segment: codes}, prefix, masks, **options).nll.float()


@torch.no_grad()
def negative_elbo_of_blocks(
    transformer: VQDiTTransformer2DModel,
    generated: dict[str, torch.LongTensor],
    prefix: VQDiTPrefix | None,
    masks: torch.BoolTensor,
    *,
    lengths: torch.LongTensor,
    times: torch.Tensor | None = None,
    batch_size: int = 64,
    progress: Callable[[], None] | None = None,
) -> LikelihoodOutput:
    """The negative ELBO of texts: the sum over their blocks of [`~likelihood.bounds.negative_elbo`] of each, given the
    blocks before it, all of them clean.

    Args:
        transformer: a model with a segment of blocks.
        generated: that segment -> codes (B, n), all known; n whole blocks.
        prefix: of the given segments, for one sample (which all share) or for B; None where nothing is given.
        masks: (S, blocks, L) bool from [`block_masks`], which all samples share.
        lengths: (B,), the codes of each text, in whole blocks; what comes after them counts nothing.
        times: (S, blocks) for a model that is conditioned on the time.
        batch_size: samples a forward pass.
        progress: called after each forward pass.

    Raises:
        ValueError: if the masks have another shape, the prefix has other samples, or the transformer's logits are not
            finite.
    """
    ((name, codes),) = generated.items()
    num_samples, num_blocks, length = masks.shape
    if codes.shape[1] != num_blocks * length:
        raise ValueError(f"masks must have shape (S, blocks, L) of {codes.shape[1]} codes, got {tuple(masks.shape)}")
    mask_token_id = transformer.config.segments[name]["vocab_size"]
    masks, lengths = masks.to(codes.device), lengths.to(codes.device)
    weights = length / masks.sum(-1, keepdim=True).double()  # (S, blocks, 1)
    weights = weights.expand(-1, -1, length).flatten(1)  # (S, n)
    own = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None]  # (B, n)
    estimates = torch.zeros(num_samples, len(codes), dtype=torch.float64)
    for start in range(0, len(codes), batch_size):
        rows = slice(start, min(start + batch_size, len(codes)))
        longest = int(lengths[rows].max())
        clean = codes[rows, :longest]
        part = prefix if prefix is None else prefix.part(rows, len(codes))
        for index, mask in enumerate(masks.flatten(1)[:, :longest]):
            hidden = mask & own[rows, :longest]  # (b, longest)
            time = None if times is None else times[index, : longest // length].to(codes.device)
            logits = transformer(
                {name: clean.masked_fill(mask, mask_token_id)},
                timestep=time if time is None else time.float().expand(len(clean), -1),
                prefix=part,
                masked={name: hidden},
                clean={name: clean},
                check_values=index == 0,
            ).sample[name]  # (M, K)
            check_logits(logits)
            scores = torch.log_softmax(logits.float(), dim=-1).gather(1, clean[hidden][:, None])[:, 0].double()
            weight = weights[index, :longest].expand_as(hidden)
            nll = torch.zeros_like(hidden, dtype=torch.float64).masked_scatter(hidden, -scores * weight[hidden])
            estimates[index, rows] = nll.sum(1).cpu()
            if progress is not None:
                progress()
    return LikelihoodOutput(estimates.mean(0), standard_error(estimates, length), lengths.cpu())
