"""Quantizers without a codebook: each channel is rounded by itself (FSQ, LFQ and BSQ)."""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ...utils.checks import check_integer
from ...utils.distributed import sum_over_processes
from ..config_checks import MAX_CODES, check_quantizer
from .code_search import SEARCH_ELEMENTS
from .vector import (
    Quantizer,
    QuantizerOutput,
    binary_entropy,
    perplexity,
    straight_through,
)


ENTROPY_GROUP = 10  # bits of which the joint distribution is held at once


class FiniteScalarQuantizer(Quantizer):
    """Each channel is rounded to one of a few levels (Mentzer et al. 2023, FSQ, section 3.1).

    A channel with L levels is bounded to f(z) = h tanh(z + s) - o and rounded, where h = (L - 1)(1 + 1e-3) / 2, and
    o = 1/2, s = atanh(o / h) for an even L, o = s = 0 for an odd one; so 0 stays 0. The rounded value, divided by
    L // 2, is in [-1, 1]. The gradient passes straight through the rounding; there is no loss.

    Code order: the code is sum_d n_d prod_{e<d} L_e, with n_d in [0, L_d) the level of channel d from the lowest up:
    the first channel varies fastest.

    Args:
        levels: number L >= 3 of levels of each channel; K is their product and D their number. With two levels, s is
            so large that zero is far from the other level and has no gradient to it; that is LFQ's case.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        check_quantizer(levels=levels)
        levels = tuple(int(level) for level in levels)
        super().__init__(math.prod(levels), len(levels))
        self.levels = levels

    def _constants(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        levels = torch.tensor(self.levels, device=device)
        strides = torch.tensor([math.prod(self.levels[:d]) for d in range(self.code_dim)], device=device)
        return levels, strides

    def _round(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bounded vectors (..., D), and the rounded: whole numbers in [-(L // 2), (L - 1) // 2]."""
        levels, _ = self._constants(vectors.device)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        bounded = half * torch.tanh(vectors.float() + torch.atanh(offset / half)) - offset
        rounded = bounded.detach().round()  # of a thousand levels or more the bound reaches one beyond the last
        return bounded, torch.minimum(torch.maximum(rounded, -(levels // 2)), (levels - 1) // 2)

    def _codes(self, rounded: torch.Tensor) -> torch.LongTensor:
        levels, strides = self._constants(rounded.device)
        return ((rounded.long() + levels // 2) * strides).sum(-1)

    def encode(self, vectors: torch.Tensor) -> torch.LongTensor:
        self.check_vectors(vectors)
        return self._codes(self._round(vectors)[1])

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        self.check_codes(codes)
        levels, strides = self._constants(codes.device)
        digits = codes[..., None].long() // strides % levels  # (..., D)
        return (digits - levels // 2).float() / (levels // 2)

    def forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        self.check_vectors(vectors)
        bounded, rounded = self._round(vectors)
        quantized = straight_through(bounded, rounded) / (self._constants(vectors.device)[0] // 2)
        codes = self._codes(rounded)
        share = self.use_of_codes(codes)
        zero = quantized.new_zeros(())
        return QuantizerOutput(
            quantized=quantized.to(vectors.dtype),
            codes=codes,
            loss=zero,
            entropy_loss=zero,
            usage=(share > 0).float().mean(),
            perplexity=perplexity(share),
        )


class LookupFreeQuantizer(Quantizer):
    """The sign of each channel (Yu et al. 2023, LFQ, section 3.1), or of each channel of a unit vector (Zhao et al.
    2024, BSQ).

    q = s sign(z), with s = 1, or with ``codebook_norm="l2"`` z / |z| for z and s = 1 / sqrt(D), so that vectors and
    codes lie on the unit sphere. A zero is negative. The gradient passes straight through.

    loss = beta |z - sg(q)|^2 + entropy_weight (E[H(p)] - H(E[p])), the first a mean over channels, with
    p = softmax(-|z - c|^2 / entropy_temperature) over all 2^D codes. It factorises: bit d is 1 with probability
    sigmoid(4 s z_d / entropy_temperature), so E[H(p)] is exact as a sum over the bits. H(E[p]) is exact up to 2^10
    codes; beyond, it is the sum over groups of 10 bits, an upper bound that needs no 2^D terms (Zhao et al. 2024,
    section 3.2).

    Code order: bit d of the code, worth 2^d, is 1 where channel d is positive: the first channel varies fastest.

    Args:
        code_dim: number D of channels; K = 2^D.
        beta: weight of the commitment term.
        codebook_norm: ``"none"`` for LFQ, ``"l2"`` for BSQ.
        entropy_weight, entropy_temperature: of the entropy loss.
    """

    def __init__(
        self,
        code_dim: int,
        *,
        beta: float = 0.25,
        codebook_norm: str = "none",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        # The use of all 2^code_dim codes is counted.
        code_dim = check_integer("code_dim", code_dim, 1, MAX_CODES.bit_length() - 1)
        check_quantizer(
            beta=beta,
            codebook_norm=codebook_norm,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
        )
        super().__init__(2**code_dim, code_dim)
        self.beta = beta
        self.codebook_norm = codebook_norm
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.scale = code_dim**-0.5 if codebook_norm == "l2" else 1.0

    def encode(self, vectors: torch.Tensor) -> torch.LongTensor:
        self.check_vectors(vectors)
        return ((vectors > 0).long() << torch.arange(self.code_dim, device=vectors.device)).sum(-1)

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        self.check_codes(codes)
        bits = codes[..., None].long() >> torch.arange(self.code_dim, device=codes.device) & 1  # (..., D)
        return self.scale * (2.0 * bits - 1.0)

    def forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        self.check_vectors(vectors)
        z = vectors.float()
        if self.codebook_norm == "l2":
            z = F.normalize(z, dim=-1)
        codes = self.encode(vectors)
        quantized = torch.where(z > 0, self.scale, -self.scale)  # (..., D)
        loss = self.beta * F.mse_loss(z, quantized)
        entropy_loss = z.new_zeros(())
        if self.entropy_weight > 0:
            logits = (4 * self.scale / self.entropy_temperature) * z.reshape(-1, self.code_dim)  # (N, D)
            count = sum_over_processes(torch.tensor(float(len(logits)), device=z.device))
            batch_entropy = sum(
                _entropy(sum_over_processes(_total_assignment(group)) / count)
                for group in logits.split(ENTROPY_GROUP, dim=1)
            )
            entropy_loss = self.entropy_weight * (binary_entropy(logits).sum(1).mean() - batch_entropy)
        share = self.use_of_codes(codes)
        return QuantizerOutput(
            quantized=straight_through(z, quantized).to(vectors.dtype),
            codes=codes,
            loss=loss + entropy_loss,
            entropy_loss=entropy_loss,
            usage=(share > 0).float().mean(),
            perplexity=perplexity(share),
        )


def _total_assignment(logits: torch.Tensor) -> torch.Tensor:
    """Sum over the vectors of p (2^G,), the product of G bits' probabilities, from their logits (N, G)."""
    rows = max(1, SEARCH_ELEMENTS >> logits.shape[1])
    # A few rows at a time, in the backward pass too.
    return sum(checkpoint(_joint_total, part, use_reentrant=False) for part in logits.split(rows))


def _joint_total(logits: torch.Tensor) -> torch.Tensor:
    joint = logits.new_ones(len(logits), 1)
    for bit in torch.sigmoid(logits).split(1, dim=1):
        joint = torch.cat([joint * (1 - bit), joint * bit], dim=1)
    return joint.sum(0)


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    return -(probabilities * probabilities.clamp_min(1e-10).log()).sum()
