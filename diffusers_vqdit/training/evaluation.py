"""What every figure of ``evaluate.py`` needs: the dataset, what is measured of a pipeline, samples, shares, means."""

import argparse
import logging
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Audio, Image

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..pipelines.segment_base import ARGUMENTS, TEXT
from ..tasks import Task
from ..utils.arguments import number, positive_integer, random_seed, torch_device
from ..utils.decoding import as_picture_column, decode_image
from .evaluation_pictures import batched, load_measured_split, read_pictures, reconstruct, unit_features
from .image_losses import BackboneFeatures


logger = logging.getLogger(__name__)

CAPTIONS = {TEXT: "English", f"{TEXT}_zh": "Chinese"}  # columns, by default, where the data has them


def add_sampling_arguments(parser: argparse.ArgumentParser, *, num_samples: int) -> None:
    """Add the flags of how samples are drawn to be measured, at most `num_samples` by default."""
    parser.add_argument(
        "--num_samples", type=positive_integer, default=num_samples, help="Samples for each figure at the most."
    )
    parser.add_argument("--batch_size", type=positive_integer, default=32)
    parser.add_argument("--num_inference_steps", type=positive_integer, help="By default the pipeline's own.")
    parser.add_argument(
        "--guidance_scale", type=number(), help="For generated pictures; by default the pipeline's own."
    )
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Roles:
    """Which of a pipeline's segments are measured as what: of several the one that has an argument of its own, or the
    first.

    Args:
        image: the pictures.
        caption: the dataset's captions; "" where the pipeline has no texts.
        texts: all texts, the captions first. The others are columns of their own names.
        states: texts that are given as an encoder's states: columns of their names, or the captions where there are
            none of these names.
        prompt: the segment that captions are given by: `caption`, or the first of `states` where only that one is
            given; "" where there is neither.
        label: the labels; "" where there are none.
        lowres, factor: the small pictures that `image` is made from, and how many times smaller they are; "" and 1.
    """

    image: str
    caption: str
    texts: list[str]
    states: list[str]
    prompt: str
    label: str
    lowres: str
    factor: int

    @classmethod
    def of(cls, pipeline: VQDiTPipeline) -> "Roles":
        segments = pipeline._segments
        names = sorted(segments, key=lambda name: name not in ARGUMENTS.values())
        images, texts, labels = (
            [name for name in names if segments[name].output_field == field] for field in ("images", "texts", "labels")
        )
        images = [name for name in images if "lowres_of" not in segments[name].entry]
        if not images:
            raise ValueError(f"the pipeline has no pictures, which the figures are of; it has {names}")
        lowres = next((n for n in names if segments[n].entry.get("lowres_of") == images[0]), "")
        factor = segments[lowres].entry["factor"] if lowres else 1
        caption, label = next(iter(texts), ""), next(iter(labels), "")
        states = [name for name in names if segments[name].given_field == "texts"]
        given = {name for task in pipeline.transformer.config.tasks or [] for name in Task.parse(task).given}
        prompt = next((name for name in (caption, *states) if name in given), caption)
        return cls(images[0], caption, texts, states, prompt, label, lowres, factor)

    def columns(self, segment: str, data: "EmojiData") -> list[str]:
        """The dataset's columns of a given text: those of the captions, in all languages, or its own."""
        captions = segment == self.caption or segment in self.states and segment not in data.columns
        return list(data.captions) if captions else [segment]

    def pictures(self, rows: list[int], segment: str, data: "EmojiData") -> torch.Tensor:
        """Of a segment, in [0, 1]."""
        return data.real(rows) if segment == self.image else data.others(rows, segment)

    def column(self, segment: str, data: "EmojiData") -> str:
        """The dataset's column of a text."""
        return next(iter(self.columns(segment, data)), data.caption_column)


def check_colours(pipeline: VQDiTPipeline) -> None:
    """Raise a ValueError for a pipeline of grey pictures: those that are measured are RGB."""
    channels = 3 if pipeline.image_vq is None else pipeline.image_vq.config.in_channels
    if channels != 3:
        raise ValueError(f"image_vq has in_channels={channels}; what is measured of pipelines is RGB pictures, of 3")


def text_vq_of(pipeline: VQDiTPipeline) -> tuple[TextVQModel, Any] | None:
    """The model that makes the codes of captions, and its tokenizer; None for token ids, or where there are none."""
    segment = pipeline._segments.get(Roles.of(pipeline).caption)
    if segment is None or not isinstance(segment.vq, TextVQModel):
        return None
    return segment.vq, segment.beside


