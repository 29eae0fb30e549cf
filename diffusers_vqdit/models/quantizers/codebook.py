"""Quantizers whose whole codebook learns at every step: SimVQ and IBQ."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..config_checks import check_quantizer
from .code_search import SEARCH_ELEMENTS, best_codes
from .vector import (
    CodebookQuantizer,
    QuantizerOutput,
    VectorQuantizer,
    assignment_entropy,
    loaded_weight,
    perplexity,
)


class SimVectorQuantizer(VectorQuantizer):
    """Nearest code of a frozen random codebook under a learned linear map (Zhu et al. 2024, SimVQ).

    The codes are the rows of C W, where C (K, D) is drawn from N(0, 1 / D) once and only W (D, D) is trained: the
    gradient of one used code moves them all, so none dies. Loss, search and code order are [`VectorQuantizer`]'s with
    C W for the codebook.

    Args:
        num_codes, code_dim, beta, gradient_estimator, entropy_weight, entropy_temperature: see [`VectorQuantizer`].
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        beta: float = 0.25,
        gradient_estimator: str = "straight_through",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__(
            num_codes,
            code_dim,
            beta=beta,
            gradient_estimator=gradient_estimator,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
        )
        nn.init.normal_(self.embedding.weight, std=code_dim**-0.5)
        self.embedding.weight.requires_grad_(False)
        self.projection = nn.Linear(code_dim, code_dim, bias=False)

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors C W (K, D) as they are looked up."""
        weight, rows = loaded_weight(self.projection), loaded_weight(self.embedding)
        with torch.autocast(device_type=weight.device.type, enabled=False):
            return F.linear(rows.float(), weight.float()).to(weight.dtype)


class IndexBackpropagationQuantizer(CodebookQuantizer):
    """Code with the largest dot product, and a gradient through all of them (Shi et al. 2024, IBQ, section 3.2).

    With the soft assignment p = softmax(z.c_1, ..., z.c_K), the one-hot choice is i = onehot(argmax p) + p - sg(p),
    and the vector is q = sum_k i_k c_k: in value the chosen code, but every code gets a gradient through p.

    loss = |q - z|^2 + |sg(z) - c|^2 + beta |z - sg(c)|^2 + entropy_weight (E[H(p')] - H(E[p'])), means over all
    channels, with c the chosen code and p' = softmax(z.c / entropy_temperature). (The authors' code has the weights of
    the second and third term the other way round.) Code k is row k of the codebook.

    Args:
        num_codes: size K of the codebook.
        code_dim: length D of a code vector.
        beta: weight of the commitment term.
        codebook_norm: ``"none"``, or ``"l2"`` to bring vectors and codes to unit length first.
        entropy_weight, entropy_temperature: of the entropy loss, see [`~models.quantizers.assignment_entropy`].
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        beta: float = 0.25,
        codebook_norm: str = "none",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        check_quantizer(
            beta=beta,
            codebook_norm=codebook_norm,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
        )
        super().__init__(num_codes, code_dim)
        self.beta = beta
        self.codebook_norm = codebook_norm
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.embedding = nn.Embedding(num_codes, code_dim)  # N(0, 1): codes of no length would have no say

    def encode(self, vectors: torch.Tensor) -> torch.LongTensor:
        self.check_vectors(vectors)
        return best_codes(vectors.reshape(-1, self.code_dim), self.codebook).view(vectors.shape[:-1])

    def forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        self.check_vectors(vectors)
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            return self._forward(vectors)

    def _forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        z, codebook = vectors.reshape(-1, self.code_dim).float(), self.codebook.float()
        if self.codebook_norm == "l2":
            z = F.normalize(z, dim=-1)
        codes = best_codes(z, codebook)
        chosen = F.embedding(codes, codebook)  # (N, D)
        # sum_k (p_k - sg(p_k)) c_k: zero, with the gradient of p. The assignments exist a few rows at a time, in the
        # backward pass too; the codes' gradient as vectors comes from `chosen` alone.
        rows = max(1, SEARCH_ELEMENTS // self.num_codes)
        soft = torch.cat([checkpoint(_soft_choice, part, codebook, use_reentrant=False) for part in z.split(rows)])
        quantized = chosen + (soft - soft.detach())

        loss = F.mse_loss(quantized, z) + F.mse_loss(chosen, z.detach()) + self.beta * F.mse_loss(z, chosen.detach())
        entropy_loss = z.new_zeros(())
        if self.entropy_weight > 0:
            entropy_loss = self.entropy_weight * assignment_entropy(z, codebook, None, self.entropy_temperature)
        share = self.use_of_codes(codes)
        return QuantizerOutput(
            quantized=quantized.to(vectors.dtype).view(vectors.shape),
            codes=codes.view(vectors.shape[:-1]),
            loss=loss + entropy_loss,
            entropy_loss=entropy_loss,
            usage=(share > 0).float().mean(),
            perplexity=perplexity(share),
        )


def _soft_choice(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """sum_k p_k c_k (N, D) with p = softmax(z.c); the gradient reaches the codebook through p only."""
    return F.softmax(vectors @ codebook.T, dim=1) @ codebook.detach()
