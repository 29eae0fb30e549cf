"""A dataset of codes on disk: written once by the tokenizers, read by transformer training, which then never runs one.

A folder of codes holds ``codes-00000.parquet``, ``codes-00001.parquet``, ... and ``segments.json``. Each parquet
column is one segment's codes in row-major order; ``{segment}_prompts`` holds several variants (wordings of a text,
slightly moved pictures) for use where the segment is given. ``segments.json`` tells each segment's ``vocab_size`` and
``shape``, the names of the labels, and how many times smaller ``image_lowres`` is.
"""

import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .image_utils import lower_resolution, shift_and_scale
from .models.image_vq import ImageVQModel
from .models.text_vq import TextVQModel
from .schedulers.samplers import Generators, uniform
from .tasks import Task
from .training_utils import check_captions, decode_images, to_pixels
from .utils.texts import tokenize_to_length


INDEX_FILE = "segments.json"
# Segments that are not made from a column of texts.
RESERVED = ("image", "image_lowres", "text", "label")


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
    batch_size: int = 64,
    shard_size: int = 100_000,
) -> Path:
    """Encode a `datasets.Dataset` into a folder of codes; rows whose picture can't be read are left out with a
    warning.

    Args:
        dataset: rows with an undecoded image column, as [`~training_utils.load_training_dataset`] gives them.
        output_dir: the folder to write. The index is written last, so that an unfinished folder is not read.
        resolution: side of the square pictures given to `image_vq`, in pixels.
        image_vq, text_vq, tokenizer: the tokenizers; needed for the columns that are given.
        image_column: becomes the segment ``image``.
        caption_column: becomes the segment ``text``, the caption that the model learns to write.
        prompt_columns: more wordings of the caption (other languages, keywords), used where text is given.
        text_columns: more texts, each a segment of its column's name.
        label_column: becomes the segment ``label``.
        labels: the names of the labels in the order of their codes; by default those in the data, sorted.
        image_augmentations: so many copies of each picture, slightly moved and scaled
            ([`~image_utils.shift_and_scale`]), are used beside it where the picture is given.
        lowres_factor: adds the segment ``image_lowres``: the picture so many times smaller, resized to full size
            again by bicubic interpolation before it is encoded.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if there is no column to encode, a tokenizer is missing, a caption is empty or a label unknown.
    """
    from datasets import Dataset

    if image_column is None and caption_column is None:
        raise ValueError("give image_column, caption_column or both: there is nothing to encode")
    if image_column is not None and image_vq is None:
        raise ValueError(f"image_column={image_column!r} needs image_vq")
    if caption_column is not None and (text_vq is None or tokenizer is None):
        raise ValueError(f"caption_column={caption_column!r} needs text_vq and tokenizer")

    segments: dict[str, dict] = {}
    if label_column is not None:
        feature = dataset.features[label_column]
        names = feature.int2str(dataset[label_column]) if hasattr(feature, "int2str") else dataset[label_column]
        labels = labels or (feature.names if hasattr(feature, "names") else sorted(set(map(str, names))))
        unknown = sorted({str(name) for name in names} - set(labels))
        if unknown:
            raise ValueError(f"column {label_column!r}: the labels {unknown[:5]} are not among {labels}")
        label_codes = [labels.index(str(name)) for name in names]
        segments["label"] = {"vocab_size": len(labels), "shape": [1]}
    wordings = [caption_column, *(prompt_columns or [])] if caption_column is not None else []
    text_columns = text_columns or []
    if text_columns and caption_column is None:
        raise ValueError(f"text_columns={text_columns!r} need caption_column: they share the codes of its segment")
    for column in text_columns:
        if column in RESERVED or column == caption_column:
            raise ValueError(f"text_columns={text_columns!r}: {column!r} can't name a segment of its own")
    for column in {*wordings, *text_columns}:
        check_captions(dataset[column], column)
    if lowres_factor is not None and (image_column is None or lowres_factor < 2 or resolution % lowres_factor):
        raise ValueError(f"lowres_factor={lowres_factor} needs image_column, and must divide {resolution}")
    generator = torch.Generator().manual_seed(0)

    def encode_pixels(pixels: torch.Tensor) -> torch.Tensor:
        return image_vq.encode_codes(pixels.to(image_vq.device)).cpu()

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for old in [output_dir / INDEX_FILE, *output_dir.glob("codes-*.parquet")]:
        old.unlink(missing_ok=True)

    starts = range(0, len(dataset), shard_size)
    for shard, start in enumerate(tqdm(starts, desc="Encoding", disable=len(starts) < 2)):
        part = dataset.select(range(start, min(start + shard_size, len(dataset))))
        rows = list(range(len(part)))
        columns: dict[str, list] = {}
        if image_column is not None:
            pictures, rows = decode_images(part, image_column, resolution)
            batches = [to_pixels(batch) for batch in pictures.split(batch_size)]
            codes = torch.cat([encode_pixels(batch) for batch in batches])
            segments["image"] = {"vocab_size": image_vq.num_codes, "shape": list(codes.shape[1:])}
            columns["image"] = codes.flatten(1).tolist()
            if image_augmentations:
                moved = [
                    torch.cat([encode_pixels(shift_and_scale(batch, generator)) for batch in batches])
                    for _ in range(image_augmentations)
                ]
                columns["image_prompts"] = torch.stack([codes, *moved], 1).flatten(1).tolist()
            if lowres_factor is not None:
                lowres = torch.cat([encode_pixels(lower_resolution(batch, lowres_factor)) for batch in batches])
                segments["image_lowres"] = {**segments["image"], "shared_with": "image"}
                columns["image_lowres"] = lowres.flatten(1).tolist()
        encoded = {}
        for column in dict.fromkeys([*wordings, *text_columns]):
            texts = [part[column][row] for row in rows] if len(rows) < len(part) else list(part[column])
            encoded[column] = encode_texts(texts, text_vq, tokenizer, batch_size)
        if wordings:
            segments["text"] = {"vocab_size": text_vq.num_codes, "shape": list(encoded[caption_column].shape[1:])}
            columns["text"] = encoded[caption_column].tolist()
            columns["text_prompts"] = torch.stack([encoded[c] for c in wordings], 1).flatten(1).tolist()
        for column in text_columns:
            segments[column] = {**segments["text"], "shared_with": "text"}
            columns[column] = encoded[column].tolist()
        if label_column is not None:
            columns["label"] = [[label_codes[start + row]] for row in rows]
        path = output_dir / f"codes-{shard:05d}.parquet"
        Dataset.from_dict(columns).to_parquet(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    index = {
        "segments": segments,
        "labels": labels if label_column is not None else [],
        "lowres_factor": lowres_factor,
    }
    (output_dir / INDEX_FILE).write_text(json.dumps(index, indent=2, ensure_ascii=False))
    return output_dir


def encode_texts(texts: list[str], text_vq: TextVQModel, tokenizer, batch_size: int = 64) -> torch.Tensor:
    """Codes (N, L) int64 of `texts`, on the CPU."""
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
        labels (`list[str]`): names of the label codes.
        lowres_factor (`int`, *optional*): how many times smaller ``image_lowres`` is.

    Raises:
        ValueError: if the folder is not a complete folder of codes, or a code is out of range.
    """

    def __init__(self, folder: str | Path) -> None:
        from datasets import load_dataset

        folder = Path(folder)
        if not (folder / INDEX_FILE).is_file():
            raise ValueError(f"{str(folder)!r} is no complete folder of codes: there is no {INDEX_FILE} in it")
        index = json.loads((folder / INDEX_FILE).read_text())
        self.segments: dict[str, dict] = index["segments"]
        self.labels: list[str] = index["labels"]
        self.lowres_factor: int | None = index["lowres_factor"]
        files = sorted(str(path) for path in folder.glob("codes-*.parquet"))
        table = load_dataset("parquet", data_files=files, split="train").with_format("numpy")
        self.codes: dict[str, torch.Tensor] = {}
        self.prompts: dict[str, torch.Tensor] = {}
        for name, segment in self.segments.items():
            small = torch.int16 if segment["vocab_size"] < 2**15 else torch.int32
            codes = torch.from_numpy(table[name][:]).to(small)
            if codes.min() < 0 or codes.max() >= segment["vocab_size"]:
                raise ValueError(
                    f"segment {name!r} has codes from {codes.min()} to {codes.max()}; "
                    f"they must be in [0, {segment['vocab_size']})"
                )
            self.codes[name] = codes.unflatten(1, segment["shape"])
            if f"{name}_prompts" in table.column_names:
                prompts = torch.from_numpy(table[f"{name}_prompts"][:]).to(small)
                self.prompts[name] = prompts.unflatten(1, (-1, *segment["shape"]))

    def __len__(self) -> int:
        return len(next(iter(self.codes.values())))

    def batch(
        self, rows: torch.Tensor, task: Task, *, generator: Generators = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The given and the generated codes of `rows` for `task`: two dicts of name -> (B, *shape) int64.

        A given segment with several variants is drawn from them, by `generator` or by one a row; a generated one is
        always the first.

        Raises:
            ValueError: if the task has a segment that the data lacks.
        """
        for name in task.segments:
            if name not in self.segments:
                raise ValueError(f"task {str(task)!r}: the data has no segment {name!r}, only {sorted(self.segments)}")
        given = {}
        for name in task.given:
            if name in self.prompts:
                variants = self.prompts[name]
                choice = (uniform(rows.shape, generator, rows.device) * variants.shape[1]).long()
                given[name] = variants[rows, choice].long()
            else:
                given[name] = self.codes[name][rows].long()
        return given, {name: self.codes[name][rows].long() for name in task.generated}