def label_names(pipeline: VQDiTPipeline, label: str) -> list[str]:
    """The labels of a segment, in the order of their codes."""
    segment = pipeline._segments[label]
    return segment.decode(torch.arange(segment.vocab_size)[:, None])


def task_between(pipeline: VQDiTPipeline, given: list[str], generated: list[str]) -> str:
    """The task from some segments to others; "" if the pipeline lacks one of them, or doesn't know it."""
    if "" in given or "" in generated:
        return ""
    task = str(Task(tuple(given), tuple(generated)))
    return task if task in pipeline.transformer.config.tasks else ""


def tasks_between(pipeline: VQDiTPipeline, given: list[str], generated: list[str]) -> list[Task]:
    """The tasks that the pipeline knows from one segment of the one list to one of the other."""
    tasks = [Task.parse(arrow) for arrow in pipeline.transformer.config.tasks]
    pairs = [task for task in tasks if len(task.given) == len(task.generated) == 1]
    return [task for task in pairs if task.given[0] in given and task.generated[0] in generated]


def image_tasks(pipeline: VQDiTPipeline, roles: Roles) -> dict[Task, list[str]]:
    """The tasks of one picture from others, with texts beside them or without, and which these others are."""
    segments, found = pipeline._segments, {}
    for task in map(Task.parse, pipeline.transformer.config.tasks):
        others = [name for name in task.given if name not in (*roles.texts, *roles.states)]
        pictures = all(segments[name].kind == "images" and not segments[name].tiled for name in others)
        made = [segments[name].output_field == "images" and not segments[name].tiled for name in task.generated]
        if others and pictures and made == [True]:
            found[task] = others
    return found


BY_FEATURES = " by features"  # what the report calls the judge


