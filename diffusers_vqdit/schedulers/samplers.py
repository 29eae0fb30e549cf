"""Samplers of masked diffusion: the draws of a step, and which masked codes it reveals.

Pure functions: the noise comes from an explicit generator or is an argument.
"""

import functools
import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class SharedGenerator:
    """The rows of one process in what a generator draws for the rows of all, which is the same however many they are.

    Args:
        generator: alike on all processes, each of which draws the same shapes in the same order.
        rank: of this process.
        world_size: processes.
    """

    generator: torch.Generator
    rank: int = 0
    world_size: int = 1


Generators: TypeAlias = torch.Generator | list[torch.Generator] | SharedGenerator | None


def check_device(device: torch.device, remedy: str) -> None:
    """Raise a ValueError for a device without float64, in which codes and masks are drawn."""
    if device.type == "mps":
        raise ValueError(f"codes are drawn in float64, which the device 'mps' doesn't have: {remedy}")


def uniform(shape: torch.Size, generator: Generators, device: torch.device) -> torch.Tensor:
    """Uniform float64 numbers; row i from generator i where there is a list.

    In float32 the smallest numbers are too coarse: Gumbel noise made of them lowers the temperature (Zheng et al.
    2024).
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"generator is a list of {len(generator)}, but there are {shape[0]} rows")
        # Rows of one device are moved together: on a GPU each copy waits.
        sources = {one.device if isinstance(one, torch.Generator) else device for one in generator}
        source = sources.pop() if len(sources) == 1 else device
        return torch.stack([uniform(shape[1:], one, source) for one in generator]).to(device)
    if isinstance(generator, SharedGenerator):
        first, rows = generator.rank * shape[0], generator.world_size * shape[0]
        whole = uniform(torch.Size([rows, *shape[1:]]), generator.generator, generator.generator.device)
        return whole[first : first + shape[0]].to(device)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator={generator!r} must be a torch.Generator or a list of them, one a row")
    source = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=source, dtype=torch.float64).to(device)


def draw_masked(
    logits: torch.Tensor, masked: torch.BoolTensor, noise: torch.Tensor, temperature: float, *, entropy: bool = False
) -> tuple[torch.LongTensor, torch.Tensor, torch.Tensor | None]:
    """[`draw`] at the masked positions, and on request the [`entropies`] there; 0 at all others.

    CPUs draw the masked ones only, a few at a time where they are many: what is gathered then stays in the cache.
    Elsewhere all are drawn, for how many are masked is not known without waiting for the device.

    Args:
        logits: (B, N, K).
        masked: (B, N).
        noise: (B, N) float64, uniform in [0, 1).
        temperature: 0 takes the largest logit.
        entropy: whether to return entropies.

    Returns:
        codes (B, N) int64, (B, N) float64 log-probabilities, and (B, N) float64 entropies or None.
    """
    if logits.device.type != "cpu":
        codes, scores, probabilities = draw(logits.flatten(0, 1), noise.flatten(), temperature)
        found = [codes, scores, *([entropies(probabilities)] if entropy else [])]
        found = [value.view_as(masked).masked_fill(~masked, 0) for value in found]
        return found[0], found[1], found[2] if entropy else None
    size, noise = logits.shape[-1], noise[masked]
    at_once = max(1, len(noise))
    if len(noise) * size > 2**20:
        at_once = max(3, 2**18 // size)
    rows, positions = masked.nonzero(as_tuple=True)
    # Even parts, of two rows or more: PyTorch sums a single one by parts of its own, one a thread, to other bits.
    parts, count = [], max(1, -(-len(noise) // at_once))
    for row, position, part in zip(*(x.tensor_split(count) for x in (rows, positions, noise)), strict=True):
        codes, scores, probabilities = draw(logits[row, position], part, temperature)
        parts.append((codes, scores, *([entropies(probabilities)] if entropy else [])))
    found = [torch.cat(values) for values in zip(*parts, strict=True)]
    found = [value.new_zeros(masked.shape).masked_scatter(masked, value) for value in found]
    return found[0], found[1], found[2] if entropy else None


def draw(
    logits: torch.Tensor, noise: torch.Tensor, temperature: float
) -> tuple[torch.LongTensor, torch.Tensor, torch.Tensor]:
    """Codes (M,) from softmax(logits / temperature) by the inverse of the distribution function, their
    log-probabilities, and the distribution.

    The inverse is looked up first among blocks of about sqrt(K) codes, then within one: only its codes are summed in
    float64.

    Args:
        logits: (M, K).
        noise: (M,) float64, uniform in [0, 1).
        temperature: 0 takes the largest logit.

    Returns:
        codes (M,) int64, (M,) float64 log-probabilities, and (M, K) float32 probabilities, at the temperature given
        (at 1 where that is 0).
    """
    logits = logits.float()
    probabilities = torch.softmax(logits / temperature if temperature not in (0, 1) else logits, dim=-1)  # (M, K)
    if temperature == 0:
        codes = logits.argmax(-1)
    else:
        size = logits.shape[-1]
        width = 1 << ((size - 1).bit_length() + 1) // 2
        blocks = F.pad(probabilities, (0, -size % width)).unflatten(-1, (-1, width))  # (M, blocks, width)
        cumulative = blocks.sum(-1).double().cumsum(-1)  # (M, blocks)
        target = noise[:, None] * cumulative[:, -1:]  # (M, 1)
        # What is NaN is found nowhere: the last is taken, so that no index is out of bounds.
        block = torch.searchsorted(cumulative, target, right=True).clamp_max(cumulative.shape[1] - 1)
        before = F.pad(cumulative, (1, 0)).gather(1, block)
        within = blocks.take_along_dim(block[..., None], 1)[:, 0].double().cumsum(-1)  # (M, width)
        # The two sums of a block differ by rounding: never look beyond the last code that is possible.
        rest = (target - before).minimum(within[:, -1:] * (1 - 2**-53))
        codes = (block * width + torch.searchsorted(within, rest, right=True))[:, 0].clamp_max(size - 1)
    return codes, probabilities.gather(1, codes[:, None])[:, 0].double().log(), probabilities


def entropies(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropies (M,) in nats of distributions (M, K); float64."""
    return torch.special.entr(probabilities).sum(-1, dtype=torch.float64)


