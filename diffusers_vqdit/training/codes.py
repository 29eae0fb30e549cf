"""A dataset of codes on disk: written once by the tokenizers, read by transformer training, which then never runs one.

A folder of codes holds ``codes-00000.arrow``, ``codes-00001.arrow``, ... (those of older versions ``.parquet``) and
``segments.json``. Each column is one segment's codes in row-major order, in the smallest type that holds them.
``{segment}_prompts`` holds several variants (wordings of a text, slightly moved pictures) for use where the segment is
given, ``{segment}_variants`` those of a text with several captions for use where it is generated, too.
``segments.json`` tells each segment's ``vocab_size`` and ``shape``, whether it asks for ``centered_positions``, as
pictures do, and what it is (``modality``, ``tokenizer`` and
options, as the pipeline takes them), the names of the labels, how many times smaller ``image_lowres`` is, how the data
was read (``settings``), what of it was lost (``notes``), SHA-256 of the data and the tokenizers (``fingerprints``) and
the shards with theirs. [`~training.encoding.encode_dataset`] writes it.

Segments of an encoder's states have ``channels`` in place of ``vocab_size``; their states lie beside each shard's
codes in ``states-00000.arrow`` ([`~training.state_files`]), and are read row by row.

Where pictures were sorted into buckets by aspect ratio, ``buckets`` of a segment tells their grids [h, w], the first
that of ``shape``, and ``bucket`` of a shard that of all of its rows. Where a segment has a ``block_length``, each row
has whole blocks, as many as its text needs: rows of equal numbers are a bucket, too.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..pipelines.segment_base import LABEL
from ..schedulers.samplers import Generators, uniform
from ..tasks import Task
from ..utils.fingerprints import file_sha256
from .checkpoints import fingerprint
from .code_files import INDEX_FILE, SUFFIXES, bucket_segments, check_shards, read_index, read_shard
from .encoding import tokenizer_fingerprints
from .mapped_codes import CodeColumn, LoadedCodes
from .state_files import StatesColumn, read_states


class CodeDataset:
    """The codes of a folder written by [`encode_dataset`]. They stay on disk, as an encoder's states do, and rows are
    read when they are asked for; those of parquet files, of older versions, are in memory.

    Args:
        folder: the folder.

    Attributes:
        codes, prompts, variants (`Mapping[str, torch.Tensor]`): name -> all codes (N, *shape), int16 or int32, and the
            variants (N, V, *shape) that there are beside them, those of rows with fewer filled up with zeros. A whole
            column is read into memory when it is asked for.
        segments (`dict`): name -> ``{"vocab_size", "shape"}``, or ``{"channels", "shape"}`` of an encoder's states,
            and what else [`VQDiTTransformer2DModel`] is to know of it: ``"centered_positions": True`` of pictures.
        states (`dict[str, StatesColumn]`): of the latter.
        entries (`dict`): name -> what the segment is, as [`VQDiTPipeline`] takes it: ``{"modality", "tokenizer"}`` and
            options. Empty in folders of older versions.
        labels (`list[str]`): names of the label codes.
        lowres_factor (`int`, *optional*): how many times smaller ``image_lowres`` is.
        settings (`dict`): how pictures were read: ``resolution`` or ``aspect_ratio_buckets``, ``resize_mode``,
            ``image_augmentations``. Empty without pictures, and in folders of older versions.
        buckets (`torch.LongTensor`, *optional*): the bucket (N,) of each row, where rows have codes of several shapes:
            pictures' aspect ratios, and numbers of blocks of texts.
        fingerprints (`dict[str, str]`): SHA-256 of ``data``, ``image_vq``, ``text_vq``, ``tokenizer`` and of other
            tokenizers, as far as there are any.
        notes (`list[str]`): what was lost in the encoding: texts that were cut, pictures that were cropped or could
            not be read.
        source (`str`): SHA-256 of all that the codes were made from, by which a folder isn't made twice; empty in
            those of older versions.
        fingerprint (`str`): SHA-256 of the index, which names those of all shards.

    Raises:
        ValueError: if the folder is not a complete folder of codes, a file is damaged, or codes are missing, no
            integers or out of range; the message names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        index = read_index(folder)
        self.segments: dict[str, dict] = index["segments"]
        self.entries: dict[str, dict] = index["entries"]
        self.labels: list[str] = index["labels"]
        self.lowres_factor: int | None = index["lowres_factor"]
        self.settings: dict = index["settings"]
        self.fingerprints: dict[str, str] = index["fingerprints"]
        self.notes: list[str] = index["notes"]
        self.source: str = index["source"]
        self.fingerprint = file_sha256(folder / INDEX_FILE)
        paths = check_shards(folder, index["shards"])
        listed = index["shards"] if index["shards"] is not None else [{} for _ in paths]
        count = max((len(entry["buckets"]) for entry in self.entries.values() if "buckets" in entry), default=1)
        every = [bucket_segments(index, bucket) for bucket in range(count)]
        # Those of codes, of each bucket
        self._segments = [{n: one for n, one in segments.items() if "channels" not in one} for segments in every]
        self.states = self._open_states(listed)
        shards = [
            read_shard(path, self._segments[shard.get("bucket", 0)], shard.get("rows"))
            for path, shard in zip(paths, listed, strict=True)
        ]
        self._columns: dict[str, CodeColumn] = {}
        for name in shards[0] | shards[-1]:
            if not all(name in shard for shard in shards):
                raise ValueError(f"{str(folder)!r}: some of the shards have a column {name!r} and others don't")
            self._columns[name] = CodeColumn([chunk for shard in shards for chunk in shard[name]])
        self.buckets: torch.Tensor | None = None
        if count > 1:
            self.buckets = torch.cat([torch.full((shard["rows"],), shard["bucket"]) for shard in listed])
        self.codes, self.prompts, self.variants = (
            LoadedCodes([name for name in self._segments[0] if name + suffix in self._columns], self._load, suffix)
            for suffix in SUFFIXES
        )
        if blocks := [name for name, segment in self.segments.items() if "block_length" in segment]:
            self._sort_by_length({name: self._columns[name].sizes() for name in blocks})

    def _sort_by_length(self, lengths: dict[str, np.ndarray]) -> None:
        """Make each bucket several, whose rows have as many codes of each of these segments."""
        places = np.zeros(len(self), np.int64) if self.buckets is None else self.buckets.numpy()
        for sizes in lengths.values():
            _, firsts, places = np.unique(
                places * (int(sizes.max()) + 1) + sizes, return_index=True, return_inverse=True
            )
        found = [
            [0 if self.buckets is None else int(self.buckets[row]), *(int(sizes[row]) for sizes in lengths.values())]
            for row in firsts.tolist()
        ]
        self._segments = [
            {
                name: {**segment, "shape": [sizes[name]]} if name in sizes else segment
                for name, segment in self._segments[bucket].items()
            }
            for bucket, *counts in found
            for sizes in [dict(zip(lengths, counts, strict=True))]
        ]
        self.buckets = torch.from_numpy(places.reshape(-1)) if len(found) > 1 else None

    def _open_states(self, shards: list[dict]) -> dict[str, StatesColumn]:
        channels = {name: one["channels"] for name, one in self.segments.items() if "channels" in one}
        if not channels:
            return {}
        files = [(self.folder / shard["states"]["file"], shard["rows"]) for shard in shards]
        tables = [read_states(path, channels, rows) for path, rows in files]
        chunks = {name: [chunk for table in tables for chunk in table[name].chunks] for name in channels}
        return {name: StatesColumn(pa.chunked_array(chunks[name]), channels[name]) for name in channels}

    def _load(self, name: str, suffix: str) -> torch.Tensor:
        """A segment's column, for all rows: (N, *shape) or (N, V, *shape). The codes of one with buckets are flat, and
        filled up to the length of the longest."""
        column, shape = self._columns[name + suffix], self.segments[name]["shape"]
        bucketed = "buckets" in self.entries.get(name, {})
        width = math.prod(shape)
        if bucketed:
            width = max(math.prod(segments[name]["shape"]) for segments in self._segments)
        sizes, lengths = column.sizes(), np.full(len(self), width)
        if self.buckets is not None:
            lengths = np.array([math.prod(segments[name]["shape"]) for segments in self._segments])[self.buckets]
        counts = sizes // lengths
        kind = torch.int16 if self.segments[name]["vocab_size"] <= 2**15 else torch.int32
        codes = torch.zeros(len(self), int(counts.max()), width, dtype=kind)
        for count, length in np.unique(np.stack([counts, lengths]), axis=1).T.tolist():
            rows = np.flatnonzero((counts == count) & (lengths == length))
            read = torch.from_numpy(column.read(rows, np.zeros_like(rows), count * length))
            codes[torch.from_numpy(rows), :count, :length] = read.view(-1, count, length).to(kind)
        codes = codes if bucketed else codes.unflatten(-1, shape)
        return codes if suffix else codes[:, 0]

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def rename_labels(self, name: str, own: Sequence[str], names: Sequence[str], least: int = 0) -> None:
        """Read the labels of a segment, whose codes stand for its `own` names, as codes of `names`, which have all of
        these among them; of `least` codes, where there are fewer names."""
        self._columns[name].renamed = np.array([names.index(label) for label in own])
        for segments in (self.segments, *self._segments):
            segments[name] = {**segments[name], "vocab_size": max(len(names), least)}
        if name in self.entries:
            self.entries[name] = {**self.entries[name], "names": {str(code): one for code, one in enumerate(names)}}
        if name == LABEL:
            self.labels = list(names)

    def identity(self) -> dict[str, str]:
        """What tells the data from others, for the identity of a run."""
        if "data" not in self.fingerprints:
            return {"training data": fingerprint([dict(self.codes), dict(self.prompts), dict(self.variants)])}
        # Encoded again on a GPU, the same data may give some other codes. Older versions had another digest of them.
        return {
            "encoded data" if self.source else "training data": fingerprint([self.fingerprints["data"], self.settings])
        }

    def check_tokenizers(
        self, image_vq=None, text_vq=None, tokenizer=None, segment_tokenizers=None, **encoders
    ) -> None:
        """Raise a ValueError that names the tokenizers that did not make these codes; None is not checked.

        Args:
            image_vq, text_vq, tokenizer, segment_tokenizers, encoders: the pipeline's components of these names.
        """
        found = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer, **encoders}
        found |= segment_tokenizers.parts if segment_tokenizers is not None else {}
        found = tokenizer_fingerprints(found)
        other = [name for name, value in found.items() if self.fingerprints.get(name, value) != value]
        if other:
            raise ValueError(
                f"the codes in {str(self.folder)!r} were made by another {' and '.join(other)} than the one given; "
                "give the one that made them, or encode the data again"
            )

    def batch(
        self, rows: torch.Tensor, task: Task, *, generator: Generators = None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The given and the generated codes of `rows` for `task`: two dicts of name -> (B, *shape) int64. What is
        given as an encoder's states is [`PaddedStates`], which have a ``to`` of their own.

        A given segment with several variants is drawn from them, by `generator` or by one a row. A generated one is
        always the first, but for a text whose rows have several captions, of which one is drawn.

        Raises:
            ValueError: if the task has a segment that the data lacks, or the rows are of several buckets.
        """
        found = [0] if self.buckets is None else self.buckets[rows].unique().tolist()
        if len(found) > 1:
            raise ValueError(f"rows={rows.tolist()} are of the buckets {found}: a batch has rows of one")
        segments = self._segments[found[0] if found else 0]
        for name in task.segments:
            if name not in self.segments:
                raise ValueError(f"task {str(task)!r}: the data has no segment {name!r}, only {sorted(self.segments)}")

        def drawn(name: str, suffixes: tuple[str, ...]) -> torch.Tensor:
            shape, own = segments[name]["shape"], rows.numpy()
            suffix = next((suffix for suffix in suffixes if name + suffix in self._columns), "")
            column, length, choice = self._columns[name + suffix], math.prod(shape), np.zeros(len(own), np.int64)
            if suffix:
                counts = torch.from_numpy(column.sizes(own) // length)
                choice = (uniform(rows.shape, generator, rows.device) * counts).long().numpy()
            return torch.from_numpy(column.read(own, choice * length, length)).view(-1, *shape)

        if states := sorted(set(self.states) & set(task.generated)):
            raise ValueError(f"task {str(task)!r} generates {states}: states of an encoder are given, never generated")
        given = {
            name: self.states[name].draw(rows, generator)
            if name in self.states
            else drawn(name, ("_prompts", "_variants"))
            for name in task.given
        }
        return given, {name: drawn(name, ("_variants",)) for name in task.generated}