@dataclass
class EmojiData:
    """The dataset and the sets of rows that are measured.

    Args:
        pictures: (N, 3, H, W) uint8, the training split first; those that can't be read are left out, as rows too.
        columns: each column's N values.
        train, composition, test: rows: some of the training split, the held-out compositions, the whole test split.
            Without a column ``held_out`` that says so, all of the test split stand for compositions.
        plain: rows of the training split whose emoji has no variants, so that no rule tells their texts; none without
            a column ``emoji``.
        codes, decoded: codes (N, h, w) of all pictures, and what they decode to, in [-1, 1].
        captions: what the report calls the captions of a column, by column; the first is the captions' own.
        label_column: the labels'.
        splits: both, with their pictures undecoded, for columns of other pictures.
        styles: rows whose emoji, and whose style, training saw, never together: ``held_out`` says "style".
        unseen: rows of the training split with a text in a column ``unseen``, a wording that training never saw.
        judge: a second one beside the nearest pixels: features of a vision backbone.
        features: (N, C), unit length, of what all pictures decode to; None without a judge.
        resize_mode: how pictures that are not square are read.
        held_out: what the report calls the compositions.
    """

    pictures: torch.Tensor
    columns: dict[str, list[str]]
    train: list[int]
    composition: list[int]
    test: list[int]
    plain: list[int]
    codes: torch.Tensor
    decoded: torch.Tensor
    captions: dict[str, str]
    label_column: str
    splits: Any = None
    styles: list[int] = field(default_factory=list)
    unseen: list[int] = field(default_factory=list)
    judge: BackboneFeatures | None = None
    features: torch.Tensor | None = None
    resize_mode: str = "crop"
    held_out: str = "held-out compositions"

    @classmethod
    def load(
        cls,
        image_vq: ImageVQModel,
        resolution: int,
        args: argparse.Namespace,
        judge: BackboneFeatures | None = None,
        resize_mode: str = "crop",
        max_samples: int | None = None,
        labels: Sequence[str] = (),
    ) -> "EmojiData":
        """By ``dataset_name``, ``image_column``, ``caption_columns``, ``label_column``, ``num_samples``, ``seed`` and
        ``batch_size`` of `args`; pictures as [`~utils.fitting.resize_image`] reads them by `resize_mode`. Of each
        split the first `max_samples` rows; pictures, and what they decode to, are mapped from temporary files.
        `labels` are the tasks that read the labels.

        Raises:
            ValueError: if the judge doesn't take pictures of this size, or a column is missing.
        """
        if judge is not None:
            judge.check_size(resolution)
        found = []
        for name in ("train", "test"):
            split = load_measured_split(args.dataset_name, name, image_column=args.image_column)
            if max_samples is not None and len(split) > max_samples:
                logger.warning(
                    f"of {len(split)} rows of split={name!r} the first max_samples={max_samples} are measured"
                )
                split = split.select(range(max_samples))
            found.append(split)
        names = [name for name, feature in found[0].features.items() if not isinstance(feature, Audio | Image)]
        there = sorted(names)
        if args.label_column not in there and labels:
            raise ValueError(f"label_column={args.label_column!r}: the data has {there}; of tasks leave out {labels}")
        if args.caption_columns != CAPTIONS and not set(args.caption_columns) <= set(there):
            raise ValueError(f"caption_columns={list(args.caption_columns)}: the data has {there}")
        pictures, (train, test) = read_pictures(found, args.image_column, resolution, resize_mode)
        columns = {name: [*train[name], *test[name]] for name in names}
        test_rows = list(range(len(train), len(pictures)))
        held = columns.get("held_out", ["composition"] * len(pictures))
        composition = [row for row in test_rows if held[row] == "composition"] or list(test_rows)
        styles = [row for row in test_rows if held[row] == "style"]
        unseen = [row for row, text in enumerate(columns.get("unseen", [])[: len(train)]) if text]
        for rows in (composition, styles, unseen):
            random.Random(args.seed).shuffle(rows)
        chosen = random.Random(args.seed).sample(range(len(train)), min(args.num_samples, len(train)))
        captions = {name: title for name, title in args.caption_columns.items() if name in columns}
        emoji = columns.get("emoji", [])
        variants = Counter(emoji)
        plain = [row for row, one in enumerate(emoji[: len(train)]) if variants[one] == 1]
        plain = random.Random(args.seed).sample(plain, min(args.num_samples, len(plain)))
        codes, decoded = reconstruct(image_vq, pictures, args.batch_size)
        return cls(
            pictures,
            columns,
            chosen,
            composition[: args.num_samples],
            test_rows,
            plain,
            codes,
            decoded,
            captions,
            args.label_column,
            splits=[train, test],
            styles=styles[: args.num_samples],
            unseen=unseen[: args.num_samples],
            judge=judge,
            features=None if judge is None else unit_features(judge, decoded, args.batch_size),
            resize_mode=resize_mode,
            held_out=cls.held_out if "held_out" in columns else "test split",
        )

    def at_size(self, image_vq: ImageVQModel, size: tuple[int, int], args: argparse.Namespace) -> "EmojiData":
        """The same rows with pictures of another height and width, looked at by their pixels alone."""
        pictures, _ = read_pictures(self.splits, args.image_column, size, self.resize_mode)
        codes, decoded = reconstruct(image_vq, pictures, args.batch_size)
        return replace(self, pictures=pictures, codes=codes, decoded=decoded, judge=None, features=None)

    def of_column(self, image_vq: ImageVQModel, column: str, args: argparse.Namespace) -> "EmojiData":
        """The same rows with the pictures of another column, looked at by their pixels alone."""
        pictures = (self.others(list(range(len(self.pictures))), column) * 255).round().byte()
        codes, decoded = reconstruct(image_vq, pictures, args.batch_size)
        return replace(self, pictures=pictures, codes=codes, decoded=decoded, judge=None, features=None)

    @property
    def caption_column(self) -> str:
        return next(iter(self.captions), TEXT)

    def title(self, column: str) -> str:
        """What the report calls the texts of a column."""
        return self.captions.get(column, column)

    def real(self, rows: list[int]) -> torch.Tensor:
        """Pictures in [0, 1], as pipelines take tensors."""
        return self.pictures[rows].float() / 255

    def texts(self, rows: list[int], column: str | None = None) -> list[str]:
        """Of a column, by default the captions'.

        Raises:
            ValueError: if the data has no such column.
        """
        column = column or self.caption_column
        if column not in self.columns:
            raise ValueError(f"column {column!r} is not in the data, which has {sorted(self.columns)}")
        return [self.columns[column][row] for row in rows]

    def others(self, rows: list[int], column: str) -> torch.Tensor:
        """Pictures of another column, in [0, 1], of the size of `pictures`.

        Raises:
            ValueError: if the data has no such column, or one of them can't be read.
        """
        if column not in self.splits[0].features:
            raise ValueError(f"column {column!r} is not in the data, which has {self.splits[0].column_names}")
        first, found = len(self.splits[0]), []
        for row in rows:
            split, place = (self.splits[0], row) if row < first else (self.splits[1], row - first)
            value = as_picture_column(split.select_columns(column), column)[place][column]
            found.append(decode_image(value, self.pictures.shape[-1], self.resize_mode))
        return torch.stack(found) / 2 + 0.5

    def labels(self, rows: list[int]) -> list[str]:
        return self.texts(rows, self.label_column)

    def distances(self, samples: torch.Tensor) -> torch.Tensor:
        """(S, N) from samples, in [0, 1], to all pictures of the set."""
        return torch.cdist((samples * 2 - 1).flatten(1).float().cpu(), self.decoded.flatten(1))

    def nearest_rows(self, samples: torch.Tensor) -> list[int]:
        return self.distances(samples).argmin(1).tolist()

    def nearest(self, samples: torch.Tensor, rows: list[int]) -> list[bool]:
        """Whether no picture of the set is nearer to a sample, in [0, 1], than its row's."""
        distance = self.distances(samples)
        named = distance.gather(1, torch.tensor(rows)[:, None])[:, 0]
        # Two emoji may look the same: the named one must be as near as the nearest.
        return (named <= distance.min(1).values + 1e-4).tolist()

    def likeness(self, samples: torch.Tensor, batch_size: int) -> torch.Tensor | None:
        """(S, N) cosines of the judge's features of samples, in [0, 1], and of all pictures; None without a judge."""
        if self.judge is None or self.features is None:
            return None
        return unit_features(self.judge, samples.float().cpu() * 2 - 1, batch_size) @ self.features.T

    def judged(self, samples: torch.Tensor, rows: list[int], batch_size: int) -> dict[str, dict[str, Any]]:
        """The share of samples, in [0, 1], to which no picture is nearer than their rows', by what is looked at: its
        pixels, and the judge's features where there is one. ``""`` is the pixels' key."""
        found = {"": share(self.nearest(samples, rows))}
        if (likeness := self.likeness(samples, batch_size)) is not None:
            own = likeness.gather(1, torch.tensor(rows)[:, None])[:, 0]
            found[BY_FEATURES] = share((own >= likeness.max(1).values - 1e-5).tolist())
        return found

    def nearest_by(self, samples: torch.Tensor, batch_size: int) -> dict[str, list[int]]:
        """The rows of the pictures nearest to samples, in [0, 1], by what is looked at as in [`judged`]."""
        found = {"": self.nearest_rows(samples)}
        if (likeness := self.likeness(samples, batch_size)) is not None:
            found[BY_FEATURES] = likeness.argmax(1).tolist()
        return found


