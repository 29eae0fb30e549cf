"""Residual quantization: several codes a vector, each of what the ones before it leave over."""

from collections.abc import Iterable

import torch
import torch.nn as nn

from .quantizers import Quantizer, QuantizerOutput, VectorQuantizer


class ResidualVectorQuantizer(Quantizer, nn.ModuleList):
    """q codes a vector, from coarse to fine (Zeghidour et al. 2021, SoundStream, algorithm 1).

    With r_1 = z, level i takes the nearest code c_i to r_i in its own codebook and leaves r_{i+1} = r_i - c_i; the
    quantized vector is the sum of the c_i. The gradient passes to z through the sum, once, as the first level's
    ``gradient_estimator`` says; the loss is the sum of the levels' own. One level gives what it gives alone.

    `encode` gives codes (..., q), which `lookup` takes; `usage` and `perplexity` are (q,).

    Args:
        levels: the q [`VectorQuantizer`]s, from the first on, of one number of codes and one length. Several need
            ``codebook_norm="none"``: what is left over has no unit length.
    """

    def __init__(self, levels: Iterable[VectorQuantizer]) -> None:
        levels = list(levels)
        super().__init__(levels[0].num_codes, levels[0].code_dim)
        self.extend(levels)

    def encode(self, vectors: torch.Tensor) -> torch.LongTensor:
        self.check_vectors(vectors)
        residual, codes = vectors.float(), []
        for level in self:
            codes.append(level.encode(residual))
            residual = residual - level.lookup(codes[-1]).float()
        return torch.stack(codes, -1)

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        if codes.shape[-1:] != (len(self),):
            raise ValueError(f"codes must end in {len(self)}, one a level, got shape {tuple(codes.shape)}")
        return sum(level.lookup(part) for level, part in zip(self, codes.unbind(-1), strict=True))

    def forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        self.check_vectors(vectors)
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            z = residual = self[0].flat(vectors)
            outputs = []
            for level in self:
                outputs.append(level.assign(residual))
                residual = residual - outputs[-1].quantized.detach()
            quantized = self[0].estimate(z, sum(output.quantized for output in outputs))
        return QuantizerOutput(
            quantized=quantized.to(vectors.dtype).view(vectors.shape),
            codes=torch.stack([output.codes for output in outputs], -1).view(*vectors.shape[:-1], len(self)),
            loss=sum(output.loss for output in outputs),
            entropy_loss=sum(output.entropy_loss for output in outputs),
            usage=torch.stack([output.usage for output in outputs]),
            perplexity=torch.stack([output.perplexity for output in outputs]),
        )
