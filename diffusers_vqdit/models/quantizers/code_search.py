"""The search for the best code of each vector: exact, in float32, never all scores at once; and for rows apart."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F


SEARCH_ELEMENTS = 2**22  # scores held at once by the search: 16 MiB of float32
CACHED_ELEMENTS = 2**18  # scores that a CPU's second cache holds: 1 MiB of float32


def first_largest(scores: torch.Tensor) -> torch.LongTensor:
    """`scores.argmax(1)` of (N, K), the first of equal ones: the maxima of blocks first, then the place within one.

    PyTorch's maximum along rows is vectorized on CPUs, its argmax isn't; a GPU's argmax is one kernel, and fast.
    """
    if scores.device.type != "cpu":
        return scores.argmax(1)
    width = 128
    if scores.shape[1] % width:
        scores = F.pad(scores, (0, -scores.shape[1] % width), value=-torch.inf)
    blocks = scores.unflatten(1, (-1, width))  # (N, K / width, width)
    block = blocks.amax(2).argmax(1)  # (N,)
    within = blocks.take_along_dim(block[:, None, None], 1)[:, 0]  # (N, width)
    return block * width + within.argmax(1)


def search_rows(vectors: torch.Tensor, num_codes: int) -> int:
    """How many vectors (N, D) to score at once: on CPUs so few, where D is small, that the scores stay in the cache;
    a long product needs more rows instead."""
    rows = max(1, SEARCH_ELEMENTS // num_codes)
    if vectors.device.type == "cpu" and vectors.shape[1] <= 32:
        rows = min(rows, max(16, CACHED_ELEMENTS // num_codes))
    return rows


def best_codes(vectors: torch.Tensor, codebook: torch.Tensor, offset: torch.Tensor | None = None) -> torch.LongTensor:
    """Index (N,) of the row c of the codebook (K, D) with the largest z.c + offset for each vector z (N, D).

    The search runs in float32 whatever the input (bfloat16 would flip some 3 % of the codes) and whether or not TF32
    is allowed, a few rows at a time; ties go to the lowest index.
    """
    with torch.autocast(device_type=vectors.device.type, enabled=False), _without_tf32():
        codebook = codebook.detach().float()
        offset = codebook.new_zeros(len(codebook)) if offset is None else offset.detach().float()
        rows = search_rows(vectors, len(codebook))
        parts = [
            first_largest(torch.addmm(offset, chunk, codebook.T)) for chunk in vectors.detach().float().split(rows)
        ]  # (rows, K) -> (rows,)
    return torch.cat(parts)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Products of matrices in float32 as it is; a compiled model has what is allowed when it is compiled."""
    allowed = not torch.compiler.is_compiling() and torch.backends.cuda.matmul.allow_tf32
    if allowed:
        torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        if allowed:
            torch.backends.cuda.matmul.allow_tf32 = True


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.LongTensor:
    """Index of the codebook row nearest to each vector; ties go to the lowest index.

    |z - c|^2 = |z|^2 - 2 (z.c - |c|^2 / 2), so the nearest code has the largest z.c - |c|^2 / 2.

    Args:
        vectors: (N, D).
        codebook: (K, D).

    Returns:
        (N,) int64.
    """
    return best_codes(vectors, codebook, -0.5 * codebook.detach().float().square().sum(1))


def rows_apart(rows: torch.Tensor, radius: torch.Tensor | float, count: int) -> torch.LongTensor:
    """Indices (M,), M <= `count`, of the first rows of (N, D) that have no earlier row within `radius`."""
    found, kept = [torch.zeros(0, dtype=torch.int64, device=rows.device)], rows[:0]
    size = max(1, SEARCH_ELEMENTS // max(count, 2048))
    for start in range(0, len(rows), size):
        if len(kept) >= count:
            break
        part = rows[start : start + size]
        near = _distances(part, part).le(radius).tril(-1).any(1) | _distances(part, kept).le(radius).any(1)
        found.append(start + (~near).nonzero()[:, 0])
        kept = torch.cat([kept, part[~near]])
    return torch.cat(found)[:count]


def _distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    # By differences: the faster way by products is off by more than the distances that matter here.
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