def share(hits: list[bool]) -> dict[str, Any]:
    value = sum(hits) / len(hits)
    return {"value": value, "standard_error": math.sqrt(value * (1 - value) / len(hits)), "count": len(hits)}


def mean(values: torch.Tensor, unit: str) -> dict[str, Any]:
    error = values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"value": values.double().mean().item(), "standard_error": error, "count": len(values), "unit": unit}


def as_arguments(passed: Mapping[str, Any]) -> dict[str, Any]:
    """What is passed by segment as the pipeline's arguments: those that segments have of their own, and ``inputs``."""
    own = {argument: passed[name] for argument, name in ARGUMENTS.items() if name in passed}
    others = {name: value for name, value in passed.items() if name not in ARGUMENTS.values()}
    return {**own, "inputs": others} if others else own


def sample(
    pipeline: VQDiTPipeline,
    args: argparse.Namespace,
    count: int,
    description: str,
    output: str,
    passed: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """What the pipeline makes of `count` inputs, lists or tensors in batches, each with a seed of its own.

    Pictures come as one tensor in [0, 1].

    Args:
        output: the generated segments, joined by '+'.
        passed: what is passed to the pipeline, by segment.
        options: other arguments of the pipeline.
    """
    if args.num_inference_steps is not None:
        options["num_inference_steps"] = args.num_inference_steps
    fields = [pipeline._segments[name].output_field for name in output.split("+")]
    if args.guidance_scale is not None and "images" in fields:
        options["guidance_scale"] = args.guidance_scale
    inputs = {**options, **as_arguments(passed or {})}
    generators = [torch.Generator().manual_seed(args.seed * 1_000_003 + i) for i in range(count)]
    results: dict[str, list] = {}
    for part in batched(count, args.batch_size, description):

        def cut(value: Any, part: slice = part) -> Any:
            if isinstance(value, dict):
                return {name: cut(item) for name, item in value.items()}
            return value[part] if isinstance(value, list | torch.Tensor) else value

        cuts = {name: cut(value) for name, value in inputs.items()}
        if not passed:
            cuts["num_images_per_prompt"] = part.stop - part.start
        drawn = pipeline(output=output, generator=generators[part], output_type="pt", **cuts)
        for name, value in drawn.segments.items():
            results.setdefault(name, []).append(value)
    joined = {n: torch.cat(v) if isinstance(v[0], torch.Tensor) else sum(v, []) for n, v in results.items()}
    return joined if len(joined) > 1 else next(iter(joined.values()))
