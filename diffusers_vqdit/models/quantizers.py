"""Vector quantization: vectors to codes of a learned codebook and back."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils import BaseOutput


SEARCH_ELEMENTS = 2**22  # scores held at once by the search: 16 MiB of float32


@dataclass
class QuantizerOutput(BaseOutput):
    """Output of a quantizer.

    Args:
        quantized (`torch.Tensor` of shape `(..., D)`): the chosen codes' vectors; gradients pass straight through.
        codes (`torch.LongTensor` of shape `(...)`): in [0, K).
        loss (`torch.Tensor`): codebook and commitment loss, a scalar.
        usage (`torch.Tensor`): share of the codebook that this batch used, in [0, 1], over all processes.
        perplexity (`torch.Tensor`): exp of the entropy of the batch's codes, in [1, K], over all processes.
    """

    quantized: torch.Tensor
    codes: torch.LongTensor
    loss: torch.Tensor
    usage: torch.Tensor
    perplexity: torch.Tensor


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.LongTensor:
    """Index of the codebook row nearest to each vector; ties go to the lowest index.

    |z - c|^2 = |z|^2 - 2 (z.c - |c|^2 / 2), so the nearest code has the largest z.c - |c|^2 / 2. The search runs in
    float32 whatever the input (bfloat16 would flip some 3 % of the codes), a few rows at a time.

    Args:
        vectors: (N, D).
        codebook: (K, D).

    Returns:
        (N,) int64.
    """
    with torch.autocast(device_type=vectors.device.type, enabled=False):
        codebook = codebook.detach().float()
        offset = -0.5 * codebook.square().sum(1)  # (K,)
        rows = max(1, SEARCH_ELEMENTS // len(codebook))
        parts = [
            torch.addmm(offset, chunk, codebook.T).argmax(1) for chunk in vectors.detach().float().split(rows)
        ]  # (rows, K) -> (rows,)
    return torch.cat(parts)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks; every process must bring as many."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with a straight-through gradient (van den Oord et al. 2017, eq. 3).

    Args:
        num_codes: size K of the codebook.
        code_dim: length D of a code vector.
        beta: weight of the commitment term |z - sg(e)|^2. The codebook term |sg(z) - e|^2 has weight 1 and is left out
            where the codebook is updated by EMA.
        codebook_norm: ``"none"`` for Euclidean codes, or ``"l2"`` to bring vectors and codes to unit length first
            (Yu et al. 2021, ViT-VQGAN).
        codebook_update: ``"gradient"``, or ``"ema"`` for moving averages of the vectors assigned to each code (van den
            Oord et al. 2017, appendix A.1).
        codebook_init: ``"uniform"`` in +-1/K; ``"data"`` or ``"kmeans"`` take the first training batch's vectors,
            or their k-means centres.
        ema_decay: decay of the moving averages, of assignments too.
        restart_threshold: a code whose moving average of assignments, as a multiple of the uniform share, falls
            below this is put onto a vector of the batch, drawn by its squared error as k-means++ does (Arthur &
            Vassilvitskii 2007): drawn uniformly, most would land where the data is dense and well served. 0 never
            restarts.

    All statistics are taken over the processes together, and restarts are the same on all of them.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        beta: float = 0.25,
        codebook_norm: str = "none",
        codebook_update: str = "gradient",
        codebook_init: str = "uniform",
        ema_decay: float = 0.99,
        restart_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("codebook_norm", codebook_norm, ("none", "l2")),
            ("codebook_update", codebook_update, ("gradient", "ema")),
            ("codebook_init", codebook_init, ("uniform", "data", "kmeans")),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} must be one of {choices}")
        if not 0 <= restart_threshold < 1:
            raise ValueError(f"restart_threshold={restart_threshold} must be in [0, 1)")
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.beta = beta
        self.codebook_norm = codebook_norm
        self.codebook_update = codebook_update
        self.codebook_init = codebook_init
        self.ema_decay = ema_decay
        self.restart_threshold = restart_threshold

        self.embedding = nn.Embedding(num_codes, code_dim)
        self.embedding.weight.data.uniform_(-1.0 / num_codes, 1.0 / num_codes)
        # Buffers only where they are used, so that a stock codebook's state dict stays as it is.
        if codebook_init != "uniform" or restart_threshold > 0:
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        if restart_threshold > 0 or codebook_update == "ema":
            self.register_buffer("cluster_size", torch.full((num_codes,), 1.0 / num_codes))
        if codebook_update == "ema":
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("cluster_mean", self.embedding.weight.data / num_codes)

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors (K, D) as they are looked up."""
        weight = self.embedding.weight
        return F.normalize(weight.float(), dim=1).to(weight.dtype) if self.codebook_norm == "l2" else weight

    def encode(self, vectors: torch.Tensor) -> torch.LongTensor:
        """Codes (...) int64 of the vectors (..., D)."""
        # A unit vector and its multiples have the same nearest unit code, so the vectors need no normalising here.
        flat = vectors.reshape(-1, self.code_dim)
        return nearest_codes(flat, self.codebook).view(vectors.shape[:-1])

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """Vectors (..., D) of the codes (...).

        Raises:
            ValueError: if `codes` is not an integer tensor or a code is outside [0, K).
        """
        if codes.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"codes must be int64 or int32, got {codes.dtype}")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.num_codes):
            raise ValueError(f"codes must be in [0, {self.num_codes}), got values from {codes.min()} to {codes.max()}")
        return F.embedding(codes, self.codebook)

    def keep(self, codes: torch.LongTensor) -> None:
        """Drop all codes but those (K',), which become the codes 0 to K' - 1."""
        self.num_codes = len(codes)
        update = self.embedding.weight.requires_grad
        self.embedding = nn.Embedding.from_pretrained(self.embedding.weight.detach()[codes], freeze=not update)
        for name in ("cluster_size", "cluster_mean"):
            if hasattr(self, name):
                setattr(self, name, getattr(self, name)[codes])

    def forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        """Quantize vectors (..., D).

        Raises:
            ValueError: if the vectors do not end in D channels, or in training if the moving averages are not float32.
        """
        if vectors.shape[-1] != self.code_dim:
            raise ValueError(f"vectors must end in {self.code_dim} channels, got shape {tuple(vectors.shape)}")
        if self.training and hasattr(self, "cluster_size") and self.cluster_size.dtype != torch.float32:
            # An update is some hundredth of the average: below the resolution of half precision for a steady code.
            raise ValueError(
                f"the codebook's moving averages are {self.cluster_size.dtype}, training needs torch.float32: keep "
                "the model in float32 and use autocast (mixed precision)"
            )
        z = vectors.float()
        if self.codebook_norm == "l2":
            z = F.normalize(z, dim=-1)
        flat = z.reshape(-1, self.code_dim)
        if self.training and self.codebook_init != "uniform" and self.updates == 0:
            self._initialize(gather_rows(flat.detach()))
        codes = nearest_codes(flat, self.codebook)
        quantized = F.embedding(codes, self.codebook).float().view_as(z)

        loss = self.beta * F.mse_loss(z, quantized.detach())
        if self.codebook_update == "gradient":
            loss = loss + F.mse_loss(quantized, z.detach())

        counts = torch.bincount(codes, minlength=self.num_codes).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        share = counts / counts.sum()
        perplexity = torch.exp(-(share * share.clamp_min(1e-10).log()).sum())
        if self.training:
            self._update(flat.detach(), codes, share, (flat - quantized.view_as(flat)).detach().square().sum(1))

        return QuantizerOutput(
            quantized=(z + (quantized - z).detach()).to(vectors.dtype),
            codes=codes.view(vectors.shape[:-1]),
            loss=loss,
            usage=(counts > 0).float().mean(),
            perplexity=perplexity,
        )

    @torch.no_grad()
    def _update(self, flat: torch.Tensor, codes: torch.LongTensor, share: torch.Tensor, errors: torch.Tensor) -> None:
        """Moving averages, the EMA codebook, and the restart of dead codes."""
        if hasattr(self, "cluster_size"):
            self.cluster_size.lerp_(share, 1 - self.ema_decay)
        if self.codebook_update == "ema":
            sums = torch.zeros_like(self.cluster_mean).index_add_(0, codes, flat)
            total = torch.tensor(float(len(flat)), device=flat.device)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums)
                dist.all_reduce(total)
            self.cluster_mean.lerp_(sums / total, 1 - self.ema_decay)
            # A code without assignments keeps its place: both averages decay alike.
            used = self.cluster_size > 1e-8
            self.embedding.weight[used] = self.cluster_mean[used] / self.cluster_size[used, None]
        if self.restart_threshold > 0:
            dead = (self.cluster_size < self.restart_threshold / self.num_codes).nonzero()[:, 0]
            if len(dead):
                flat, errors = gather_rows(flat), gather_rows(errors)
                drawn = self._draw(errors.cpu().double() + 1e-12, min(len(dead), len(flat)))
                self._place(dead[: len(drawn)], flat[drawn])
        if hasattr(self, "updates"):
            self.updates += 1

    def _draw(self, weights: torch.Tensor, count: int) -> torch.Tensor:
        """`count` different indices, drawn by weight, the same on all processes."""
        generator = torch.Generator().manual_seed(int(self.updates))
        # The largest of log w + Gumbel noise: weighted sampling without replacement (Efraimidis & Spirakis 2006).
        noise = torch.rand(len(weights), generator=generator, dtype=torch.float64).clamp_min(1e-300)
        keys = weights.log() - (-noise.log()).log()
        return keys.topk(count).indices.to(self.embedding.weight.device)

    def _place(self, codes: torch.LongTensor, vectors: torch.Tensor) -> None:
        """Put codes onto vectors, with the uniform share of assignments."""
        self.embedding.weight.data[codes] = vectors.to(self.embedding.weight.dtype)
        if hasattr(self, "cluster_size"):
            self.cluster_size[codes] = 1.0 / self.num_codes
        if self.codebook_update == "ema":
            self.cluster_mean[codes] = vectors / self.num_codes

    @torch.no_grad()
    def _initialize(self, flat: torch.Tensor, iterations: int = 10) -> None:
        """Put the codebook onto vectors of the first batch, or their k-means centres (Lloyd's algorithm)."""
        distinct = torch.unique(flat, dim=0)  # many positions may hold the very same vector, as padding does
        drawn = self._draw(torch.ones(len(distinct), dtype=torch.float64), min(self.num_codes, len(distinct)))
        centres = distinct[drawn]
        if self.codebook_init == "kmeans":
            for _ in range(iterations):
                codes = nearest_codes(flat, centres)
                counts = torch.bincount(codes, minlength=len(centres))
                sums = torch.zeros_like(centres).index_add_(0, codes, flat)
                filled = counts > 0
                centres[filled] = sums[filled] / counts[filled, None]
        self._place(torch.arange(len(centres), device=flat.device), centres)
