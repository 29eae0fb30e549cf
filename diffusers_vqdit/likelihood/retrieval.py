"""Retrieval: a gallery's codes and features, and the pointwise mutual information (PMI) that ranks it for a query.

With all codes of the generated segment masked, one forward pass gives log p(code at position i | given) for all codes
and positions. The sum over a candidate's codes is its likelihood in one-step generation, and less the same sum
without anything given it is a PMI. The head is linear, so it is an inner product:

    sum over i of log p(c_i | x) - log p(c_i) = sum over i of <h_i(x) - h_i, w(c_i)> - (Z_i(x) - Z_i)

with the head's inputs h_i(x) and h_i (nothing given), its rows w and the log-sum-exps Z. So what is given has a vector
of N D numbers, what is generated another, and a gallery of either is searched by inner products (Jegou et al. 2011,
product quantization, use the same asymmetry: one side is codes). The vectors are projected onto the gallery's first
principal components for a shortlist, which is then ranked by the sums themselves, both ways where both are known.

A text by blocks is generated block by block, each in one step given those before it
([`~likelihood.block_bounds.block_log_probabilities`]). Only the first block's part of its PMI is an inner product:
where it is generated, the shortlist is by that, and the rank by all blocks.
"""

import itertools
import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput

from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..tasks import Task, check_task
from ..utils.checks import check_integer, shown
from .block_retrieval import given_items, scores_given_items, scores_of_texts, text_mask
from .bounds import check_logits
from .gallery import GalleryIndex, transformer_digest


NUM_FEATURES = 256
FIT_SIZE = 1024  # items that the principal components are fitted to


@dataclass
class RetrievalOutput(BaseOutput):
    """What [`VQDiTPipeline.retrieve`] found, best first.

    Args:
        indices (`torch.LongTensor` of shape `(B, top_k)`): places in the gallery.
        scores (`torch.Tensor` of shape `(B, top_k)`): float32 PMI in nats, summed over the directions that the
            checkpoint knows. Comparable among the items of one query; among queries only where all marginals of
            these directions are known.
    """

    indices: torch.LongTensor
    scores: torch.Tensor


def directions(tasks: list[str], query: str, gallery: str) -> list[Task]:
    """The tasks whose likelihoods rank a gallery's items for a query.

    The query's marginal is the same for all items. An item's is not, so that ``query->gallery`` needs ``->gallery``.

    Raises:
        ValueError: if the checkpoint knows none of them.
    """
    known = {Task.parse(task) for task in tasks}
    ways = [way for way in (Task((gallery,), (query,)), Task((query,), (gallery,))) if way in known]
    ways = [way for way in ways if way.generated == (query,) or Task((), way.generated) in known]
    if not ways:
        check_task(Task((gallery,), (query,)), tasks)
    return ways


