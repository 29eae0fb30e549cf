"""A dataset of codes on disk: written once by the tokenizers, read by transformer training, which then never runs one.

A folder of codes holds ``codes-00000.parquet``, ``codes-00001.parquet``, ... and ``segments.json``. Each parquet
column is one segment's codes in row-major order. ``{segment}_prompts`` holds several variants (wordings of a text,
slightly moved pictures) for use where the segment is given, ``{segment}_variants`` those of a text with several
captions for use where it is generated, too. ``segments.json`` tells each segment's ``vocab_size`` and ``shape``, and
what it is (``modality``, ``tokenizer`` and options, as the pipeline takes them), the names of the labels, how many
times smaller ``image_lowres`` is, how the data was read (``settings``), SHA-256 of the data and the tokenizers
(``fingerprints``) and the shards with theirs.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..pipelines.segment_processors import (
    IMAGE,
    LABEL,
    LOWRES,
    TEXT,
    ImageSegment,
    TextSegment,
    check_segment_entries,
    entry_by_name,
)
from ..schedulers.samplers import Generators, uniform
from ..tasks import Task
from ..utils.checks import check_integer
from ..utils.fingerprints import file_sha256, model_fingerprint, tensor_sha256, tokenizer_fingerprint
from ..utils.images import lower_resolution, shift_and_scale
from ..utils.texts import tokenize_to_length
from ..utils.weight_files import move_into_place
from .code_files import INDEX_FILE, TOKENIZERS, check_shards, read_index, read_shard, write_index, write_shard
from .columns import caption_lists, encode_labels, warn_of_cut
from .data import decode_rows, to_pixels
from .files import scratch_folder


logger = logging.getLogger(__name__)

# Segments that are not made from a column of texts.
RESERVED = (IMAGE, LOWRES, TEXT, LABEL)


@torch.no_grad()
def encode_dataset(
    dataset,
    output_dir: str | Path,
    *,
    resolution: int,
    image_vq: ImageVQModel | None = None,
    text_vq: TextVQModel | None = None,
    tokenizer=None,
    image_column: str | None = None,
    caption_column: str | None = None,
    prompt_columns: list[str] | None = None,
    text_columns: list[str] | None = None,
    label_column: str | None = None,
    labels: list[str] | None = None,
    image_augmentations: int = 0,
    lowres_factor: int | None = None,
    resize_mode: str = "crop",
    batch_size: int = 64,
    shard_size: int = 100_000,
) -> Path:
    """Encode a `datasets.Dataset` into a folder of codes; rows whose picture can't be read are left out with a
    warning.

    Args:
        dataset: rows with an undecoded image column, as [`~training.data.load_training_dataset`] gives them.
        output_dir: the folder to write. What it holds is replaced at the end, and stays as it was if
            something fails before.
        resolution: side of the square pictures given to `image_vq`, in pixels.
        image_vq, text_vq, tokenizer: the tokenizers; needed for the columns that are given.
        image_column: becomes the segment ``image``.
        caption_column: becomes the segment ``text``, the caption that the model learns to write. A row may have a
            list of captions, of which one is drawn each time; so it is with the other columns of texts.
        prompt_columns: more wordings of the caption (other languages, keywords), used where text is given.
        text_columns: more texts, each a segment of its column's name.
        label_column: becomes the segment ``label``.
        labels: the names of the labels in the order of their codes; by default those in the data, in the order of
            [`~training.columns.label_names`].
        image_augmentations: so many copies of each picture, slightly moved and scaled
            ([`~utils.images.shift_and_scale`]), are used beside it where the picture is given.
        lowres_factor: adds the segment ``image_lowres``: the picture so many times smaller, resized to full size
            again by bicubic interpolation before it is encoded.
        resize_mode: how a picture becomes square: ``"crop"`` or ``"pad"``.
        batch_size: pictures or texts that are encoded at once.
        shard_size: rows of a parquet file.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if there is no column to encode, a tokenizer is missing, a caption is empty or a label unknown, or
            no picture can be read.
    """
    wordings = [caption_column, *(prompt_columns or [])] if caption_column is not None else []
    text_columns = text_columns or []
    _check_columns(image_column, caption_column, text_columns, image_vq, text_vq, tokenizer, lowres_factor, resolution)
    batch_size, shard_size = check_integer("batch_size", batch_size, 1), check_integer("shard_size", shard_size, 1)
    texts = {column: caption_lists(dataset[column], column) for column in dict.fromkeys([*wordings, *text_columns])}
    if text_vq is not None and texts:
        warn_of_cut(
            [text for lists in texts.values() for row in lists for text in row], tokenizer, text_vq.config.max_length
        )
    codes_of_labels = None
    if label_column is not None:
        codes_of_labels, labels = _encode_label_column(dataset, label_column, labels)

    generator = torch.Generator().manual_seed(0)
    digest, segments, shards, skipped = hashlib.sha256(), {}, [], 0
    if label_column is not None:
        segments[LABEL] = {"vocab_size": len(labels), "shape": [1]}
    starts = range(0, len(dataset), shard_size)
    with scratch_folder(Path(output_dir)) as scratch:
        for start in tqdm(starts, desc="Encoding", disable=len(starts) < 2):
            rows = list(range(start, min(start + shard_size, len(dataset))))
            columns: dict[str, list[torch.Tensor]] = {}
            if image_column is not None:
                pictures, rows = decode_rows(dataset, rows, image_column, resolution, resize_mode, skipped)
                skipped += min(start + shard_size, len(dataset)) - start - len(rows)
                if not rows:
                    continue
                digest.update(tensor_sha256(pictures).encode())
                batches = pictures.split(batch_size)
                columns |= _encode_pictures(batches, image_vq, image_augmentations, lowres_factor, generator)
                segments[IMAGE] = _geometry(image_vq, columns[IMAGE][0], ImageSegment.ndim)
                if lowres_factor is not None:
                    segments[LOWRES] = _geometry(image_vq, columns[LOWRES][0], ImageSegment.ndim, IMAGE)
            encoded = {}
            for column, lists in texts.items():
                chosen = [lists[row] for row in rows]
                digest.update(json.dumps([column, chosen]).encode())
                encoded[column] = _encode_lists(chosen, text_vq, tokenizer, batch_size)
            for name, column in {TEXT: caption_column, **{name: name for name in text_columns}}.items():
                if column is None:
                    continue
                columns[name] = [codes[0] for codes in encoded[column]]
                segments[name] = _geometry(text_vq, columns[name][0], TextSegment.ndim, None if name == TEXT else TEXT)
                if any(len(row) > 1 for row in texts[column]):
                    columns[f"{name}_variants"] = encoded[column]
            if wordings:
                columns[f"{TEXT}_prompts"] = [
                    torch.cat(one) for one in zip(*(encoded[c] for c in wordings), strict=True)
                ]
            if codes_of_labels is not None:
                columns[LABEL] = list(codes_of_labels[rows].split(1))
                digest.update(tensor_sha256(codes_of_labels[rows]).encode())
            shards.append(write_shard(scratch / f"codes-{len(shards):05d}.parquet", columns))
        if not shards:
            raise ValueError(f"column {image_column!r}: none of the {len(dataset)} pictures could be read")
        if skipped:
            logger.warning(f"skipped {skipped} of {len(dataset)} pictures that could not be read")
        used = (image_vq if image_column else None, text_vq if texts else None, tokenizer if texts else None)
        entries = {name: entry_by_name(name, segments, labels or [], lowres_factor) for name in segments}
        entries = check_segment_entries(entries, segments, TOKENIZERS)
        settings = {"resolution": resolution, "resize_mode": resize_mode, "image_augmentations": image_augmentations}
        write_index(
            scratch,
            {
                "segments": {name: {**geometry, **entries[name]} for name, geometry in segments.items()},
                "labels": labels if label_column is not None else [],
                "lowres_factor": lowres_factor,
                "settings": settings if image_column is not None else {},
                "fingerprints": {"data": digest.hexdigest(), **_fingerprints(*used)},
                "shards": shards,
            },
        )
        _remove_codes(Path(output_dir))
        move_into_place(scratch, Path(output_dir))
    return Path(output_dir)


def _check_columns(
    image_column: str | None,
    caption_column: str | None,
    text_columns: list[str],
    image_vq: ImageVQModel | None,
    text_vq: TextVQModel | None,
    tokenizer,
    lowres_factor: int | None,
    resolution: int,
) -> None:
    if image_column is None and caption_column is None:
        raise ValueError("give image_column, caption_column or both: there is nothing to encode")
    if image_column is not None and image_vq is None:
        raise ValueError(f"image_column={image_column!r} needs image_vq")
    if caption_column is not None and (text_vq is None or tokenizer is None):
        raise ValueError(f"caption_column={caption_column!r} needs text_vq and tokenizer")
    if text_columns and caption_column is None:
        raise ValueError(f"text_columns={text_columns!r} need caption_column: they share the codes of its segment")
    for column in text_columns:
        if column in RESERVED or column == caption_column:
            raise ValueError(f"text_columns={text_columns!r}: {column!r} can't name a segment of its own")
    if lowres_factor is not None and (image_column is None or lowres_factor < 2 or resolution % lowres_factor):
        raise ValueError(f"lowres_factor={lowres_factor} needs image_column, and must divide {resolution}")


def _encode_label_column(dataset, column: str, labels: list[str] | None) -> tuple[torch.Tensor, list[str]]:
    """Codes (N,) of a column of labels, and the names of all codes, which are `labels` if there are any."""
    known = dict(enumerate(labels or []))
    codes, names = encode_labels(dataset[column], column, dataset.features[column], known)
    if known and len(names) > len(known):
        unknown = list(names.values())[len(known) :]
        raise ValueError(f"column {column!r}: the labels {unknown[:5]} are not among {labels}")
    return codes, list(names.values())


def _geometry(
    model: ImageVQModel | TextVQModel, codes: torch.Tensor, ndim: int, shared_with: str | None = None
) -> dict[str, Any]:
    """A segment of one sample's codes, whose positions have `ndim` axes: residual codes share a position."""
    geometry = {"vocab_size": model.num_codes, "shape": list(codes.shape)}
    if shared_with is not None:
        return {**geometry, "shared_with": shared_with}
    if codes.ndim > ndim:
        geometry |= {"patch": [1] * ndim + [codes.shape[-1]], "separate_codebooks": True}
    return geometry


