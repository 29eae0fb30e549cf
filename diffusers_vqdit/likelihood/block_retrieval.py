"""The part of retrieval that is of texts by blocks: items of a gallery, or queries, of lengths of their own."""

from typing import Any

import torch

from ..models.layers import VQDiTPrefix
from ..models.transformer_vqdit import VQDiTTransformer2DModel
from .block_bounds import block_log_probabilities
from .gallery import GalleryIndex


def text_mask(codes: torch.LongTensor, lengths: torch.Tensor | None) -> torch.BoolTensor | None:
    """Which of codes (B, n) belong to texts of these lengths (B,); None for all."""
    if lengths is None:
        return None
    return torch.arange(codes.shape[1], device=codes.device) < lengths.to(codes.device)[:, None]


def given_items(gallery: GalleryIndex, items: torch.LongTensor, codes: torch.LongTensor) -> list[dict[str, Any]]:
    """Some of a gallery's items as what is given, and their mask where they have one."""
    mask = text_mask(codes, None if gallery.lengths is None else gallery.lengths[items])
    return [{gallery.segment: one} for one in (codes, mask) if one is not None]


def scores_of_texts(
    transformer: VQDiTTransformer2DModel,
    gallery: GalleryIndex,
    places: torch.LongTensor,
    prefix: VQDiTPrefix,
    batch_size: int,
) -> torch.Tensor:
    """PMI (B, shortlist) of texts by blocks: each candidate's log p given its query, less that given nothing, which is
    computed once for a gallery."""
    key = "items", transformer.device, torch.is_autocast_enabled(transformer.device.type)
    known = gallery._marginals.setdefault(key, torch.full((len(gallery),), float("nan")))
    of_items: Any = gallery.lengths

    def log_p(items: torch.LongTensor, given: VQDiTPrefix | None) -> torch.Tensor:
        codes, lengths = gallery.codes[items].long().to(transformer.device), of_items[items].long()
        return block_log_probabilities(
            transformer, gallery.segment, codes, lengths, given, batch_size=batch_size
        ).cpu()

    items = places.unique()
    missing = items[known[items].isnan()]
    if len(missing):
        known[missing] = log_p(missing, None)
    return torch.stack([log_p(own, prefix.select(slice(row, row + 1))) - known[own] for row, own in enumerate(places)])


def scores_given_items(
    transformer: VQDiTTransformer2DModel,
    gallery: GalleryIndex,
    places: torch.LongTensor,
    query: torch.LongTensor,
    lengths: torch.LongTensor,
    batch_size: int,
    *,
    marginal: bool,
) -> torch.Tensor:
    """log p (B, shortlist) of queries that are texts by blocks, given each candidate; with `marginal` less that given
    nothing."""
    options = {"batch_size": batch_size}
    scores = torch.zeros(places.shape)
    if marginal:
        scores -= block_log_probabilities(transformer, gallery.query, query, lengths, None, **options).cpu()[:, None]
    for part in places.unique().split(batch_size):
        codes = gallery.codes[part].long().to(query.device)
        prefix = transformer.encode_prefix(*given_items(gallery, part, codes))
        for index, item in enumerate(part.tolist()):
            rows, columns = (places == item).nonzero(as_tuple=True)
            own, alone = query[rows.to(query.device)], prefix.select(slice(index, index + 1))
            found = block_log_probabilities(
                transformer, gallery.query, own, lengths[rows.to(lengths.device)], alone, **options
            )
            scores[rows, columns] += found.cpu()
    return scores