def _at_once(segment: dict[str, Any], shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The shape of the codes of which one forward pass tells all: the segment's own, or another grid's `shape`; of
    texts by blocks those of the first."""
    return (segment["block_length"],) if "block_length" in segment else tuple(shape or segment["shape"])


@torch.no_grad()
def all_masked(
    transformer: VQDiTTransformer2DModel,
    segment: str,
    given: dict[str, torch.Tensor] | None = None,
    given_mask: dict[str, torch.Tensor] | None = None,
    shape: tuple[int, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head of a wholly masked segment gets and gives: states (B, N, D) and log p (B, N, K), float32. Of texts
    by blocks it is the first block. `shape` is that of the codes where they are not on the segment's own grid.

    D is the width of a code's state: the model's, or a part of it where a position holds several codes.

    Without `given`, one row. A time-conditioned model sees the time 1, when all is masked.
    """
    config = transformer.config.segments[segment]
    size = len(next(iter(given.values()))) if given else 1
    device = next(iter(given.values())).device if given else transformer.device
    codes = torch.full((size, *_at_once(config, shape)), config["vocab_size"], device=device)
    states, thread = [], threading.get_ident()

    def record(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if threading.get_ident() == thread:  # calls in other threads go through the same head
            states.append(inputs[0])

    handle = transformer.heads[config.get("shared_with", segment)].register_forward_pre_hook(record)
    try:
        timestep = torch.ones(size, device=device) if transformer.config.time_conditioned else None
        logits = transformer({segment: codes}, timestep=timestep, given=given, given_mask=given_mask).sample[segment]
    finally:
        handle.remove()
    check_logits(logits)
    return states[0].float(), logits.float().log_softmax(-1)


def _marginal(
    transformer: VQDiTTransformer2DModel, gallery: GalleryIndex, segment: str, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`all_masked`] with nothing given: computed once for a gallery, as it is of one model."""
    device = transformer.device
    key = segment, device, torch.is_autocast_enabled(device.type)
    if key not in gallery._marginals:
        gallery._marginals[key] = all_masked(transformer, segment, shape=shape)
    return gallery._marginals[key]


def _shapes(transformer: VQDiTTransformer2DModel, gallery: GalleryIndex) -> dict[str, tuple[int, ...]]:
    """Of the codes of which one forward pass tells all, by segment of a gallery."""
    segments = transformer.config.segments
    own = {gallery.segment: tuple(gallery.codes.shape[1:]), gallery.query: gallery.query_shape}
    return {name: _at_once(segments[name], shape) for name, shape in own.items() if "shape" in segments[name]}


def at_codes(table: torch.Tensor, codes: torch.LongTensor) -> torch.Tensor:
    """Sums (...) over the positions of a table (..., N, K) at codes (..., N)."""
    return table.gather(-1, codes[..., None]).sum((-2, -1))


def check_items(
    name: str,
    codes: torch.LongTensor,
    transformer: VQDiTTransformer2DModel,
    segment: str,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Raise a ValueError unless there are codes (B, *shape) of a segment, one item or more; `shape` is its own, or
    that of another grid."""
    segments = transformer.config.segments or {}
    if segment not in segments:
        raise ValueError(f"{segment!r} is no segment; this model has {list(segments)}")
    shape, size = tuple(shape or segments[segment]["shape"]), segments[segment]["vocab_size"]
    fits = isinstance(codes, torch.Tensor) and codes.dtype in (torch.int64, torch.int32) and codes.ndim > 1
    if fits and "block_length" in segments[segment]:
        shape = tuple(codes.shape[1:])  # of any length
    if not fits or codes.shape[1:] != shape or not len(codes):
        found = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, torch.Tensor) else shown(codes)
        expected = f"(B, {', '.join(map(str, shape))}) of {segment!r}"
        raise ValueError(f"{name} must be int64 or int32 codes {expected}, got {found}")
    if codes.min() < 0 or codes.max() >= size:
        raise ValueError(f"{name} must be in [0, {size}), got {int(codes.min())} to {int(codes.max())}")


def _vectors(
    transformer: VQDiTTransformer2DModel,
    way: Task,
    segment: str,
    codes: torch.LongTensor,
    mask: torch.BoolTensor | None = None,
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """The vectors (B, N * D) of items on their side of `way`: head inputs where given, head rows where generated.
    `mask` (B, n) is zero at the padding of texts by blocks, `shape` the grid of what is generated, where it isn't its
    own."""
    generated = way.generated[0]
    if way.given == (segment,):
        masks = None if mask is None else {segment: mask}
        return all_masked(transformer, generated, {segment: codes}, masks, shape)[0].flatten(1)
    shape = _at_once(transformer.config.segments[generated], shape)
    head, places = _head(transformer, generated, shape, codes.device)
    rows = head.weight.detach().to(codes.device, torch.float32)  # nothing has brought offloaded ones there
    return rows[(*places, codes.flatten(1)[:, : math.prod(shape)])].flatten(1)


def _head(
    transformer: VQDiTTransformer2DModel, segment: str, shape: tuple[int, ...], device: torch.device
) -> tuple[torch.nn.Module, tuple[torch.LongTensor, ...]]:
    """A segment's head, and what it takes besides states: where the codebooks of a patch differ, which one (N,)."""
    places = transformer._places(segment, shape, device)
    return transformer.heads[transformer.config.segments[segment].get("shared_with", segment)], places


@torch.no_grad()
def build_index(
    transformer: VQDiTTransformer2DModel,
    codes: torch.LongTensor,
    segment: str,
    query: str,
    *,
    batch_size: int = 64,
    lengths: torch.LongTensor | None = None,
    shape: tuple[int, ...] | None = None,
    query_shape: tuple[int, ...] | None = None,
    model: str | None = None,
) -> GalleryIndex:
    """Index a gallery.

    The features stand for the way that generates more codes, which told items apart better in both directions of
    search. They are the first principal components of the items' vectors, as many as `NUM_FEATURES`. Where an item is
    given, its normalisers Z are taken from the projected states: the exact ones would not cancel what is projected
    away, and sum to far more than items differ by.

    Args:
        transformer: a model with both segments.
        codes: (G, *shape) int64, of the items.
        segment, query: the segment of the items and that of the queries.
        batch_size: items a forward pass.
        lengths: (G,), the codes of each item that is a text by blocks, in whole blocks; None for all of them.
        shape, query_shape: of the items' and the queries' codes, where they are not on the segments' own grids.
        model: [`transformer_digest`] where it is known already.

    Raises:
        ValueError: if the checkpoint knows no task between the two segments that ranks items, or codes don't fit.
    """
    batch_size = check_integer("batch_size", batch_size, 1)
    check_items("codes", codes, transformer, segment, shape)
    codes = codes.long()
    ways = directions(transformer.config.tasks or [], query, segment)
    grids = {segment: shape, query: query_shape}
    shapes = {way: _at_once(transformer.config.segments[way.generated[0]], grids[way.generated[0]]) for way in ways}
    if lengths is None and "block_length" in transformer.config.segments[segment]:
        lengths = torch.full((len(codes),), codes.shape[1])
    mask = text_mask(codes, lengths)

    def vectors_of(part: torch.LongTensor) -> torch.Tensor:
        return _vectors(transformer, way, segment, codes[part], None if mask is None else mask[part], shapes[way])

    way = max(ways, key=lambda way: math.prod(shapes[way]))
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0)).to(codes.device)
    chosen, others = order[:FIT_SIZE], order[FIT_SIZE:]
    sample = torch.cat([vectors_of(part) for part in chosen.split(batch_size)])
    if not sample.isfinite().all():
        raise ValueError("the transformer's features of the gallery are not finite")
    mean = sample.mean(0)
    sample = sample - mean
    # The covariance has (N D)^2 entries, the Gram matrix of the sample as many as items squared; they share spectra.
    values, axes = torch.linalg.eigh((sample @ sample.T).double())
    kept = (values > 1e-6 * values[-1].clamp_min(1e-12)).nonzero()[-NUM_FEATURES:, 0]
    basis = (sample.T @ (axes[:, kept] / values[kept].sqrt()).float()).half()  # (N D, R)
    head, places = _head(transformer, way.generated[0], shapes[way], codes.device)
    # What was computed for the fit is not computed again.
    rest = (vectors_of(part) - mean for part in others.split(batch_size) if len(part))
    features, bias = [], []
    for vectors in itertools.chain(sample.split(batch_size), rest):
        features.append((vectors @ basis.float()).half())
        if way.given == (segment,):
            states = mean + features[-1].float() @ basis.float().T
            logits = head(states.view(len(states), math.prod(shapes[way]), -1).to(head.weight.dtype), *places).float()
            bias.append(-logits.logsumexp(-1).sum(1))
        else:
            bias.append(torch.zeros(len(vectors), device=codes.device))
    small = torch.int16 if transformer.config.segments[segment]["vocab_size"] <= 2**15 else torch.int32
    return GalleryIndex(
        segment=segment,
        query=query,
        way=str(way),
        model=model or transformer_digest(transformer),
        codes=codes.to(small).cpu(),
        features=torch.cat(features)[order.argsort()].cpu(),
        bias=torch.cat(bias)[order.argsort()].cpu(),
        basis=basis.cpu(),
        lengths=None if lengths is None else lengths.to("cpu", torch.int32),
        query_shape=query_shape,
    )