def _remove_codes(folder: Path) -> None:
    """Remove an earlier index and its shards, the index first, so that what is left is never read."""
    for old in [folder / INDEX_FILE, *folder.glob(f"codes-{'[0-9]' * 5}.parquet")]:
        old.unlink(missing_ok=True)


def _encode_lists(lists: list[list[str]], text_vq: TextVQModel, tokenizer, batch_size: int) -> list[torch.Tensor]:
    """Codes (V, L), or (V, L, q), of the texts of each row."""
    codes = encode_texts([text for row in lists for text in row], text_vq, tokenizer, batch_size)
    return list(codes.split([len(row) for row in lists]))


def _fingerprints(image_vq: ImageVQModel | None, text_vq: TextVQModel | None, tokenizer) -> dict[str, str]:
    """The fingerprints of what there is."""
    checks = {"image_vq": model_fingerprint, "text_vq": model_fingerprint, "tokenizer": tokenizer_fingerprint}
    models = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer}
    return {name: checks[name](model) for name, model in models.items() if model is not None}


def _encode_pictures(
    batches: Iterable[torch.Tensor],
    image_vq: ImageVQModel,
    image_augmentations: int,
    lowres_factor: int | None,
    generator: torch.Generator,
) -> dict[str, list[torch.Tensor]]:
    """Columns of codes (h, w), or (h, w, q), of uint8 pictures, of moved copies and of smaller ones."""

    def encode(change=lambda pixels: pixels) -> torch.Tensor:
        return torch.cat([image_vq.encode_codes(change(to_pixels(x)).to(image_vq.device)).cpu() for x in batches])

    codes = encode()
    columns = {IMAGE: list(codes)}
    if image_augmentations:
        moved = [encode(lambda pixels: shift_and_scale(pixels, generator)) for _ in range(image_augmentations)]
        columns["image_prompts"] = list(torch.stack([codes, *moved], 1))
    if lowres_factor is not None:
        columns[LOWRES] = list(encode(lambda pixels: lower_resolution(pixels, lowres_factor)))
    return columns


