"""An approximate cache of the generated side: what has not changed since the last call is computed every few calls.

In a call of the model most positions are as they were in the one before. Visible codes are needed only for others to
see their keys and values, and masked ones whose prediction is sure hardly change it; both are reused for some calls
(Wu et al. 2025, Fast-dLLM; Liu et al. 2025, dLLM-Cache; Xin et al. 2025, Lumina-DiMOO). Unlike what is given, whose
keys and values are exact, these depend on what has changed: the samples are others.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..utils.checks import check_integer, check_number
from .layers import VQDiTModulation, VQDiTPrefix, expand_segments
from .segment_layers import patchify, segment_patch, unpatchify


@dataclass(frozen=True)
class GenerationCacheConfig:
    """What `enable_cache` of a [`VQDiTTransformer2DModel`] with segments takes.

    Args:
        refresh_interval: every so many calls of a run all positions are computed; between them those whose codes have
            changed, and masked ones. 1 is no cache.
        cache_ratio: the share in [0, 1] of a row's masked positions whose predictions are reused between, too: those
            with the largest logits.

    Raises:
        ValueError: for an argument out of range.
    """

    refresh_interval: int = 4
    cache_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_integer("refresh_interval", self.refresh_interval, 1)
        check_number("cache_ratio", self.cache_ratio, 0, 1)


class GenerationCache:
    """The cache of one run, for the `cache` of the transformer's calls; the rows of a run may become fewer.

    Args:
        config: what is reused, and how long.
    """

    def __init__(self, config: GenerationCacheConfig) -> None:
        self.config = config
        self._rows: torch.LongTensor | None = None
        self._forget()

    def _forget(self) -> None:
        self._calls = 0
        self._guided = False
        self._codes: dict[str, torch.Tensor] = {}  # name -> (R, *shape) of the last call
        self._keys: list[torch.Tensor] = []  # for each layer (G, n, heads, head_dim), G = R, or 2R with guidance
        self._values: list[torch.Tensor] = []
        self._logits: dict[str, torch.Tensor] = {}  # name -> (G, N, K), where predictions are reused
        self._scores: dict[str, torch.Tensor] = {}  # name -> (R, N), the largest logit

    def keep(self, rows: torch.LongTensor) -> None:
        """Say which rows (R,) of the run's batch, ascending, the next call has; new ones begin the cache anew."""
        if self._rows is not None and not torch.equal(rows, self._rows):
            if not torch.isin(rows, self._rows).all():
                self._forget()
            elif self._codes:
                index, size = torch.searchsorted(self._rows, rows), len(self._rows)
                both = torch.cat([index, index + size]) if self._guided else index
                index, both = (x.to(next(iter(self._codes.values())).device) for x in (index, both))
                self._codes, self._scores = (
                    {n: x[index] for n, x in part.items()} for part in (self._codes, self._scores)
                )
                self._logits = {name: x[both] for name, x in self._logits.items()}
                self._keys, self._values = ([x[both] for x in part] for part in (self._keys, self._values))
        self._rows = rows

    def is_due(
        self, codes: dict[str, torch.Tensor], masked: dict[str, torch.Tensor] | None, with_unconditional: bool
    ) -> bool:
        """Whether all positions are to be computed in a call; begins anew where it is another run's.

        Raises:
            ValueError: if `masked` asks for the logits of some codes.
        """
        if masked is not None:
            raise ValueError("give masked or cache, not both: a cache has the logits of all codes")
        shapes = {name: value.shape for name, value in codes.items()}
        if shapes != {n: x.shape for n, x in self._codes.items()} or with_unconditional != self._guided:
            self._forget()
            self._guided = with_unconditional
        due = self._calls % self.config.refresh_interval == 0
        self._calls += 1
        return due

    def store(
        self, codes: dict[str, torch.Tensor], kept: list[tuple[torch.Tensor, torch.Tensor]], logits: dict
    ) -> None:
        """Keep what a call of all positions has: codes, keys and values by layer, and logits (G, N, K)."""
        # The caller's may be changed in place.
        self._codes = {name: value.clone() for name, value in codes.items()}
        self._keys, self._values = (list(part) for part in zip(*kept, strict=True))
        if self.config.cache_ratio:
            rows = len(next(iter(codes.values())))
            self._logits, self._scores = dict(logits), {n: x[:rows].amax(-1) for n, x in logits.items()}

    # -----------------------------------------------------------------------------------------------------------------

    def predict(
        self,
        model: Any,
        codes: dict[str, torch.LongTensor],
        prefix: VQDiTPrefix | None,
        conditioning: torch.Tensor,
        modulation: VQDiTModulation | None,
    ) -> dict[str, torch.Tensor]:
        """Logits (G, N, K) by segment from the positions that are to be computed, at masked codes; elsewhere they are
        0 or as before.

        Args:
            model: the transformer.
            codes: name -> (R, *shape), of the segments and rows that [`store`] had.
            prefix, conditioning, modulation: as in the transformer's ``forward``, the conditioning (1 or R, segments,
                D).
        """
        active = self._active(model, codes)  # (R, n)
        hidden, lengths, rotary = model._embed(codes, prefix.offsets if prefix is not None else {})  # (R, n, D)
        if self._guided:
            active, hidden = torch.cat([active, active]), torch.cat([hidden, hidden])
            conditioning = torch.cat([conditioning] * 2) if len(conditioning) > 1 else conditioning
        rows, size = active.shape
        counts = active.sum(1)
        most, least = (int(x) for x in torch.stack([counts.max(), counts.min()]).tolist())
        order = (~active).byte().argsort(dim=1, stable=True)  # the active ones first
        place, rest = order[:, :most], order[:, least:]  # (G, A), (G, I); what is too many is seen by nothing
        real = torch.arange(most, device=active.device) < counts[:, None]
        mask = None
        if most > least or prefix is not None and (self._guided or prefix.mask is not None):
            still = torch.arange(least, size, device=active.device) >= counts[:, None]
            mask = torch.cat([*self._seen(prefix, rows), still[:, None, None], real[:, None, None]], dim=-1)
        part = _taken(hidden, place)  # (G, A, D)
        tables = None if rotary is None else tuple(_taken(x[None].expand(rows, -1, -1), place) for x in rotary)
        for layer, block in enumerate(model.transformer_blocks):
            own = modulation.blocks[layer] if modulation is not None else block(None, conditioning)
            if len(lengths) > 1:
                own = _taken(expand_segments(own, lengths).expand(rows, -1, -1), place)  # (G, A, 6D)
            memory = self._memory(layer, prefix, rest)
            part, key, value = model._block(block, part, conditioning, (most,), memory, False, tables, mask, own)
            for kept, new in ((self._keys, key), (self._values, value)):
                kept[layer] = kept[layer].clone()
                kept[layer][active] = new[real]
        states = hidden.new_zeros(hidden.shape).to(part)
        states[active] = part[real]
        self._codes = {name: value.clone() for name, value in codes.items()}
        return self._heads(model, codes, states, active, lengths, conditioning, modulation)

    def _active(self, model: Any, codes: dict[str, torch.Tensor]) -> torch.BoolTensor:
        """The positions (R, n) to compute: those that changed, and of the masked ones those that are least sure."""
        changed, masked, scores = [], [], []
        for name, value in codes.items():
            size, patch = model.config.segments[name]["vocab_size"], segment_patch(model.config.segments, name)
            new, old = patchify(value, patch), patchify(self._codes[name], patch)  # (R, n, P)
            changed.append((new != old).any(-1))
            masked.append((new == size).any(-1))
            if self.config.cache_ratio:
                score = patchify(self._scores[name].view_as(value), patch).float()
                scores.append(score.masked_fill(new != size, math.inf).amin(-1))  # of the code that is least sure
        change, waiting = torch.cat(changed, 1), torch.cat(masked, 1)
        if not self.config.cache_ratio:
            return change | waiting
        waiting = waiting & ~change
        needed = torch.ceil(waiting.sum(1) * (1 - self.config.cache_ratio))
        rank = torch.cat(scores, 1).masked_fill(~waiting, math.inf).argsort(dim=1, stable=True).argsort(dim=1)
        return change | (waiting & (rank < needed[:, None]))

    @staticmethod
    def _seen(prefix: VQDiTPrefix | None, rows: int) -> list[torch.Tensor]:
        """What the rows see of what is given (G, 1, 1, S): those without it nothing."""
        if prefix is None:
            return []
        seen = prefix.mask
        if seen is None:
            seen = torch.ones(
                len(prefix), 1, 1, prefix.keys[0].shape[1], dtype=torch.bool, device=prefix.keys[0].device
            )
        return [seen if rows == len(seen) else torch.cat([seen, torch.zeros_like(seen)])]

    def _memory(self, layer: int, prefix: VQDiTPrefix | None, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (G, S + I, heads, head_dim) of what is given, and of the positions that are reused."""
        found = []
        for own, kept in ((self._keys, prefix and prefix.keys), (self._values, prefix and prefix.values)):
            value = own[layer].flatten(2)
            value = _taken(value, rest).unflatten(-1, own[layer].shape[2:])
            if kept:
                given = kept[layer]
                given = given if len(given) == len(value) else torch.cat([given, torch.zeros_like(given)])
                value = torch.cat([given, value], dim=1)
            found.append(value)
        return found[0], found[1]

    def _heads(
        self,
        model: Any,
        codes: dict[str, torch.LongTensor],
        states: torch.Tensor,
        active: torch.BoolTensor,
        lengths: tuple[int, ...],
        conditioning: torch.Tensor,
        modulation: VQDiTModulation | None,
    ) -> dict[str, torch.Tensor]:
        out = model.adaln_out(conditioning) if modulation is None else modulation.out  # (1 or G, segments, 2D)
        found = {}
        parts = zip(codes, states.split(lengths, dim=1), active.split(lengths, dim=1), strict=True)
        for index, (name, part, where) in enumerate(parts):
            segments, shape = model.config.segments, codes[name].shape[1:]
            shift, scale = out[:, index : index + 1].chunk(2, dim=-1)  # (1 or G, 1, D)
            patch, size = segment_patch(segments, name), segments[name]["vocab_size"]
            spread = where[..., None, None].expand(-1, -1, math.prod(patch), 1)
            missing = (codes[name].flatten(1) == size).repeat(len(where) // len(codes[name]), 1)
            where = unpatchify(spread, shape, patch)[..., 0] & missing  # (G, N)
            new = model._logits(name, part, shift, scale, shape, where)  # (M, K)
            logits = self._logits[name].clone() if self._logits else new.new_zeros(*where.shape, size)
            logits[where] = new.to(logits)
            if self._logits:
                own = where[: len(codes[name])]
                self._logits[name] = logits
                self._scores[name] = self._scores[name].masked_scatter(own, new[: int(own.sum())].amax(-1))
            found[name] = logits
        return found


def _taken(values: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """Values (G, n, D) at places (G, A) of each row, as (G, A, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
