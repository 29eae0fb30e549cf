"""Retrieval from a gallery of texts, pictures or whatever segments there are."""

from typing import Any

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput

from ..likelihood.gallery import GalleryIndex, tokenizers_digest, transformer_digest
from ..likelihood.retrieval import RetrievalOutput, build_index, retrieve
from ..tasks import Task
from ..utils.checks import check_integer, shown
from .inputs_mixin import InputsMixin
from .ready_codes import are_codes, check_codes_dtype, encode_one_each, read_value
from .segment_base import IMAGE, TEXT, SegmentProcessor, bucket_shape
from .sizes_mixin import in_order


class RetrievalMixin(InputsMixin):
    """The part of [`VQDiTPipeline`] that indexes galleries and searches them."""

    @torch.no_grad()
    def index(
        self,
        prompt: list[str] | None = None,
        image: PipelineImageInput | None = None,
        *,
        inputs: dict[str, Any] | None = None,
        query: str | None = None,
        batch_size: int = 64,
    ) -> GalleryIndex:
        """Index a gallery of texts, for queries by pictures, or of pictures, for queries by texts; or of any segment,
        for queries by any other.

        Args:
            prompt, image, inputs: the items, of one segment; as in [`__call__`].
            query: the segment of the queries. By default ``text`` for ``image`` and the other way round, and the only
                one that the checkpoint knows a task of for others.
            batch_size: items a forward pass.

        Returns:
            [`~likelihood.gallery.GalleryIndex`]: 0.7 kB a picture of 64 codes for each grid of the queries; ``save``
            and ``load`` it. Texts by blocks are ranked by all of them; where the checkpoint only generates them, the
            shortlist is by the first.

        Raises:
            ValueError: for an empty gallery, or a checkpoint that knows no task between items and queries.
        """
        self._check_device()
        items = self._passed(prompt, image, None, inputs)
        if len(items) != 1:
            raise ValueError(
                f"give prompt or image, one of them, or one segment's inputs: a gallery holds the items of one "
                f"segment, got {sorted(items)}"
            )
        batch_size = check_integer("batch_size", batch_size, 1)
        ((segment, values),) = items.items()
        query = self._query_segment(segment) if query is None else self._segment(query).name
        processor = self._segment(segment)
        if not are_codes(processor, values) or processor.has_length:
            self._check_components(segment, f"a gallery of {segment} codes")
        if processor.given_only:
            raise ValueError(f"{segment!r} has states of an encoder; a gallery holds codes, and is searched by states")
        if not processor.has_size or are_codes(processor, values):  # pictures are read part by part: may be many
            values = read_value(processor, values, unknown=False)
        parts, model = [], transformer_digest(self.transformer)
        for places, own, grid in self._items_by_grid(processor, values):
            codes, lengths = self._codes_of(grid, own, batch_size)
            for other in self._grids_of(self._segment(query)):
                parts.append(
                    build_index(
                        self.transformer,
                        codes,
                        segment,
                        query,
                        batch_size=batch_size,
                        lengths=lengths,
                        shape=grid.shape,
                        query_shape=other,
                        model=model,
                    )
                )
                parts[-1].places = None if places is None else places.clone()  # a file has each tensor once
        output, *output.others = parts
        output.tokenizers = self._tokenizers_digest(segment)
        self.maybe_free_model_hooks()
        return output

    def _items_by_grid(
        self, processor: SegmentProcessor, values: Any
    ) -> list[tuple[torch.LongTensor | None, Any, SegmentProcessor]]:
        """A gallery's items by the bucket that each belongs to: their places, None for all of them, their values, and
        their segment on its grid."""
        name = processor.name
        if not processor.buckets or processor.tiled:
            return [(None, values, processor)]
        rows: dict[tuple[int, ...], list[int]] = {}
        values = values if isinstance(values, list) else list(processor.read(values))
        for row, value in enumerate(values):
            own = value[None] if isinstance(value, torch.Tensor | np.ndarray) else value
            read = [value] if are_codes(processor, [value]) else processor.read(own)
            rows.setdefault(tuple(self._bucket_of(processor, read)), []).append(row)
        return [
            (
                torch.tensor(own) if len(rows) > 1 else None,
                [values[row] for row in own],
                self._segments_of(self._shapes_on(grid, [name]))[name],
            )
            for grid, own in sorted(rows.items())
        ]

    @staticmethod
    def _grids_of(processor: SegmentProcessor) -> list[tuple[int, ...] | None]:
        """The shapes of the codes of a segment's buckets, None for the only one."""
        if not processor.buckets or processor.tiled:
            return [None]
        return [tuple(bucket_shape(processor.shape, processor.entry, i)) for i in range(len(processor.buckets))]

    def _codes_of(
        self, processor: SegmentProcessor, values: Any, batch_size: int
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Codes of a gallery's items, which are encoded some at a time, and the lengths of texts by blocks."""
        if processor.block_length is not None:
            found = encode_one_each(processor, values)
            whole = torch.full((len(found.codes),), found.codes.shape[1])
            return found.codes, whole if found.mask is None else found.mask.sum(1)
        if isinstance(values, torch.Tensor | np.ndarray) and values.ndim == 4:
            values = list(values)
        values = values if isinstance(values, list) else [values]
        parts = [values[start : start + batch_size] for start in range(0, len(values), batch_size)]
        if processor.tiled:
            return torch.cat([encode_one_each(processor, part).codes for part in parts]), None
        ready = are_codes(processor, values)
        return torch.cat(
            [torch.stack(part).to(processor.device()) if ready else processor.encode(part) for part in parts]
        ), None

    def _query_segment(self, segment: str) -> str:
        """The segment that a gallery is searched by where the call doesn't say it."""
        usual = {TEXT: IMAGE, IMAGE: TEXT}.get(segment)
        tasks = [Task.parse(task) for task in self.transformer.config.tasks or []]
        pairs = [task.segments for task in tasks if len(task.segments) == 2 and len(task.given) == 1]
        found = sorted({one for pair in pairs if segment in pair for one in pair if one != segment})
        if usual is not None and (usual in found or not found):
            return usual
        if len(found) != 1:
            raise ValueError(
                f"query=None: say by which segment a gallery of {segment!r} is searched, one of {found}; it needs a "
                "task between the two"
            )
        return found[0]

    def _tokenizers_digest(self, segment: str) -> str:
        """Empty where its tokenizer isn't there, so that it can't be told from others."""
        processor = self._segment(segment)
        found = [processor.components.get(name) for name in processor.needs[:1]]
        return "" if None in found else tokenizers_digest(found)

    @torch.no_grad()
    def retrieve(
        self,
        query: str | list[str] | PipelineImageInput,
        gallery: GalleryIndex,
        top_k: int | None = None,
        *,
        shortlist: int | None = None,
        batch_size: int = 64,
    ) -> RetrievalOutput:
        """The items of a gallery that go best with each query: texts for pictures, pictures for texts, or whatever
        segments [`index`] was told.

        Args:
            query: texts for a gallery of pictures, pictures for one of texts; values of the gallery's ``query``.
            gallery: from [`index`].
            top_k: items a query; by default 5, or all of a gallery that has fewer.
            shortlist: candidates a query that the features find, and PMI ranks; by default 20, or twice `top_k` where
                that is more. Each candidate costs a forward pass where the checkpoint knows both directions.
            batch_size: queries or candidates a forward pass.

        Returns:
            [`~likelihood.retrieval.RetrievalOutput`]: ``indices`` and ``scores`` (B, top_k), best first.

        Raises:
            ValueError: for an index of another model, or an argument that doesn't fit.

        Examples:
            ```py
            >>> gallery = pipe.index(image=pictures)
            >>> gallery.save("gallery.safetensors")
            >>> best = pipe.retrieve("a red apple", gallery, top_k=3).indices[0]
            ```
        """
        self._check_device()
        if not isinstance(gallery, GalleryIndex):
            raise ValueError(f"gallery must be a GalleryIndex, which pipe.index makes, got {type(gallery).__name__}")
        if gallery.tokenizers and self._tokenizers_digest(gallery.segment) not in ("", gallery.tokenizers):
            raise ValueError(
                f"gallery was indexed with another tokenizer of {gallery.segment!r} than this pipeline's, or in "
                "another dtype; index it with this one"
            )
        batch_size = check_integer("batch_size", batch_size, 1)
        top_k = min(5, len(gallery)) if top_k is None else check_integer("top_k", top_k, 1, len(gallery))
        shortlist = max(20, 2 * top_k) if shortlist is None else check_integer("shortlist", shortlist, top_k)
        processor = self._segment(gallery.query)
        if not are_codes(processor, query) or processor.has_length:
            self._check_components(gallery.query, f"a query by {gallery.query!r}")
        check_codes_dtype(processor, "query", query)
        processor.check_whole("query", query)
        try:
            queries = read_value(processor, query, unknown=False)
        except ValueError as error:
            raise ValueError(
                f"query must be {processor.noun}s, as the gallery holds {gallery.segment} codes, got "
                f"{shown(query)}: {error}"
            ) from error
        places, found, grids = [], [], {part.query_shape for part in gallery.parts}
        for own, values, segments in self._by_grid({gallery.query: queries}, [gallery.query]):
            segment = segments[gallery.query]
            if grids & {None, processor.shape} and segment.shape not in grids:
                segment = processor  # of one of older versions, or of codes, on a single grid
            elif segment.shape not in grids:
                raise ValueError(
                    f"gallery was indexed for queries of the grids {sorted(map(str, grids))}, and not for the "
                    f"{list(segment.shape)} of this pipeline's: index it with this one"
                )
            value, sizes = encode_one_each(segment, values[gallery.query]), {"top_k": top_k, "shortlist": shortlist}
            places.append(own)
            found.append(
                retrieve(self.transformer, value.codes, gallery, **sizes, batch_size=batch_size, query_mask=value.mask)
            )
        self.maybe_free_model_hooks()
        fields = ("indices", "scores")
        return RetrievalOutput(**{name: in_order(places, [getattr(one, name) for one in found]) for name in fields})