def encode_texts(texts: list[str], text_vq: TextVQModel, tokenizer, batch_size: int = 64) -> torch.Tensor:
    """Codes (N, L), or (N, L, q), int64 of `texts`, on the CPU."""
    codes = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        ids, mask, _ = tokenize_to_length(tokenizer, part, text_vq.config.max_length)
        codes.append(text_vq.encode_codes(ids.to(text_vq.device), mask.to(text_vq.device)).cpu())
    return torch.cat(codes)


class CodeDataset:
    """The codes of a folder written by [`encode_dataset`], in memory (2 to 4 bytes a code).

    Args:
        folder: the folder.

    Attributes:
        segments (`dict`): name -> ``{"vocab_size", "shape"}``.
        entries (`dict`): name -> what the segment is, as [`VQDiTPipeline`] takes it: ``{"modality", "tokenizer"}`` and
            options. Empty in folders of older versions.
        labels (`list[str]`): names of the label codes.
        lowres_factor (`int`, *optional*): how many times smaller ``image_lowres`` is.
        settings (`dict`): how pictures were read: ``resolution``, ``resize_mode``, ``image_augmentations``. Empty
            without pictures, and in folders of older versions.
        fingerprints (`dict[str, str]`): SHA-256 of ``data``, ``image_vq``, ``text_vq`` and ``tokenizer``, as far as
            there are any.
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
        listed = [shard["rows"] for shard in index["shards"]] if index["shards"] is not None else None
        paths = check_shards(folder, index["shards"])
        shards = [
            read_shard(path, self.segments, rows)
            for path, rows in zip(paths, listed or [None] * len(paths), strict=True)
        ]
        columns = {name: [shard[name] for shard in shards if name in shard] for name in shards[0] | shards[-1]}
        for name, parts in columns.items():
            if len(parts) < len(shards):
                raise ValueError(f"{str(folder)!r}: some of the shards have a column {name!r} and others don't")
        self.codes = {name: torch.cat([codes for codes, _ in columns[name]]) for name in self.segments}
        # Rows with fewer variants than others are filled up with zeros; `counts` says how many are real.
        self.prompts: dict[str, torch.Tensor] = {}
        self.variants: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        for suffix, kept in (("_prompts", self.prompts), ("_variants", self.variants)):
            for name in self.segments:
                if name + suffix in columns:
                    kept[name], self._counts[name + suffix] = _padded(columns[name + suffix])

    def __len__(self) -> int:
        return len(next(iter(self.codes.values())))

    def check_tokenizers(self, image_vq=None, text_vq=None, tokenizer=None) -> None:
        """Raise a ValueError that names the tokenizers that did not make these codes; None is not checked."""
        found = _fingerprints(image_vq, text_vq, tokenizer)
        other = [name for name, value in found.items() if self.fingerprints.get(name, value) != value]
        if other:
            raise ValueError(
                f"the codes in {str(self.folder)!r} were made by another {' and '.join(other)} than the one given; "
                "give the one that made them, or encode the data again"
            )

    def batch(
        self, rows: torch.Tensor, task: Task, *, generator: Generators = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The given and the generated codes of `rows` for `task`: two dicts of name -> (B, *shape) int64.

        A given segment with several variants is drawn from them, by `generator` or by one a row. A generated one is
        always the first, but for a text whose rows have several captions, of which one is drawn.

        Raises:
            ValueError: if the task has a segment that the data lacks.
        """
        for name in task.segments:
            if name not in self.segments:
                raise ValueError(f"task {str(task)!r}: the data has no segment {name!r}, only {sorted(self.segments)}")

        def drawn(name: str, suffixes: tuple[str, ...]) -> torch.Tensor:
            for suffix in suffixes:
                variants = (self.prompts if suffix == "_prompts" else self.variants).get(name)
                if variants is not None:
                    counts = self._counts[name + suffix][rows]
                    choice = (uniform(rows.shape, generator, rows.device) * counts).long()
                    return variants[rows, choice].long()
            return self.codes[name][rows].long()

        given = {name: drawn(name, ("_prompts", "_variants")) for name in task.given}
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
