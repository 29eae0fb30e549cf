"""All columns of a dataset, read part by part and encoded into the shards of a folder of codes."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..pipelines.segment_base import ColumnReader, SegmentColumn, bucket_shape
from ..pipelines.segment_processors import MODALITIES, check_segment_entries, kind_of
from ..utils.distributed import process_rank
from ..utils.fingerprints import file_sha256
from ..utils.token_ids import makes_token_ids
from .code_files import SUFFIXES, shard_writer
from .data import MAX_NAMED, try_rows
from .image_reader import crop_warning
from .row_stream import POSITION, RowStream
from .state_files import StateRows, states_writer


logger = logging.getLogger(__name__)


@dataclass
class Part:
    """Rows that are read and encoded together, of one group of a shard.

    Attributes:
        files: of rows of a stream, the undecoded values of columns of files, until they are read.
        values: of these rows by what reads them, once they are read, without those of rows that can't be.
        kept: how many these are.
        problems: why the others can't be.
        column: of the last of them.
        digest: the sum of the rows' SHA-256.
        cut: rows of which a part is lost.
    """

    shard: int
    group: int
    rows: list[int] = field(default_factory=list)
    files: dict[int, dict[str, Any]] = field(default_factory=dict)
    values: dict[tuple, Any] = field(default_factory=dict)
    kept: int = 0
    problems: list[str] = field(default_factory=list)
    column: str | None = None
    digest: int = 0
    cut: int = 0


class DatasetEncoder(Dataset):
    """All columns of a dataset, to be read and encoded shard by shard. As a dataset, it reads a part's values.

    Args:
        dataset: a `datasets.Dataset`.
        columns: by segment, from [`~training.segment_columns.name_tokenizers`].
        batch_size: values that are encoded at once.
        shard_size: rows of a shard.
        num_workers: processes that read.
        stream: what the dataset lists, which has the files.
        options: of all readers.
    """

    def __init__(
        self,
        dataset,
        columns: Mapping[str, SegmentColumn],
        batch_size: int,
        shard_size: int,
        num_workers: int,
        stream: RowStream | None = None,
        **options: Any,
    ) -> None:
        self.stream, self.streamed = stream, stream is not None
        self.columns, self.batch_size, self.shard_size = columns, batch_size, shard_size
        self.dataset, self.num_rows, self.num_workers = dataset, len(dataset), num_workers
        self.told = 0  # of rows that can't be read
        self.readers: dict[str, ColumnReader] = {}  # each once, whatever segments it serves
        self.of: dict[str, list[ColumnReader]] = {}  # by segment: of its column, and of its prompt columns
        self.shapes: dict[str, list[int]] = {}
        for name, column in columns.items():
            kind = reader_of(column)
            own = {**options, **column.options}
            self.of[name] = []
            for title in (column.column, *(column.prompt_columns or ())):
                if title not in dataset.column_names:
                    raise ValueError(f"column {title!r} is not in the data: it has {dataset.column_names}")
                taken = {option: value for option, value in own.items() if option in kind.takes()}
                key = json.dumps([column.modality, title, column.tokenizer_name, taken], sort_keys=True)
                if key not in self.readers:
                    self.readers[key] = kind(dataset, title, column.tokenizer, column.beside, **own)
                self.of[name].append(self.readers[key])
            if "block_length" in self.of[name][0].geometry and column.prompt_columns:
                raise ValueError(
                    f"prompt_columns={list(column.prompt_columns)}: token ids have no other wordings; make each a "
                    "segment of its own, and tasks that have it given"
                )
        for name, column in columns.items():
            maker = (column.modality, column.tokenizer_name)
            alike = [
                reader
                for n, one in columns.items()
                if (one.modality, one.tokenizer_name) == maker
                for reader in self.of[n]
            ]
            for reader in self.of[name]:
                reader.lengthen(alike)
            if (shape := self.of[name][0].shape) is not None:
                self.shapes[name] = shape
        self.states = [name for name, readers in self.of.items() if readers[0].state_channels is not None]
        if len(self.states) == len(self.of):
            raise ValueError(f"segments={self.states} are states of encoders, which are only given: add one of codes")
        self.buckets = options.get("buckets", [])
        self.grouping = next((reader for reader in self.readers.values() if reader.num_groups), None)
        self.notes = [note for reader in self.readers.values() for note in reader.notes]
        self.settings: dict[str, Any] = {}
        for reader in reversed(self.readers.values()):  # the first overrules
            self.settings |= reader.settings
        # The first whose values are files, and may be broken.
        first = min(self.of, key=lambda name: self.of[name][0].feature is None)
        self.skipping, self.noun = self.of[first][0], MODALITIES[columns[first].modality].noun

    @property
    def num_shards(self) -> int:
        """Shards, each of which is one file for each group of its rows."""
        return -(-self.num_rows // self.shard_size)

    # -----------------------------------------------------------------------------------------------------------------
    # Reading

    def parts(self, shards: Sequence[int]) -> Iterator[Part]:
        """All rows of shards, in parts: those of a group in their order."""
        files = self._files(shards)
        for shard in shards:
            waiting: dict[int, Part] = {}
            for row in self._rows(shard):
                own = next(files)
                self._take_files({row: own})
                group = self.grouping.group_of(row) if self.grouping is not None else 0
                part = waiting.setdefault(group, Part(shard, group))
                part.rows.append(row)
                part.files[row] = own
                if len(part.rows) == self.batch_size:
                    yield waiting.pop(group)
            yield from (waiting[group] for group in sorted(waiting))

    def _rows(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def _files(self, shards: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The values of columns of files of a stream, row by row."""
        files = files_of(self.columns)
        if self.stream is None or not files:
            return itertools.repeat({})
        places = self.dataset.select_columns(POSITION).with_format("numpy")

        def positions() -> Iterator[int]:
            for shard in shards:
                rows = self._rows(shard)
                yield from places[rows.start : rows.stop][POSITION].tolist()

        return self.stream.files(positions(), files)

    def _take_files(self, files: dict[int, dict[str, Any]]) -> None:
        """Read some rows' files from their values, where these come from a stream."""
        for reader in self.readers.values() if self.streamed else ():
            if reader.feature is not None:
                reader.dataset = files

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stream": None}  # processes that read are handed the files

    def __getitem__(self, part: Part) -> Part:
        """A part with the values of its rows."""
        found: dict[tuple, dict[int, Any]] = {}
        rows = part.rows
        self.set_group(part.group)
        self._take_files(part.files)
        for reader in self.readers.values():
            if reader.reads not in found:
                count = len(rows)
                values, rows, problems = try_rows(reader.read, reader.placed, rows)
                part.problems += problems
                part.column = reader.column if len(rows) < count else part.column
                found[reader.reads] = dict(zip(rows, values, strict=True))
        part.cut = sum(any(reader.is_cut(row) for reader in self.readers.values()) for row in rows)
        for row in rows:
            digest, told = hashlib.sha256(str(row).encode()), set()
            for reader in self.readers.values():
                if reader.reads not in told:
                    told.add(reader.reads)
                    digest.update(reader.digest([found[reader.reads][row]]))
            part.digest += int(digest.hexdigest(), 16)
        part.files = {}
        part.kept, part.values = len(rows), {key: _packed([one[row] for row in rows]) for key, one in found.items()}
        return part

    def set_group(self, group: int) -> None:
        for reader in self.readers.values():
            reader.group = group

    # -----------------------------------------------------------------------------------------------------------------
    # Encoding

    @torch.no_grad()
    def make_shards(self, folder: Path, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Write the numbered shards into a folder, and tell what is to be known of each, JSON values by name."""
        loader: Iterable[Part] = DataLoader(
            self,
            batch_size=None,
            sampler=self.parts(shards),
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else it draws from that of the models' weights
        )
        total = sum(min(self.shard_size, self.num_rows - shard * self.shard_size) for shard in shards)
        with tqdm(total=total, desc="Encoding", disable=process_rank()[0] > 0) as bar:
            for shard, parts in itertools.groupby(loader, key=lambda part: part.shard):
                yield shard, self._make_shard(folder, shard, parts, bar)

    def _make_shard(self, folder: Path, shard: int, parts: Iterable[Part], bar: tqdm) -> dict[str, Any]:
        skipped, column, digest, cut = 0, None, 0, 0
        writers: dict[int, GroupWriter] = {}
        with ExitStack() as files:
            for part in parts:
                for problem in part.problems[: max(0, MAX_NAMED - self.told)]:
                    logger.warning(f"skipped {self.noun} {problem}")
                self.told += len(part.problems)
                skipped, column = skipped + len(part.problems), part.column or column
                digest, cut = digest + part.digest, cut + part.cut
                if part.kept:
                    self.set_group(part.group)
                    if part.group not in writers:
                        writers[part.group] = GroupWriter(self, folder, f"{shard:05d}-{part.group}", files)
                    writers[part.group].write({key: list(values) for key, values in part.values.items()})
                bar.update(len(part.rows))
        found = [
            {**writer.entry(), **({} if self.grouping is None else {"bucket": group})}
            for group, writer in sorted(writers.items())
        ]
        digests = {file["file"]: file["sha256"] for one in found for file in (one, one.get("states")) if file}
        kept = {"skipped": skipped, "column": column, "digest": f"{digest % 2**256:x}", "shapes": self.shapes}
        return {"files": digests, "shards": found, "cut": cut, **kept}

    def tell(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Say what was left out of all shards, and take what the shapes of codes were.

        Raises:
            ValueError: if no row could be read.
        """
        shards = [shard for part in parts for shard in part["shards"]]
        if not shards:
            column = next((part["column"] for part in parts if part["column"]), self.skipping.column)
            raise ValueError(f"column {column!r}: none of the {self.num_rows} {self.noun}s could be read")
        found = []
        if skipped := sum(part["skipped"] for part in parts):
            found.append(f"skipped {skipped} of {self.num_rows} {self.noun}s that could not be read")
        if cut := sum(part.get("cut", 0) for part in parts):  # parts of an earlier version don't tell
            found.append(crop_warning(cut, self.num_rows))
        for note in found:
            logger.warning(note)
        self.notes += found
        self.shapes = next(part["shapes"] for part in parts if part["shards"])
        for bucket, size in enumerate(self.buckets):
            count = sum(shard["rows"] for shard in shards if shard["bucket"] == bucket)
            logger.log(logging.INFO if count else logging.WARNING, f"bucket {size}: {count} rows")

    def encode_states(self, values: dict[tuple, list]) -> dict[str, StateRows]:
        """The states of a part's values."""

        def encoded(reader: ColumnReader) -> list[list[torch.Tensor]]:
            return reader.encode(values[reader.reads], self.batch_size)

        return {
            name: [
                [states for variants in row for states in variants]
                for row in zip(*map(encoded, self.of[name]), strict=True)
            ]
            for name in self.states
        }

    def encode(self, values: dict[tuple, list]) -> dict[str, list[torch.Tensor]]:
        """Columns of codes of a part's values."""
        done: dict[int, list[torch.Tensor]] = {}

        def encoded(reader: ColumnReader) -> list[torch.Tensor]:
            if id(reader) not in done:
                done[id(reader)] = reader.encode(values[reader.reads], self.batch_size)
            return done[id(reader)]

        shard: dict[str, list[torch.Tensor]] = {}
        wordings: dict[str, list[torch.Tensor]] = {}
        modality = None
        for name, column in self.columns.items():
            if name in self.states:
                continue
            if column.modality != modality:
                # After all segments of a modality, where they have always stood.
                shard, wordings, modality = {**shard, **wordings}, {}, column.modality
            reader, *more = self.of[name]
            own, moved = encoded(reader), reader.moved(values[reader.reads], self.batch_size)
            shard[name] = [codes[0] for codes in own]
            self.shapes.setdefault(name, bucket_shape(shard[name][0].shape, reader.entry, 0))
            if reader.has_variants:
                shard[f"{name}_variants"] = own
            if (column.prompt_columns is not None and "block_length" not in reader.geometry) or moved:
                given = [torch.cat(one) for one in zip(own, *map(encoded, more), *moved, strict=True)]
                (shard if column.prompt_columns is None else wordings)[f"{name}_prompts"] = given
        return {**shard, **wordings}

    # -----------------------------------------------------------------------------------------------------------------
    # What the index says

    def geometry(self) -> dict[str, dict[str, Any]]:
        """Vocabulary size, or channels, and shape of each segment, and the patch of residual codes, which share a
        position. Segments of one tokenizer and one shape share their embeddings."""
        found: dict[str, dict[str, Any]] = {}
        first: dict[tuple, str] = {}
        for name, shape in self.shapes.items():
            reader = self.of[name][0]
            size = {"channels": reader.state_channels} if name in self.states else {"vocab_size": reader.vocab_size}
            found[name] = {**size, "shape": shape, **reader.geometry}
        for name, column in self.columns.items():
            if name in self.states:
                continue
            shape, ndim = self.shapes[name], MODALITIES[column.modality].ndims[0]
            if column.tokenizer_name is not None:
                alike = shape if "block_length" not in found[name] else ()  # its places count from the start
                other = first.setdefault((column.modality, column.tokenizer_name, *alike), name)
                found[name] |= {"shared_with": other} if other != name else {}
            if column.tokenizer_name is not None and len(shape) > ndim and "shared_with" not in found[name]:
                found[name] |= {"patch": [1] * ndim + [shape[-1]], "separate_codebooks": True}
        return found

    def entries(self) -> dict[str, dict[str, Any]]:
        """What each segment is, as a pipeline's config has it."""
        entries = {}
        for name, column in self.columns.items():
            named = {} if column.tokenizer_name is None else {"tokenizer": column.tokenizer_name}
            entries[name] = {"modality": column.modality, **self.of[name][0].entry, **named}
        return check_segment_entries(entries, self.geometry())


def reader_of(column: SegmentColumn) -> type[ColumnReader]:
    """What reads a column that has its tokenizer."""
    return kind_of(column.modality, column.tokenizer_name, makes_token_ids(column.tokenizer)).reader


def columns_read(columns: Mapping[str, SegmentColumn]) -> dict[str, type[ColumnReader]]:
    """The columns of the data that segments are made of, and what reads them."""
    return {title: reader_of(one) for one in columns.values() for title in (one.column, *(one.prompt_columns or ()))}


def files_of(columns: Mapping[str, SegmentColumn]) -> dict[str, type[ColumnReader]]:
    """Those of them that are files."""
    return {title: reader for title, reader in columns_read(columns).items() if reader.feature is not None}


def source_of(rows: str, columns: Mapping[str, SegmentColumn], *more: Any) -> str:
    """SHA-256 of all that codes are made from: what tells the data from others, the columns, and `more`."""
    parts = {name: [one.modality, one.column, one.prompt_columns, dict(one.options)] for name, one in columns.items()}
    return hashlib.sha256(json.dumps([rows, parts, *more], default=str).encode()).hexdigest()


class GroupWriter:
    """Writes the codes and states of one group of a shard, part by part, into files that are whole when `files` ends.

    Args:
        name: of the files, in `folder`.
    """

    def __init__(self, encoder: DatasetEncoder, folder: Path, name: str, files: ExitStack) -> None:
        self.encoder, self.files, self.rows = encoder, files, 0
        self.codes, self.states = folder / f"codes-{name}.arrow", folder / f"states-{name}.arrow"
        self._codes: Any = None
        self._states: Any = None

    def write(self, values: dict[tuple, list]) -> None:
        """Encode and write the values of some rows, by what reads them."""
        encoder = self.encoder
        columns = encoder.encode(values)
        if self._codes is None:
            sizes = {name: encoder.of[name][0].vocab_size for name in encoder.of if name not in encoder.states}
            sizes = {f"{name}{suffix}": size for name, size in sizes.items() for suffix in SUFFIXES}
            self._codes = self.files.enter_context(shard_writer(self.codes, sizes))
            if encoder.states:
                self._states = self.files.enter_context(states_writer(self.states, encoder.states))
        self._codes.write(columns)
        if encoder.states:
            self._states(encoder.encode_states(values))
        self.rows = self._codes.rows

    def entry(self) -> dict[str, Any]:
        """What an index says of the files."""
        entry = {"file": self.codes.name, "rows": self.rows, "sha256": file_sha256(self.codes)}
        if self.encoder.states:
            entry["states"] = {"file": self.states.name, "sha256": file_sha256(self.states)}
        return entry


def _as_it_is(part: Part) -> Part:
    return part


def _packed(values: list) -> Any:
    """Values as one tensor where they can be: a process hands over a few tensors, not many."""
    tensors = all(isinstance(one, torch.Tensor) for one in values)
    alike = tensors and len({(one.shape, one.dtype) for one in values}) == 1
    return torch.stack(values) if alike else values