@torch.no_grad()
def retrieve(
    transformer: VQDiTTransformer2DModel,
    query: torch.LongTensor,
    gallery: GalleryIndex,
    *,
    top_k: int,
    shortlist: int,
    batch_size: int = 64,
    query_mask: torch.Tensor | None = None,
) -> RetrievalOutput:
    """Rank a gallery for queries (B, *shape): a shortlist by features, then PMI in all [`directions`] together.

    Queries may be states (B, n, channels) of an encoder, too, or texts by blocks (B, n), with `query_mask` (B, n) that
    is zero at padding.

    A query's log p at all codes is one forward pass, for any number of candidates, unless these are texts by blocks:
    each is then one of its own. Where candidates are given, each that stands on any shortlist is computed once for all
    queries.

    Of a gallery in parts those of the queries' grid are searched, each for its best, which their PMI ranks together.

    Raises:
        ValueError: if the index is another model's, or `top_k` or `shortlist` doesn't fit.
    """
    if not isinstance(gallery, GalleryIndex):
        raise ValueError(f"gallery={shown(gallery)} must be a GalleryIndex, such as pipe.index makes")
    for part in gallery.parts:
        _check_part(transformer, part)
    if {part.model for part in gallery.parts} != {transformer_digest(transformer)}:
        raise ValueError("gallery was indexed with another model, or in another dtype; index it with this one")
    parts = gallery.parts
    if "channels" not in transformer.config.segments[gallery.query]:
        grid = tuple(query.shape[1:]) if isinstance(query, torch.Tensor) else ()
        parts = [part for part in parts if part.query_shape in (None, grid)]
        check_items("query", query, transformer, gallery.query, (parts or gallery.parts)[0].query_shape)
        query = query.long()
    batch_size = check_integer("batch_size", batch_size, 1)
    top_k = check_integer("top_k", top_k, 1, len(gallery))
    shortlist = check_integer("shortlist", shortlist, top_k)
    found = []
    for part in parts:
        size = len(part.codes)
        sizes = {"top_k": min(top_k, size), "shortlist": min(shortlist, size)}
        one = _retrieve_part(transformer, query, part, **sizes, batch_size=batch_size, query_mask=query_mask)
        found.append((one.scores, one.indices if part.places is None else part.places[one.indices]))
    scores, indices = (torch.cat(values, dim=1) for values in zip(*found, strict=True))
    best, order = scores.sort(dim=1, descending=True, stable=True)
    return RetrievalOutput(indices=indices.gather(1, order)[:, :top_k], scores=best[:, :top_k])