def next_reveals(
    masked: torch.Tensor, noise: torch.Tensor, ratios: torch.Tensor, steps_left: torch.LongTensor
) -> tuple[torch.LongTensor, torch.Tensor]:
    """Each row's next step of the ancestral sampler at which a code is revealed, and the codes revealed at it.

    A code masked with j steps left is still masked with k < j left with probability r_k / r_j, whatever the codes are:
    the factors (1 - alpha_s) / (1 - alpha_t) of the reverse process (Sahoo et al. 2024) telescope. So the step
    that reveals it comes from one uniform number. Only the earliest of a row counts; the later ones may be drawn anew,
    for a code that is still masked has no memory.

    Args:
        masked: (B, N) bool.
        noise: (B, N) float64, uniform in [0, 1).
        ratios: (n + 1,) float64, the share of masks with 0, 1, ..., n steps left; increasing from 0.
        steps_left: (B,) int64, the steps each row has left, in [0, n].

    Returns:
        steps left after the revealing step (B,) int64, one less where nothing is masked, and the revealed codes
        (B, N) bool.
    """
    last = (steps_left - 1).clamp_min(0)[:, None]  # (B, 1)
    target = noise * ratios[steps_left][:, None]
    # Masked with k steps left if and only if the noise is below r_k / r_j: revealed at the first k where it is not.
    step = (torch.searchsorted(ratios, target, right=True) - 1).minimum(last)  # (B, N)
    step = step.masked_fill(~masked, -1)
    earliest = step.amax(1, keepdim=True)  # (B, 1)
    return torch.where(earliest < 0, last, earliest)[:, 0], masked & (step == earliest)


def highest(scores: torch.Tensor, count: torch.LongTensor) -> torch.Tensor:
    """Where the `count` (B,) largest of each row's scores (B, N) are; of equal ones the first."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < count[:, None]


def within_entropy_bound(entropy: torch.Tensor, bound: float) -> torch.Tensor:
    """The largest set of each row, by ascending entropy, whose sum of entropies without the largest is within the
    bound (Ben-Hamu et al. 2025, EB-Sampler): this bounds the error of drawing its codes independently. It has at
    least one code.

    Args:
        entropy: (B, N) float64, infinite for codes that can't be in the set.
        bound: in nats, at least 0.

    Returns:
        (B, N) bool.
    """
    ascending, order = entropy.sort(dim=1, stable=True)
    before = F.pad(ascending.cumsum(1)[:, :-1], (1, 0))  # the largest is the last
    within = (before <= bound) & ascending.isfinite()
    return torch.zeros_like(within).scatter(1, order, within)


@functools.lru_cache(maxsize=32)
def halton_order(shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.LongTensor:
    """When each cell of a grid is visited by the Halton sequence (Besnier et al. 2025): its rank among all, (N,).

    The sequence has base 2 along the first axis, 3 along the second and 5 along the third, from index 1 on; a cell
    counts when it is visited first. Along one axis it is the sequence of van der Corput.

    Raises:
        ValueError: for a grid of more than three axes.
    """
    bases = (2, 3, 5)
    if not 1 <= len(shape) <= len(bases):
        raise ValueError(f"shape={shape} must have one to {len(bases)} axes")
    size = math.prod(shape)
    count = 4 * size
    while True:
        cells = torch.zeros(count, dtype=torch.int64)
        for base, length in zip(bases, shape, strict=False):
            # The radical inverse in whole numbers: the digits in reverse over a power of the base
            index, reverse, power = torch.arange(1, count + 1), torch.zeros(count, dtype=torch.int64), 1
            while power <= count:
                reverse, index, power = reverse * base + index % base, index // base, power * base
            cells = cells * length + reverse * length // power
        visited, inverse = cells.unique(return_inverse=True)
        if len(visited) == size:
            break
        count *= 2
    first = torch.full((size,), count).scatter_reduce(0, inverse, torch.arange(count), "amin")
    return first.argsort().argsort().to(device)
