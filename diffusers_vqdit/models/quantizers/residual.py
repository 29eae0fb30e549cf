"""Residual quantization: several codes a vector, each of what the ones before it leave over."""

from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F

from .vector import Quantizer, QuantizerOutput, VectorQuantizer


class ResidualVectorQuantizer(Quantizer, nn.ModuleList):
    """q codes a vector, from coarse to fine (Zeghidour et al. 2021, SoundStream, algorithm 1).

    With r_1 = z, level i takes the nearest code c_i to r_i in its own codebook and leaves r_{i+1} = r_i - c_i; the
    quantized vector is the sum of the c_i. The gradient passes to z through the sum, once, as the last level's
    ``gradient_estimator`` says; the loss is the sum of the levels' own. One level gives what it gives alone.

    `encode` gives codes (..., q), which `lookup` takes; `usage` and `perplexity` are (q,).

    Args:
        levels: the q [`VectorQuantizer`]s, from the first on, of one number of codes. Several need
            ``codebook_norm="none"``: what is left over has no unit length. A level with a shorter `code_dim` than the
            last, which has all channels, sees the first ones only, and its codes are zero in the others.
    """

    def __init__(self, levels: Iterable[VectorQuantizer]) -> None:
        levels = list(levels)
        super().__init__(levels[-1].num_codes, levels[-1].code_dim)
        self.extend(levels)

    def encode(self, vectors: torch.Tensor) -> torch.LongTensor:
        self.check_vectors(vectors)
        residual, codes = vectors.float(), []
        for level in self:
            codes.append(level.encode(residual[..., : level.code_dim]))
            residual = residual - self.widen(level.lookup(codes[-1]).float())
        return torch.stack(codes, -1)

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        if codes.shape[-1:] != (len(self),):
            raise ValueError(f"codes must end in {len(self)}, one a level, got shape {tuple(codes.shape)}")
        return sum(self.widen(level.lookup(part)) for level, part in zip(self, codes.unbind(-1), strict=True))

    def widen(self, vectors: torch.Tensor) -> torch.Tensor:
        """A level's vectors with zeros in the channels that it doesn't see."""
        return F.pad(vectors, (0, self.code_dim - vectors.shape[-1]))

    def forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        self.check_vectors(vectors)
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            z = residual = self[-1].flat(vectors)
            outputs, chosen = [], []
            for level in self:
                # A slice of all would change the order of the gradient's sum.
                part = residual if level.code_dim == self.code_dim else residual[:, : level.code_dim]
                outputs.append(level.assign(part))
                chosen.append(self.widen(outputs[-1].quantized))
                residual = residual - chosen[-1].detach()
            quantized = self[-1].estimate(z, sum(chosen))
        return QuantizerOutput(
            quantized=quantized.to(vectors.dtype).view(vectors.shape),
            codes=torch.stack([output.codes for output in outputs], -1).view(*vectors.shape[:-1], len(self)),
            loss=sum(output.loss for output in outputs),
            entropy_loss=sum(output.entropy_loss for output in outputs),
            usage=torch.stack([output.usage for output in outputs]),
            perplexity=torch.stack([output.perplexity for output in outputs]),
        )
