"""From a dataset to a folder of codes: each segment's column is read and encoded by its modality's class."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..pipelines.segment_base import ENCODERS, LABEL, SegmentColumn
from ..utils.buckets import check_buckets
from ..utils.checks import check_choice, check_integer
from ..utils.distributed import from_main_process, process_rank, wait_for_processes
from ..utils.fingerprints import model_fingerprint, tokenizer_fingerprint
from ..utils.fitting import INTERPOLATION_MODES, RESIZE_MODES
from ..utils.token_ids import makes_token_ids
from ..utils.weight_files import move_into_place
from .code_files import FILES, INDEX_FILE, check_shards, read_index, write_index
from .data_identity import rows_fingerprint
from .dataset_encoder import DatasetEncoder, columns_read, files_of, source_of
from .files import scratch_folder
from .parts import make_parts
from .row_stream import RowStream
from .segment_columns import columns_of_flags, name_tokenizers
from .text_rows import one_text_a_row


logger = logging.getLogger(__name__)

# In the folder of codes, until all are there.
PARTS_FOLDER, ROWS_FOLDER = ".unfinished-codes", ".unfinished-rows"
NUM_SHARDS, MIN_SHARD_SIZE, MAX_SHARD_SIZE = 64, 256, 100_000


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
    shard_size: int | None = None,
    image_interpolation_mode: str = "lanczos",
    dataloader_num_workers: int = 0,
) -> Path:
    """Encode a `datasets.Dataset` into a folder of codes; rows with a picture that can't be read are left out with a
    warning.

    Where there are several processes, all must call it, and each encodes its own shards. What was encoded before a run
    was killed is taken by the next one of the same data, tokenizers and options, and a folder that these have written
    already is left as it is; it is known by the data's values, and the names, sizes and times of its files.

    Args:
        dataset: rows with undecoded image columns, as [`~training.data.load_training_dataset`] gives them; or the
            [`~training.row_stream.RowStream`] that it gives with ``streaming=True``, which makes the same folder.
        output_dir: the folder to write. What it holds is replaced at the end, of which a warning tells before, and
            stays as it was if something fails before.
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
        resize_mode: how a picture becomes square, or of its bucket's aspect ratio: ``"crop"``, ``"pad"``,
            ``"pad_border"`` or ``"auto"``, see [`~utils.fitting.resize_image`].
        aspect_ratio_buckets: (height, width) in pixels, in place of `resolution`: all pictures of a row are made to
            the one that is nearest in aspect ratio to the first of the picture columns. The first bucket's grid is
            the segments' ``"shape"``.
        block_length: token ids a block, see [`VQDiTTransformer2DModel`]; each text's end fills its last block.
        max_text_length: token ids of a text at most; longer ones are cut, with a warning that counts them.
        batch_size: pictures or texts that are encoded at once.
        shard_size: rows of a shard, of which a process encodes one after the other, and which a run that is killed
            loses at the most. By default a 64th of the rows, between 256 and 100,000; of a stream 100,000.
        image_interpolation_mode: how pictures are resized, see [`~utils.fitting.resize_image`].
        dataloader_num_workers: processes that read and decode ahead of time; 0: this one does.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if there is no column to encode, a tokenizer is missing, a caption is empty or a label unknown,
            a bucket is not of whole codes, or no row can be read.
    """
    options: dict[str, Any] = {"resize_mode": check_choice("resize_mode", resize_mode, RESIZE_MODES)}
    options["interpolation"] = check_choice("image_interpolation_mode", image_interpolation_mode, INTERPOLATION_MODES)
    options["augmentations"] = image_augmentations
    options |= {"block_length": check_integer("block_length", block_length, 1), "max_text_length": max_text_length}
    options["max_sequence_length"] = max_sequence_length
    if aspect_ratio_buckets is not None:
        options["buckets"] = check_buckets("aspect_ratio_buckets", aspect_ratio_buckets)
        if resolution:
            raise ValueError(f"resolution={resolution} and aspect_ratio_buckets both say a size; give one of them")
    batch_size = check_integer("batch_size", batch_size, 1)
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
    workers = check_integer("dataloader_num_workers", dataloader_num_workers, 0)
    prints, folder = tokenizer_fingerprints(tokenizers), Path(output_dir)
    stream, source = dataset if isinstance(dataset, RowStream) else None, ""
    if stream is None and not hasattr(dataset, "__len__"):
        raise ValueError(
            f"dataset={type(dataset).__name__} must be a datasets.Dataset, or what load_training_dataset gives with "
            "streaming=True"
        )
    if shard_size is None:
        shard_size = MAX_SHARD_SIZE if stream is not None else shard_size_of(len(dataset))
    shard_size = check_integer("shard_size", shard_size, 1)
    if stream is not None:
        source = source_of(stream.identity, columns, batch_size, shard_size, [prints, lowres_factor, options])
        if _is_there(folder, source):
            return folder
        dataset = stream.rows(folder / ROWS_FOLDER, columns_read(columns), files_of(columns))
    dataset, options["turns"] = one_text_a_row(dataset, [name for name in of_ids if name in dataset.column_names])
    encoder = DatasetEncoder(dataset, columns, batch_size, shard_size, workers, stream, **options)
    if aspect_ratio_buckets is not None and encoder.grouping is None:
        raise ValueError("aspect_ratio_buckets needs a column of pictures")
    if process_rank()[0] == 0:
        for note in encoder.notes:
            logger.warning(note)

    if stream is None:
        rows = rows_fingerprint(dataset, list(columns_read(columns)), times=True)
        source = source_of(rows, columns, batch_size, shard_size, [prints, lowres_factor, options])
        if _is_there(folder, source, encoder.notes):
            return folder
    unfinished = folder / PARTS_FOLDER
    parts = make_parts(unfinished, source, encoder.num_shards, partial(encoder.make_shards, unfinished))
    if process_rank()[0] == 0:
        encoder.tell(parts)
        digest = sum(int(part["digest"], 16) for part in parts) % 2**256
        index = {
            "labels": list(encoder.entries().get(LABEL, {}).get("names", {}).values()),
            "lowres_factor": lowres_factor,
            "settings": encoder.settings,
            "notes": encoder.notes,
            "fingerprints": {"data": f"{digest:064x}", **prints},
            "source": source,
        }
        _put_together(folder, parts, encoder, index)
    wait_for_processes()
    return folder


def shard_size_of(rows: int) -> int:
    """Rows of a shard, whatever the number of processes, that leave some for each of them and few to be lost."""
    return min(max(MIN_SHARD_SIZE, -(-rows // NUM_SHARDS)), MAX_SHARD_SIZE)


def _is_there(folder: Path, source: str, told: Sequence[str] = ()) -> bool:
    """Whether a folder has the whole codes of a source, which is then said, and what was lost in them, but for what is
    `told` already; of codes of another it is said that they are replaced. All processes must call it."""
    first = process_rank()[0] == 0
    if not from_main_process(first and _is_made(folder, source)):
        if first and (folder / INDEX_FILE).exists():
            logger.warning(
                f"{str(folder)!r} has codes of other data, tokenizers or options, or not whole ones: they are "
                "replaced when the new ones are whole"
            )
        return False
    logger.info(f"{str(folder)!r} has the codes of these data and tokenizers already")
    if first:
        for note in read_index(folder)["notes"]:
            if note not in told:
                logger.warning(note)
        _remove_parts(folder)  # of a run that was killed at its very end
    return True


def _is_made(folder: Path, source: str) -> bool:
    """Whether a folder has the whole codes of a source."""
    try:
        index = read_index(folder)
        return index["source"] == source and bool(check_shards(folder, index["shards"]))
    except ValueError:
        return False


def _put_together(folder: Path, parts: list[dict[str, Any]], encoder: DatasetEncoder, index: dict[str, Any]) -> None:
    """Move the shards of all parts into the folder of codes, in order, with their index."""
    geometry, entries = encoder.geometry(), encoder.entries()
    shards: list[dict[str, Any]] = []
    with scratch_folder(folder / PARTS_FOLDER) as scratch:
        for shard in (shard for part in parts for shard in part["shards"]):
            for file in (shard, *([shard["states"]] if "states" in shard else [])):
                kind = Path(file["file"])
                name = f"{kind.name.partition('-')[0]}-{len(shards):05d}{kind.suffix}"
                # The parts stay until the index is there: a run that is killed meanwhile has lost nothing.
                _link(folder / PARTS_FOLDER / file["file"], scratch / name)
                file["file"] = name
            shards.append(shard)
        segments = {name: {**one, **entries[name]} for name, one in geometry.items()}
        write_index(scratch, {"segments": segments, **index, "shards": shards})
        _remove_codes(folder)
        move_into_place(scratch, folder)
    _remove_parts(folder)


def _link(path: Path, other: Path) -> None:
    try:
        other.hardlink_to(path)
    except OSError:  # of a file system without
        shutil.copyfile(path, other)


def _remove_parts(folder: Path) -> None:
    for name in (PARTS_FOLDER, ROWS_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


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
