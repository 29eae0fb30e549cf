"""Quantization: vectors to codes and back. The interface, what all quantizers share, and the learned codebook (VQ)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch.utils.checkpoint import checkpoint

from ...utils.distributed import gather_rows, sum_over_processes
from ..config_checks import check_quantizer
from .code_search import SEARCH_ELEMENTS, nearest_codes, rows_apart


RETIRED = 1e3  # each channel of a code out of use: far from all vectors, and a number of half precision


@dataclass
class QuantizerOutput(BaseOutput):
    """Output of a quantizer.

    Args:
        quantized (`torch.Tensor` of shape `(..., D)`): the chosen codes' vectors; gradients pass straight through.
        codes (`torch.LongTensor` of shape `(...)`): in [0, K).
        loss (`torch.Tensor`): what training adds to the reconstruction loss: codebook, commitment and entropy loss,
            weighted; a scalar.
        entropy_loss (`torch.Tensor`): the entropy loss's share of `loss`; 0 where its weight is.
        usage (`torch.Tensor`): share of the codebook that this batch used, in [0, 1], over all processes.
        perplexity (`torch.Tensor`): exp of the entropy of the batch's codes, in [1, K], over all processes.
    """

    quantized: torch.Tensor
    codes: torch.LongTensor
    loss: torch.Tensor
    entropy_loss: torch.Tensor
    usage: torch.Tensor
    perplexity: torch.Tensor


class Quantizer(nn.Module, ABC):
    """What every quantizer does: vectors to codes, codes to vectors, and both with gradients and a loss.

    The codes of a picture are the integers [0, K); each class says in which order. All arithmetic is in float32,
    whatever the vectors' dtype and under autocast too; `quantized` has the vectors' dtype.

    Args:
        num_codes: number K of codes.
        code_dim: length D of a vector.
    """

    def __init__(self, num_codes: int, code_dim: int) -> None:
        check_quantizer(num_codes=num_codes, code_dim=code_dim)
        super().__init__()
        self.num_codes = num_codes
        self.code_dim = code_dim

    @abstractmethod
    def encode(self, vectors: torch.Tensor) -> torch.LongTensor:
        """Codes (...) int64 of the vectors (..., D)."""

    @abstractmethod
    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """Vectors (..., D) of the codes (...).

        Raises:
            ValueError: if `codes` is not an integer tensor or a code is outside [0, K).
        """

    @abstractmethod
    def forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        """Quantize vectors (..., D).

        Raises:
            ValueError: if the vectors do not end in D channels.
        """

    def check_vectors(self, vectors: torch.Tensor) -> None:
        if vectors.shape[-1] != self.code_dim:
            raise ValueError(f"vectors must end in {self.code_dim} channels, got shape {tuple(vectors.shape)}")

    def check_codes(self, codes: torch.Tensor) -> None:
        if codes.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"codes must be int64 or int32, got {codes.dtype}")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.num_codes):
            raise ValueError(f"codes must be in [0, {self.num_codes}), got values from {codes.min()} to {codes.max()}")

    def use_of_codes(self, codes: torch.LongTensor) -> torch.Tensor:
        """Each code's share (K,) of all `codes`, over all processes."""
        counts = sum_over_processes(torch.bincount(codes.flatten(), minlength=self.num_codes).float())
        return counts / counts.sum()


