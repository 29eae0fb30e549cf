"""A dataset of codes on disk: written once by the tokenizers, read by transformer training, which then never runs one.

A folder of codes holds ``codes-00000.parquet``, ``codes-00001.parquet``, ... and ``segments.json``. Each parquet
column is one segment's codes in row-major order. ``{segment}_prompts`` holds several variants (wordings of a text,
slightly moved pictures) for use where the segment is given, ``{segment}_variants`` those of a text with several
captions for use where it is generated, too. ``segments.json`` tells each segment's ``vocab_size`` and ``shape``, and
what it is (``modality``, ``tokenizer`` and options, as the pipeline takes them), the names of the labels, how many
times smaller ``image_lowres`` is, how the data was read (``settings``), SHA-256 of the data and the tokenizers
(``fingerprints``) and the shards with theirs. [`~training.encoding.encode_dataset`] writes it.

Segments of an encoder's states have ``channels`` in place of ``vocab_size``; their states lie beside each shard's
codes in ``states-00000.arrow`` ([`~training.state_files`]), and are read row by row.

Where pictures were sorted into buckets by aspect ratio, ``buckets`` of a segment tells their grids [h, w], the first
that of ``shape``, and ``bucket`` of a shard that of all of its rows.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from ..pipelines.text_segment import encode_texts  # noqa: F401
from ..schedulers.samplers import Generators, uniform
from ..tasks import Task
from ..utils.fingerprints import file_sha256
from .code_files import INDEX_FILE, SUFFIXES, bucket_segments, check_shards, read_index, read_shard
from .encoding import encode_dataset, tokenizer_fingerprints  # noqa: F401
from .state_files import StatesColumn, read_states


class CodeDataset:
    """The codes of a folder written by [`encode_dataset`], in memory (2 to 4 bytes a code); states stay on disk.

    Args:
        folder: the folder.

    Attributes:
        segments (`dict`): name -> ``{"vocab_size", "shape"}``, or ``{"channels", "shape"}`` of an encoder's states.
        states (`dict[str, StatesColumn]`): of the latter.
        entries (`dict`): name -> what the segment is, as [`VQDiTPipeline`] takes it: ``{"modality", "tokenizer"}`` and
            options. Empty in folders of older versions.
        labels (`list[str]`): names of the label codes.
        lowres_factor (`int`, *optional*): how many times smaller ``image_lowres`` is.
        settings (`dict`): how pictures were read: ``resolution`` or ``aspect_ratio_buckets``, ``resize_mode``,
            ``image_augmentations``. Empty without pictures, and in folders of older versions.
        buckets (`torch.LongTensor`, *optional*): the bucket (N,) of each row, where rows have codes of several shapes.
        fingerprints (`dict[str, str]`): SHA-256 of ``data``, ``image_vq``, ``text_vq``, ``tokenizer`` and of other
            tokenizers, as far as there are any.
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
        self.buckets: torch.Tensor | None = None
        if count > 1:
            self.buckets = torch.tensor([shard["bucket"] for shard in listed for _ in range(shard["rows"])])
            shards = [self._flattened(shard) for shard in shards]
        columns = {name: [shard[name] for shard in shards if name in shard] for name in shards[0] | shards[-1]}
        for name, parts in columns.items():
            if len(parts) < len(shards):
                raise ValueError(f"{str(folder)!r}: some of the shards have a column {name!r} and others don't")
        self.codes = {name: torch.cat([codes for codes, _ in columns[name]]) for name in self._segments[0]}
        # Rows with fewer variants than others are filled up with zeros; `counts` says how many are real.
        self.prompts: dict[str, torch.Tensor] = {}
        self.variants: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        for suffix, kept in (("_prompts", self.prompts), ("_variants", self.variants)):
            for name in self.codes:
                if name + suffix in columns:
                    kept[name], self._counts[name + suffix] = _padded(columns[name + suffix])

    def _open_states(self, shards: list[dict]) -> dict[str, StatesColumn]:
        channels = {name: one["channels"] for name, one in self.segments.items() if "channels" in one}
        if not channels:
            return {}
        files = [(self.folder / shard["states"]["file"], shard["rows"]) for shard in shards]
        tables = [read_states(path, channels, rows) for path, rows in files]
        chunks = {name: [chunk for table in tables for chunk in table[name].chunks] for name in channels}
        return {name: StatesColumn(pa.chunked_array(chunks[name]), channels[name]) for name in channels}

    def _flattened(
        self, shard: dict[str, tuple[torch.Tensor, np.ndarray]]
    ) -> dict[str, tuple[torch.Tensor, np.ndarray]]:
        """A shard whose codes of the segments with buckets lie in rows (M, L) of the length of the longest, for those
        of all buckets to be one tensor."""
        found = dict(shard)
        for column, (codes, sizes) in shard.items():
            name = next(one for one in self.segments for suffix in SUFFIXES if column == one + suffix)
            if "buckets" in self.entries.get(name, {}):
                longest = max(int(np.prod(segments[name]["shape"])) for segments in self._segments)
                codes = codes.flatten(1)
                found[column] = F.pad(codes, (0, longest - codes.shape[1])), sizes
        return found

    def __len__(self) -> int:
        return len(next(iter(self.codes.values())))

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
            for suffix in suffixes:
                variants = (self.prompts if suffix == "_prompts" else self.variants).get(name)
                if variants is not None:
                    counts = self._counts[name + suffix][rows]
                    choice = (uniform(rows.shape, generator, rows.device) * counts).long()
                    return shaped(name, variants[rows, choice])
            return shaped(name, self.codes[name][rows])

        def shaped(name: str, codes: torch.Tensor) -> torch.Tensor:
            shape = segments[name]["shape"]
            return codes.flatten(1)[:, : math.prod(shape)].view(-1, *shape).long()

        if states := sorted(set(self.states) & set(task.generated)):
            raise ValueError(f"task {str(task)!r} generates {states}: states of an encoder are given, never generated")
        given = {
            name: self.states[name].draw(rows, generator)
            if name in self.states
            else drawn(name, ("_prompts", "_variants"))
            for name in task.given
        }
        return given, {name: drawn(name, ("_variants",)) for name in task.generated}


def _padded(parts: list[tuple[torch.Tensor, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Variants (N, V, *shape) of shards' codes (M, *shape), and their counts (N,)."""
    counts = torch.cat([torch.from_numpy(sizes) for _, sizes in parts])
    codes = torch.cat([codes for codes, _ in parts])
    most = int(counts.max())
    if bool((counts == most).all()):
        return codes.unflatten(0, (-1, most)), counts
    padded = codes.new_zeros(len(counts), most, *codes.shape[1:])
    padded[torch.arange(most) < counts[:, None]] = codes
    return padded, counts
