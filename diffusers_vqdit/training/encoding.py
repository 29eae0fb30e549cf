"""From a dataset to a folder of codes: each segment's column is read and encoded by its modality's class."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..pipelines.segment_base import ENCODERS, LABEL, ColumnReader, SegmentColumn, bucket_shape
from ..pipelines.segment_processors import MODALITIES, check_segment_entries, kind_of
from ..utils.buckets import check_buckets
from ..utils.checks import check_integer
from ..utils.fingerprints import file_sha256, model_fingerprint, tokenizer_fingerprint
from ..utils.token_ids import makes_token_ids
from ..utils.weight_files import move_into_place
from .code_files import FILES, INDEX_FILE, write_index, write_shard
from .data import read_rows
from .files import scratch_folder
from .segment_columns import columns_of_flags, name_tokenizers
from .state_files import StateRows, write_states
from .text_rows import one_text_a_row


logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_dataset(
    dataset,
    output_dir: str | Path,
    *,
    resolution: int = 0,
    image_vq: ImageVQModel | None = None,
    text_vq: TextVQModel | None = None,
    tokenizer=None,
    image_column: str | None = None,
    caption_column: str | None = None,
    prompt_columns: list[str] | None = None,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    labels: list[str] | None = None,
    segments: Mapping[str, SegmentColumn] | None = None,
    text_encoder: PreTrainedModel | None = None,
    tokenizer_2=None,
    image_encoder: PreTrainedModel | None = None,
    feature_extractor=None,
    max_sequence_length: int | None = None,
    image_augmentations: int = 0,
    lowres_factor: int | None = None,
    resize_mode: str = "crop",
    aspect_ratio_buckets: Sequence[Sequence[int]] | None = None,
    block_length: int = 16,
    max_text_length: int | None = None,
    batch_size: int = 64,
    shard_size: int = 100_000,
) -> Path:
    """Encode a `datasets.Dataset` into a folder of codes; rows with a picture that can't be read are left out with a
    warning.

    Args:
        dataset: rows with undecoded image columns, as [`~training.data.load_training_dataset`] gives them.
        output_dir: the folder to write. What it holds is replaced at the end, and stays as it was if
            something fails before.
        resolution: side of the square pictures given to `image_vq`, in pixels.
        image_vq, text_vq, tokenizer: the tokenizers; needed for the columns that are given. Without `text_vq`, the
            codes of texts are the token ids of `tokenizer`, of any length.
        image_column: becomes the segment ``image``.
        caption_column: becomes the segment ``text``, the caption that the model learns to write. A row may have a
            list of captions, of which one is drawn each time; so it is with the other columns of texts. With token ids
            such a row is one for each of its captions instead, which is encoded so often. Without `text_vq` and
            `tokenizer` it has the states of `text_encoder`, and is only given.
        prompt_columns: more wordings of the caption (other languages, keywords), used where text is given.
        text_columns: more texts, each a segment of its column's name.
        label_column: becomes the segment ``label``.
        labels: the names of the labels in the order of their codes; by default those in the data, in the order of
            [`~utils.labels.label_names`].
        segments: segments of any names, beside those: what each is and what makes its codes. A tokenizer that is
            neither `image_vq` nor `text_vq` has the name of the first segment that it makes the codes of.
        text_encoder, tokenizer_2: a frozen text encoder of transformers, for captions without `text_vq` and for
            `segments` of the modality ``"states"``. States are kept in float16, of each text's own length.
        image_encoder, feature_extractor: a frozen vision encoder, for `segments` of ``"image_states"``.
        max_sequence_length: tokens of a text for `text_encoder`; the rest is cut off. By default as many as it takes,
            512 at most.
        image_augmentations: so many copies of each picture, slightly moved and scaled
            ([`~utils.images.shift_and_scale`]), are used beside it where the picture is given.
        lowres_factor: adds the segment ``image_lowres``: the picture so many times smaller, resized to full size
            again by bicubic interpolation before it is encoded.
        resize_mode: how a picture becomes square, or of its bucket's aspect ratio: ``"crop"`` or ``"pad"``.
        aspect_ratio_buckets: (height, width) in pixels, in place of `resolution`: all pictures of a row are made to
            the one that is nearest in aspect ratio to the first of the picture columns. The first bucket's grid is
            the segments' ``"shape"``.
        block_length: token ids a block, see [`VQDiTTransformer2DModel`]; each text's end fills its last block.
        max_text_length: token ids of a text at most; longer ones are cut, with a warning that counts them.
        batch_size: pictures or texts that are encoded at once.
        shard_size: rows of a parquet file.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if there is no column to encode, a tokenizer is missing, a caption is empty or a label unknown,
            a bucket is not of whole codes, or no row can be read.
    """
    options: dict[str, Any] = {"resize_mode": resize_mode, "augmentations": image_augmentations}
    options |= {"block_length": check_integer("block_length", block_length, 1), "max_text_length": max_text_length}
    options["max_sequence_length"] = max_sequence_length
    if aspect_ratio_buckets is not None:
        options["buckets"] = check_buckets("aspect_ratio_buckets", aspect_ratio_buckets)
        if resolution:
            raise ValueError(f"resolution={resolution} and aspect_ratio_buckets both say a size; give one of them")
    batch_size, shard_size = check_integer("batch_size", batch_size, 1), check_integer("shard_size", shard_size, 1)
    columns = columns_of_flags(
        resolution=resolution,
        image_vq=image_vq,
        text_vq=text_vq,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        image_column=image_column,
        caption_column=caption_column,
        prompt_columns=prompt_columns,
        text_columns=text_columns,
        label_column=label_column,
        labels=labels,
        lowres_factor=lowres_factor,
        segments=segments,
    )
    named = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer}
    named |= dict(zip(ENCODERS, (text_encoder, tokenizer_2, image_encoder, feature_extractor), strict=True))
    columns, tokenizers = name_tokenizers(columns, named)
    of_ids = [column.column for column in columns.values() if makes_token_ids(column.tokenizer)]
    dataset, options["turns"] = one_text_a_row(dataset, [name for name in of_ids if name in dataset.column_names])
    encoder = _Encoder(dataset, columns, batch_size, **options)
    if aspect_ratio_buckets is not None and encoder.grouping is None:
        raise ValueError("aspect_ratio_buckets needs a column of pictures")
    for note in encoder.notes:
        logger.warning(note)

    shards: list[dict[str, Any]] = []
    skipped = 0
    starts = range(0, len(dataset), shard_size)
    with scratch_folder(Path(output_dir)) as scratch:
        for start in tqdm(starts, desc="Encoding", disable=len(starts) < 2):
            for said, rows in encoder.groups(range(start, min(start + shard_size, len(dataset)))):
                values, kept = encoder.read(rows, skipped)
                skipped += len(rows) - len(kept)
                if kept:
                    shards.append({**encoder.write(scratch, len(shards), values), **said})
        if not shards:
            raise ValueError(
                f"column {encoder.skipping.column!r}: none of the {len(dataset)} {encoder.noun}s could be read"
            )
        if skipped:
            logger.warning(f"skipped {skipped} of {len(dataset)} {encoder.noun}s that could not be read")
        for bucket, size in enumerate(options.get("buckets", [])):
            count = sum(shard["rows"] for shard in shards if shard["bucket"] == bucket)
            logger.log(logging.INFO if count else logging.WARNING, f"bucket {size}: {count} rows")
        geometry, entries = encoder.geometry(), encoder.entries()
        write_index(
            scratch,
            {
                "segments": {name: {**one, **entries[name]} for name, one in geometry.items()},
                "labels": list(entries.get(LABEL, {}).get("names", {}).values()),
                "lowres_factor": lowres_factor,
                "settings": encoder.settings,
                "fingerprints": {"data": encoder.digest.hexdigest(), **tokenizer_fingerprints(tokenizers)},
                "shards": shards,
            },
        )
        _remove_codes(Path(output_dir))
        move_into_place(scratch, Path(output_dir))
    return Path(output_dir)


class _Encoder:
    """All columns of a dataset, to be read and encoded shard by shard.

    Args:
        dataset: a `datasets.Dataset`.
        columns: by segment, from [`~training.segment_columns.name_tokenizers`].
        batch_size: values that are encoded at once.
        options: of all readers.
    """

    def __init__(self, dataset, columns: Mapping[str, SegmentColumn], batch_size: int, **options: Any) -> None:
        self.columns, self.batch_size, self.digest = columns, batch_size, hashlib.sha256()
        self.readers: dict[str, ColumnReader] = {}  # each once, whatever segments it serves
        self.of: dict[str, list[ColumnReader]] = {}  # by segment: of its column, and of its prompt columns
        self.shapes: dict[str, list[int]] = {}
        for name, column in columns.items():
            kind = kind_of(column.modality, column.tokenizer_name, makes_token_ids(column.tokenizer))
            own = {**options, **column.options}
            self.of[name] = []
            for title in (column.column, *(column.prompt_columns or ())):
                if title not in dataset.column_names:
                    raise ValueError(f"column {title!r} is not in the data: it has {dataset.column_names}")
                key = json.dumps([column.modality, title, column.tokenizer_name, own], sort_keys=True)
                if key not in self.readers:
                    self.readers[key] = kind.reader(dataset, title, column.tokenizer, column.beside, **own)
                self.of[name].append(self.readers[key])
            if self.of[name][0].geometry and column.prompt_columns:
                raise ValueError(
                    f"prompt_columns={list(column.prompt_columns)}: token ids have no other wordings; make each a "
                    "segment of its own, and tasks that have it given"
                )
            if (shape := self.of[name][0].shape) is not None:
                self.shapes[name] = shape
        self.states = [name for name, readers in self.of.items() if readers[0].state_channels is not None]
        if len(self.states) == len(self.of):
            raise ValueError(f"segments={self.states} are states of encoders, which are only given: add one of codes")
        self.grouping = next((reader for reader in self.readers.values() if reader.num_groups), None)
        self.notes = [note for reader in self.readers.values() for note in reader.notes]
        self.settings: dict[str, Any] = {}
        for reader in reversed(self.readers.values()):  # the first overrules
            self.settings |= reader.settings
        # The first whose values are files, and may be broken.
        readers = [(reader.feature is None, name) for name, (reader, *_) in self.of.items()]
        first = min(readers, key=lambda one: one[0])[1]
        self.skipping, self.noun = self.of[first][0], MODALITIES[columns[first].modality].noun

    def groups(self, rows: Sequence[int]) -> Iterator[tuple[dict[str, int], list[int]]]:
        """The rows of each group, to be read and encoded before the next, and what the index says of their shard."""
        grouping = self.grouping
        if grouping is None:
            yield {}, list(rows)
            return
        found = [grouping.group_of(row) for row in rows]
        for group in range(grouping.num_groups):
            for reader in self.readers.values():
                reader.group = group
            if members := [row for row, one in zip(rows, found, strict=True) if one == group]:
                yield {"bucket": group}, members

    def read(self, rows: list[int], skipped: int) -> tuple[dict[tuple, list], list[int]]:
        """The values of rows, by what is read, and the rows without those that can't be."""
        found: dict[tuple, dict[int, Any]] = {}
        for reader in self.readers.values():
            if reader.reads not in found:
                count = len(rows)
                values, rows = read_rows(reader.read, reader.placed, rows, self.noun, skipped)
                self.skipping = reader if len(rows) < count else self.skipping
                found[reader.reads] = dict(zip(rows, values, strict=True))
        whole = {key: [values[row] for row in rows] for key, values in found.items()}
        if rows:
            for reader in self.readers.values():
                if reader.reads in found:
                    self.digest.update(reader.digest(whole[reader.reads]))
                    del found[reader.reads]
        return whole, rows

    def write(self, folder: Path, index: int, values: dict[tuple, list]) -> dict[str, Any]:
        """Write a shard's codes and states, and return its entry in the index."""
        entry = write_shard(folder / f"codes-{index:05d}.parquet", self.encode(values))
        if self.states:
            path = folder / f"states-{index:05d}.arrow"
            write_states(path, self.states, self.encode_states(values))
            entry["states"] = {"file": path.name, "sha256": file_sha256(path)}
        return entry

    def encode_states(self, values: dict[tuple, list]) -> Iterator[dict[str, StateRows]]:
        """The states of a shard's values, some rows at a time: all would not fit into memory."""

        def encoded(reader: ColumnReader, rows: slice) -> list[list[torch.Tensor]]:
            return reader.encode(values[reader.reads][rows], self.batch_size)

        count = len(next(iter(values.values())))
        for start in range(0, count, self.batch_size):
            part = slice(start, start + self.batch_size)
            yield {
                name: [
                    [states for variants in row for states in variants]
                    for row in zip(*(encoded(one, part) for one in self.of[name]), strict=True)
                ]
                for name in self.states
            }

    def encode(self, values: dict[tuple, list]) -> dict[str, list[torch.Tensor]]:
        """Columns of codes of a shard's values."""
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
            if (column.prompt_columns is not None and not reader.geometry) or moved:
                given = [torch.cat(one) for one in zip(own, *map(encoded, more), *moved, strict=True)]
                (shard if column.prompt_columns is None else wordings)[f"{name}_prompts"] = given
        return {**shard, **wordings}

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


def tokenizer_fingerprints(tokenizers: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprints of tokenizers, and of what stands beside them, by name; None has none."""
    found = {}
    for name, one in tokenizers.items():
        if one is not None:
            found[name] = model_fingerprint(one) if isinstance(one, torch.nn.Module) else tokenizer_fingerprint(one)
    return found


def _remove_codes(folder: Path) -> None:
    """Remove an earlier index and its shards, the index first, so that what is left is never read."""
    kinds = [kind.replace("*", "[0-9]" * 5) for kind in FILES]
    for old in [folder / INDEX_FILE, *(path for kind in kinds for path in folder.glob(kind))]:
        old.unlink(missing_ok=True)