def perplexity(share: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of a distribution (K,)."""
    return torch.exp(-(share * share.clamp_min(1e-10).log()).sum())


def loaded_weight(module: nn.Embedding | nn.Linear) -> torch.Tensor:
    """The weight of an embedding or of a linear layer without bias, also where offloading has taken it away.

    Accelerate's hooks bring the weights of a module for its own call only, so they are read through one.
    """
    if module.weight.device.type != "meta":
        return module.weight
    if isinstance(module, nn.Embedding):
        return module(torch.arange(module.num_embeddings))
    return module(torch.eye(module.in_features, dtype=module.weight.dtype)).T


def rotate_to(vectors: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """`quantized`, with the gradient of the rotation trick (Fifty et al. 2024, section 4.2).

    q = (|q| / |z|) R z, where the rotation R, which takes z's direction to q's, and the ratio of the norms are held
    constant. With u = z / |z|, v = q / |q| and r = (u + v) / |u + v|, R = I - 2 r r^T + 2 v u^T. So the gradient
    keeps its angle to the code where straight-through keeps its direction.

    Args:
        vectors, quantized: (N, D) float32.
    """
    z, q = vectors.detach(), quantized.detach()
    u, v = F.normalize(z, dim=1), F.normalize(q, dim=1)
    r = F.normalize(u + v, dim=1)
    scale = q.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def along(direction: torch.Tensor) -> torch.Tensor:
        return (vectors * direction).sum(1, keepdim=True)

    rotated = scale * (vectors - 2 * along(r) * r + 2 * along(u) * v)
    return q + (rotated - rotated.detach())  # exactly q, for a zero vector too


def straight_through(vectors: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """`quantized`, with the gradient of `vectors` (Bengio et al. 2013)."""
    return vectors + (quantized - vectors).detach()


def binary_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of a coin that falls 1 with probability sigmoid(logits)."""
    return F.softplus(logits) - logits * torch.sigmoid(logits)


def assignment_entropy(
    vectors: torch.Tensor, codebook: torch.Tensor, offset: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """E[H(p)] - H(E[p]) of the soft assignments p = softmax((z.c + offset) / temperature) (Yu et al. 2023, eq. 4).

    Low where each vector is sure of its code and all codes are used alike. E[p] is over all processes. The N x K
    assignments exist a few rows at a time, in the backward pass too.

    Args:
        vectors: (N, D) float32.
        codebook: (K, D) float32.
        offset: (K,) or None.
        temperature: of the softmax.
    """

    def chunk_terms(chunk: torch.Tensor, codebook: torch.Tensor, offset: torch.Tensor | None):
        scores = chunk @ codebook.T if offset is None else torch.addmm(offset, chunk, codebook.T)  # (rows, K)
        log_p = F.log_softmax(scores / temperature, dim=1)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(0)

    rows = max(1, SEARCH_ELEMENTS // len(codebook))
    parts = [checkpoint(chunk_terms, chunk, codebook, offset, use_reentrant=False) for chunk in vectors.split(rows)]
    sample_entropy = torch.stack([entropy for entropy, _ in parts]).sum() / len(vectors)
    mean = sum_over_processes(torch.stack([p for _, p in parts]).sum(0))
    mean = mean / mean.detach().sum()
    return sample_entropy + (mean * mean.clamp_min(1e-10).log()).sum()


class CodebookQuantizer(Quantizer):
    """A quantizer with a table of codes, `embedding`, whose `codebook_norm` is ``"none"`` or ``"l2"``."""

    embedding: nn.Embedding
    codebook_norm: str

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors (K, D) as they are looked up."""
        weight = loaded_weight(self.embedding)
        return F.normalize(weight.float(), dim=1).to(weight.dtype) if self.codebook_norm == "l2" else weight

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        self.check_codes(codes)
        return F.embedding(codes, self.codebook)


class VectorQuantizer(CodebookQuantizer):
    """Nearest code of a learned codebook, ||z - c_k||^2 -> min (van den Oord et al. 2017, eq. 1).

    loss = |sg(z) - c|^2 + beta |z - sg(c)|^2 (eq. 3, means over all channels) + entropy_weight (E[H(p)] - H(E[p])),
    with p = softmax(-|z - c|^2 / entropy_temperature). Code k is row k of the codebook.

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
        gradient_estimator: how the gradient passes to the vectors: ``"straight_through"``, or ``"rotation"`` for the
            rotation trick, see [`rotate_to`].
        entropy_weight, entropy_temperature: of the entropy loss, see [`assignment_entropy`].
        follow: for vectors that move fast, as an image encoder's do when training begins: the averages are of a few
            batches at first, with decays of 0.1, 0.5, 0.9, ..., and a batch that has left the codes behind restarts
            those that it doesn't use before it is quantized, where `restart_threshold` is not 0.

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
        gradient_estimator: str = "straight_through",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        follow: bool = False,
    ) -> None:
        check_quantizer(
            beta=beta,
            codebook_norm=codebook_norm,
            codebook_update=codebook_update,
            codebook_init=codebook_init,
            ema_decay=ema_decay,
            restart_threshold=restart_threshold,
            gradient_estimator=gradient_estimator,
            entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature,
        )
        super().__init__(num_codes, code_dim)
        self.beta = beta
        self.codebook_norm = codebook_norm
        self.codebook_update = codebook_update
        self.codebook_init = codebook_init
        self.ema_decay = ema_decay
        self.restart_threshold = restart_threshold
        self.follow = follow
        self.gradient_estimator = gradient_estimator
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature

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

    def encode(self, vectors: torch.Tensor) -> torch.LongTensor:
        # A unit vector and its multiples have the same nearest unit code, so the vectors need no normalising here.
        self.check_vectors(vectors)
        flat = vectors.reshape(-1, self.code_dim)
        return nearest_codes(flat, self.codebook).view(vectors.shape[:-1])

    def keep(self, codes: torch.LongTensor) -> None:
        """Drop all codes but those (K',), which become the codes 0 to K' - 1."""
        self.num_codes = len(codes)
        update = self.embedding.weight.requires_grad
        self.embedding = nn.Embedding.from_pretrained(self.embedding.weight.detach()[codes], freeze=not update)
        for name in ("cluster_size", "cluster_mean"):
            if hasattr(self, name):
                setattr(self, name, getattr(self, name)[codes])

    def retire(self, codes: torch.LongTensor) -> None:
        """Put all codes but those (K',) where no vector is nearest to them; training may restart them."""
        others = torch.ones(self.num_codes, dtype=torch.bool, device=codes.device)
        others[codes] = False
        self.embedding.weight.data[others] = RETIRED
        for name in ("cluster_size", "cluster_mean"):
            if hasattr(self, name):
                getattr(self, name)[others] = 0.0

    def forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        """Quantize vectors (..., D).

        Raises:
            ValueError: if the vectors do not end in D channels, or in training if the moving averages are not float32.
        """
        self.check_vectors(vectors)
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            z = self.flat(vectors)
            output = self.assign(z)
            quantized = self.estimate(z, output.quantized).to(vectors.dtype).view(vectors.shape)
            codes = output.codes.view(vectors.shape[:-1])
            return QuantizerOutput(**{**output, "quantized": quantized, "codes": codes})

    def flat(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (..., D) as (N, D) float32, of unit length with ``codebook_norm="l2"``."""
        z = vectors.reshape(-1, self.code_dim).float()
        return F.normalize(z, dim=-1) if self.codebook_norm == "l2" else z

    def estimate(self, z: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """`quantized` with a gradient to `z`, both (N, D)."""
        return (rotate_to if self.gradient_estimator == "rotation" else straight_through)(z, quantized)

    def assign(self, z: torch.Tensor) -> QuantizerOutput:
        """What `forward` gives of vectors (N, D) as [`flat`] makes them, but `quantized` as the codebook has it."""
        if self.training and hasattr(self, "cluster_size") and self.cluster_size.dtype != torch.float32:
            # An update is some hundredth of the average: below the resolution of half precision for a steady code.
            raise ValueError(
                f"the codebook's moving averages are {self.cluster_size.dtype}, training needs torch.float32: keep "
                "the model in float32 and use autocast (mixed precision)"
            )
        if self.training and self.codebook_init != "uniform" and self.updates == 0:
            self._initialize(gather_rows(z.detach()))
        codebook, codes, quantized, share = self._nearest(z)
        if self.training and self.follow and self.restart_threshold > 0:
            errors = (z - quantized).detach().square().sum(1)
            if self._is_outrun(share, errors):
                self._restart(share == 0, z.detach(), errors)
                codebook, codes, quantized, share = self._nearest(z)

        loss = self.beta * F.mse_loss(z, quantized.detach())
        if self.codebook_update == "gradient":
            loss = loss + F.mse_loss(quantized, z.detach())
        entropy_loss = z.new_zeros(())
        if self.entropy_weight > 0:
            # -|z - c|^2 without |z|^2, which the softmax drops
            terms = assignment_entropy(2 * z, codebook, -codebook.square().sum(1), self.entropy_temperature)
            entropy_loss = self.entropy_weight * terms

        if self.training:
            self._update(z.detach(), codes, share, (z - quantized).detach().square().sum(1))
        return QuantizerOutput(
            quantized=quantized,
            codes=codes,
            loss=loss + entropy_loss,
            entropy_loss=entropy_loss,
            usage=(share > 0).float().mean(),
            perplexity=perplexity(share),
        )

    def _nearest(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor, torch.Tensor, torch.Tensor]:
        """The codebook (K, D), and of vectors (N, D) the codes (N,), the codes' vectors, and the use (K,) of codes."""
        codebook = self.codebook.float()
        codes = nearest_codes(z, codebook)
        return codebook, codes, F.embedding(codes, codebook), self.use_of_codes(codes)

    def _is_outrun(self, share: torch.Tensor, errors: torch.Tensor) -> bool:
        """Whether the vectors have moved away from the codes: a batch uses less than 70 % of the codes that it
        would use if these were used as they were lately. It is so at a training's start, and soon few codes would
        have all vectors.

        Args:
            share: of the codes (K,) in the batch, over all processes.
            errors: squared errors (N,) of this process's vectors.
        """
        error, total = sum_over_processes(torch.stack([errors.sum(), errors.new_tensor(len(errors))]))
        expected = 1.0 - (1.0 - self.cluster_size.clamp(0.0, 1.0)) ** total
        return bool(torch.isfinite(error) & ((share > 0).sum() < 0.7 * expected.sum()))

    def _restart(self, dead: torch.Tensor, flat: torch.Tensor, errors: torch.Tensor) -> None:
        """Put codes, True in (K,), onto vectors of the batch, drawn by their errors, as far as there are some."""
        places = dead.nonzero()[:, 0]
        if len(places):
            flat, errors = gather_rows(flat), gather_rows(errors)
            drawn = self._draw(flat, len(places), errors)
            self._place(places[: len(drawn)], flat[drawn])

    @torch.no_grad()
    def _update(self, flat: torch.Tensor, codes: torch.LongTensor, share: torch.Tensor, errors: torch.Tensor) -> None:
        """Moving averages, the EMA codebook, and the restart of dead codes; not by a batch that is not finite."""
        if not (hasattr(self, "updates") or hasattr(self, "cluster_size")):
            return
        error, total = sum_over_processes(torch.stack([errors.sum(), errors.new_tensor(len(flat))]))
        finite = torch.isfinite(error)
        decay = self.ema_decay
        if self.follow and hasattr(self, "updates"):  # as an EMAModel's
            decay = min(decay, (1 + int(self.updates)) / (10 + int(self.updates)))
        if hasattr(self, "cluster_size"):
            self.cluster_size.lerp_(torch.where(finite, share, self.cluster_size), 1 - decay)
        if self.codebook_update == "ema":
            sums = sum_over_processes(torch.zeros_like(self.cluster_mean).index_add_(0, codes, flat))
            self.cluster_mean.lerp_(torch.where(finite, sums / total, self.cluster_mean), 1 - decay)
            # A code without assignments keeps its place: both averages decay alike.
            moved = (self.cluster_size > 1e-8) & finite
            average = self.cluster_mean / self.cluster_size.clamp_min(1e-8)[:, None]
            self.embedding.weight.copy_(torch.where(moved[:, None], average, self.embedding.weight))
        if self.restart_threshold > 0:
            self._restart(finite & (self.cluster_size < self.restart_threshold / self.num_codes), flat, errors)
        if hasattr(self, "updates"):
            self.updates += finite

    def _draw(self, flat: torch.Tensor, count: int, errors: torch.Tensor | None = None) -> torch.LongTensor:
        """Indices of at most `count` vectors of (N, D), the same on all processes: alike, or by their squared errors
        (N,).

        No two are nearer to one another, or to the code they have, than a thousandth of the vectors' deviation: which
        of two such codes a vector gets would be left to rounding, and with it what they both learn.
        """
        radius = (1e-6 * flat.var(0, correction=0).sum() + 1e-12 * flat.square().sum(1).mean()).sqrt()
        generator = torch.Generator().manual_seed(int(self.updates))
        # The largest of log w + Gumbel noise: weighted sampling without replacement (Efraimidis & Spirakis 2006).
        noise = torch.rand(len(flat), generator=generator, dtype=torch.float64).clamp_min(1e-300)
        keys = -(-noise.log()).log()
        if errors is not None:
            keys = torch.where((errors > radius.square()).cpu(), errors.cpu().double().log() + keys, -torch.inf)
        order = keys.argsort(descending=True)[: keys.isfinite().sum()].to(flat.device)
        return order[rows_apart(flat[order], radius, count)]

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
        if not flat.isfinite().all():
            return  # the next batch will do
        centres = flat[self._draw(flat, self.num_codes)]
        if self.codebook_init == "kmeans":
            for _ in range(iterations):
                codes = nearest_codes(flat, centres)
                counts = torch.bincount(codes, minlength=len(centres))
                sums = torch.zeros_like(centres).index_add_(0, codes, flat)
                filled = counts > 0
                centres[filled] = sums[filled] / counts[filled, None]
        self._place(torch.arange(len(centres), device=flat.device), centres)