def _check_part(transformer: VQDiTTransformer2DModel, gallery: GalleryIndex) -> None:
    """Raise a ValueError unless a part of a gallery has codes that the model's can be."""
    segments = transformer.config.segments or {}
    for name in (gallery.segment, gallery.query):
        if name not in segments:
            raise ValueError(f"gallery has the segment {name!r}; this model has {list(segments)}")
    geometry, blocks = segments[gallery.segment], gallery.lengths is not None
    fits = blocks == ("block_length" in geometry) and gallery.codes.max() < geometry["vocab_size"]
    if not fits or not blocks and gallery.codes.ndim != 1 + len(geometry["shape"]):
        raise ValueError(
            f"gallery has codes of shape {tuple(gallery.codes.shape[1:])} up to {int(gallery.codes.max())}; this "
            f"model's {gallery.segment!r} is {segments[gallery.segment]}: index the gallery with this model"
        )


def _retrieve_part(
    transformer: VQDiTTransformer2DModel,
    query: torch.LongTensor,
    gallery: GalleryIndex,
    *,
    top_k: int,
    shortlist: int,
    batch_size: int,
    query_mask: torch.Tensor | None,
) -> RetrievalOutput:
    """[`retrieve`] from one part of a gallery, with places in it."""
    segments, tasks = transformer.config.segments, transformer.config.tasks or []
    ways = directions(tasks, gallery.query, gallery.segment)
    way = Task.parse(gallery.way)
    if way not in ways:
        raise ValueError(
            f"gallery has the way {gallery.way!r}; this model has {[str(one) for one in ways]}: index "
            "the gallery with this model"
        )
    shapes = _shapes(transformer, gallery)
    width = _head(transformer, way.generated[0], shapes[way.generated[0]], query.device)[0].weight.shape[-1]
    expected = math.prod(shapes[way.generated[0]]) * width
    if len(gallery.basis) != expected:
        raise ValueError(
            f"gallery has a basis of {len(gallery.basis)} rows, but this model {expected}: index the gallery with "
            "this model"
        )
    known = {Task.parse(task) for task in tasks}
    free: dict[Task, Any] = {
        way: _marginal(transformer, gallery, way.generated[0], shapes[way.generated[0]])
        if Task((), way.generated) in known
        else None
        for way in ways
    }

    # 1. Shortlist, and the query's own log p while its states are at hand
    forward, backward = Task((gallery.query,), (gallery.segment,)), Task((gallery.segment,), (gallery.query,))
    places, scores = [], []
    masks = [None] * len(query) if query_mask is None else query_mask.split(batch_size)
    for part, mask in zip(query.split(batch_size), masks, strict=False):
        given = [None if one is None else {gallery.query: one} for one in (part, mask)]
        at_once = forward in ways and (way == forward or gallery.lengths is None)
        states, table = (
            all_masked(transformer, gallery.segment, *given, shapes[gallery.segment]) if at_once else (0, 0)
        )
        if way == forward:
            vectors = (states - free[forward][0]).flatten(1)
        else:
            vectors = _vectors(transformer, way, gallery.query, part, None, shapes[gallery.query])
        found = gallery.search(vectors.cpu() @ gallery.basis.float(), shortlist)  # (b, shortlist)
        places.append(found)
        score = torch.zeros(found.shape)
        if forward in ways and gallery.lengths is not None:
            prefix = transformer.encode_prefix(*given)
            score = scores_of_texts(transformer, gallery, found, prefix, batch_size)
        elif forward in ways:
            table = table - free[forward][1]
            codes = gallery.codes.flatten(1)[found].long().to(table.device)  # (b, shortlist, N)
            score = torch.stack(
                [at_codes(one.expand(len(own), -1, -1), own) for one, own in zip(table, codes, strict=True)]
            )
        scores.append(score.cpu())
    places, scores = torch.cat(places), torch.cat(scores)

    # 2. The query's log p given each candidate
    if backward in ways and "block_length" in segments[gallery.query]:
        lengths = torch.full((len(query),), query.shape[1]) if query_mask is None else query_mask.sum(1)
        scores += scores_given_items(
            transformer, gallery, places, query, lengths, batch_size, marginal=free[backward] is not None
        )
    elif backward in ways:
        flat = query.flatten(1)
        for part in places.unique().split(batch_size):
            codes = gallery.codes[part].long().to(query.device)
            own_items = given_items(gallery, part, codes)
            table = all_masked(transformer, gallery.query, *own_items, shape=shapes[gallery.query])[1]
            if free[backward] is not None:
                table = table - free[backward][1]
            for item, one in zip(part.tolist(), table, strict=True):
                rows, columns = (places == item).nonzero(as_tuple=True)
                own = flat[rows.to(flat.device)]
                scores[rows, columns] += at_codes(one.expand(len(own), -1, -1), own).cpu()

    # 3. Rank
    best, order = scores.sort(dim=1, descending=True, stable=True)
    return RetrievalOutput(indices=places.gather(1, order)[:, :top_k], scores=best[:, :top_k])
