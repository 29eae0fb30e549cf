"""Figures of spoken captions: what a recogniser hears, what a pipeline writes of them, and draws."""

import argparse
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..pipelines.segment_base import ARGUMENTS
from ..tasks import Task
from ..utils.decoding import decode_image, to_bytes, to_pixels
from ..utils.sounds import read_sound
from ..utils.texts import check_captions
from .audio_losses import SpectralLoss
from .caption_recogniser import CaptionRecogniser
from .data import MissingSplitError, load_training_dataset
from .evaluation import as_arguments, label_names, sample, share
from .evaluation_pictures import load_measured_split, read_pictures, reconstruct
from .evaluation_texts import equal
from .sound_levels import levels, middle_third


SHOWN = 8  # examples


@dataclass
class SpeechData:
    """Spoken captions that training never saw.

    Args:
        rows: of each kind of ``held_out``; without such a column all are ``"test"``.
        sounds: by row, undecoded.
        columns: values of the other columns by row.
        recogniser: of the rows' captions; None for a language that it doesn't know.
        any_caption: one of all captions in the language, the training split's too, for what is said without one.
        pictures: (M, 3, H, W) uint8, all that differ, of the training split too, and `picture_of` the number of each
            row's, -1 of one that has none; None without pictures.
        others: the other columns of sounds, undecoded, by name.
    """

    rows: dict[str, list[int]]
    sounds: list[Any]
    columns: dict[str, list]
    recogniser: CaptionRecogniser | None
    any_caption: CaptionRecogniser | None
    pictures: torch.Tensor | None
    picture_of: list[int]
    others: dict[str, Sequence[Any]]

    @classmethod
    def load(cls, args: argparse.Namespace, resolution: int | None, resize_mode: str = "crop") -> "SpeechData":
        """By ``dataset_name``, ``audio_column``, ``caption_column``, ``image_column``, ``language`` and
        ``num_samples`` of `args`.

        Args:
            resolution: of the pictures; None where they are not needed.
            resize_mode: how they are read, as in [`~utils.fitting.resize_image`].
        """
        from datasets import Audio, Image

        images = [] if resolution is None else [args.image_column]
        wanted = {"columns": [args.caption_column], "audio_column": args.audio_column, "image_column": images}
        dataset = load_measured_split(args.dataset_name, "test", **wanted)
        spoken_in = [name for name, kind in dataset.features.items() if isinstance(kind, Audio)]
        spoken_in += [args.audio_column] * (args.audio_column not in spoken_in)
        for name in spoken_in:
            dataset = dataset.cast_column(name, Audio(decode=False))
        media = {name for name, kind in dataset.features.items() if isinstance(kind, Audio | Image)}
        names = [name for name in dataset.column_names if name not in {args.image_column, *media}]
        columns = {name: list(dataset[name]) for name in names}
        held = columns.get("held_out", ["test"] * len(dataset))
        spoken = columns.get("language", [args.language] * len(dataset))
        captions = columns[args.caption_column]
        check_captions(captions, args.caption_column)
        picture_of, first = number_pictures(dataset, args.image_column) if images else ([], {})
        fit = [row for row in range(len(dataset)) if spoken[row] == args.language]
        if not fit:
            raise ValueError(f"language={args.language!r} is of no row; there are {sorted(set(map(str, spoken)))}")
        english, any_caption = args.language.split("-")[0] == "en", None
        if english:
            any_caption = CaptionRecogniser(sorted({captions[row] for row in fit} | _trained_captions(args)))
            fit = [row for row in fit if any_caption.knows(captions[row])]
        if images:  # some of Tux Paint's stamps have none
            fit = [row for row in fit if picture_of[row] >= 0]
        if not fit:
            lacking = f"known to the recogniser{' and a picture' if images else ''}" if english else "with a picture"
            raise ValueError(f"caption_column={args.caption_column!r} has no caption {lacking} in {args.language!r}")
        rows = {kind: [row for row in fit if held[row] == kind] for kind in dict.fromkeys(held)}
        generator = np.random.default_rng(args.seed)
        rows = {kind: generator.permutation(some)[: args.num_samples].tolist() for kind, some in rows.items() if some}
        chosen = {captions[row] for some in rows.values() for row in some}
        recogniser = CaptionRecogniser(sorted(chosen)) if english else None
        pictures = None
        if resolution is not None:
            values = dataset.select_columns(args.image_column).select(list(first.values()))
            own = [to_bytes(decode_image(one[args.image_column], resolution, resize_mode)) for one in values]
            pictures = torch.stack(own)
            if others := _other_pictures(args, first):
                pictures = torch.cat([pictures, read_pictures(others, args.image_column, resolution, resize_mode)[0]])
        sounds = {name: dataset[name] for name in spoken_in}  # read by the row
        heard = list(sounds.pop(args.audio_column))
        return cls(rows, heard, columns, recogniser, any_caption, pictures, picture_of, sounds)


def number_pictures(dataset: Any, column: str) -> tuple[list[int], dict[bytes, int]]:
    """Which of a dataset's different pictures each row has, -1 for none, and of each of these, by what tells it from
    others, the first row that has it."""
    found: list[int] = []
    numbers: dict[bytes, int] = {}
    first: dict[bytes, int] = {}
    for row, one in enumerate(dataset.select_columns(column)):
        if (value := one[column]) is None:
            found.append(-1)
            continue
        key = hashlib.sha256(value["bytes"] or str(value["path"]).encode()).digest()
        first.setdefault(key, row)
        found.append(numbers.setdefault(key, len(numbers)))
    return found, first


def _other_pictures(args: argparse.Namespace, known: Mapping[bytes, int]) -> list[Any]:
    """A dataset of the training split's pictures, each once, without the known ones; none where none is left."""
    column = args.image_column
    try:
        trained = load_training_dataset(dataset_name=args.dataset_name, split="train", image_column=column)
    except MissingSplitError:
        return []
    rows = [row for key, row in number_pictures(trained, column)[1].items() if key not in known]
    return [trained.select_columns(column).select(rows)] if rows else []


def _trained_captions(args: argparse.Namespace) -> set[str]:
    """Those of the training split in the language, where there is one."""
    column = args.caption_column
    try:
        trained = load_training_dataset(dataset_name=args.dataset_name, split="train", columns=[column])
    except MissingSplitError:
        return set()
    spoken = trained["language"] if "language" in trained.column_names else [args.language] * len(trained)
    return {text for text, language in zip(trained[column], spoken, strict=True) if text and language == args.language}


def recognised(data: SpeechData, sounds: Sequence[Any], rate: int, captions: list[str] | None) -> dict[str, dict]:
    """The share of sounds in which their captions are heard; without captions, that in which any is, and how many
    different ones. Nothing without a recogniser."""
    if data.recogniser is None or data.any_caption is None:
        return {}
    if captions is not None:
        hits = [data.recogniser.hears(one, rate, said) for one, said in zip(sounds, captions, strict=True)]
        return {"recognised": share(hits)}
    heard = [data.any_caption.heard(one, rate) for one in sounds]
    different = len(set(heard) - {None})
    return {
        "any caption recognised": share([one is not None for one in heard]),
        "different captions recognised": {"value": different, "unit": ""},
    }


@dataclass
class SpeechReport:
    """What was measured, and examples.

    Args:
        figures: by task.
        rows: examples by task, as [`~training.evaluation_report.draw_rows`] draws them, sounds as spectrograms.
        said: captions, and the sounds (T,) that were made of them.
        sampling_rate: of these sounds.
    """

    figures: dict[str, dict]
    rows: list[tuple[str, list[tuple]]]
    said: list[tuple[str, torch.Tensor]]
    sampling_rate: int

    def show(self, title: str, contents: Sequence, below: Sequence[str], rate: int | None = None) -> None:
        """Add a row of pictures, of texts, or of sounds at a rate, and the texts below them."""
        contents = contents[:SHOWN]
        cells = contents if rate is None else spectrograms(contents, rate)
        self.rows.append((title, list(zip(cells, below, strict=False))))


def spectrograms(sounds: Sequence[Any], rate: int) -> list[torch.Tensor]:
    """Log-mel spectrograms of sounds (T,) as grey pictures (3, M, n) in [0, 1], low tones below, of one length."""
    waveforms = [torch.as_tensor(sound).float().cpu() for sound in sounds]
    padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    pictures = (SpectralLoss(rate).picture(padded).clamp(-1, 1) + 1) / 2
    return list(pictures.flip(2).expand(-1, 3, -1, -1))


@dataclass(frozen=True)
class SpokenRows:
    """Some rows, and what they hold of each segment.

    Args:
        sounds: (T,), at the codec's rate.
        fields: what each segment is, as the pipeline's outputs are called.
        columns: of the data, of each segment of labels and of the captions, whose key is ``""``.
    """

    data: SpeechData
    rows: list[int]
    sounds: list[np.ndarray]
    fields: dict[str, str]
    columns: dict[str, str]

    @property
    def captions(self) -> list[str]:
        return self._column(self.columns[""])

    def _column(self, name: str) -> list[str]:
        return [self.data.columns[name][row] for row in self.rows]

    def of(self, segment: str) -> Any:
        """What is passed of a segment."""
        if segment in self.columns:
            return self._column(self.columns[segment])
        if self.fields[segment] == "audios":
            return self.sounds
        if self.fields[segment] == "texts":
            return self.captions
        if self.data.pictures is None:
            raise ValueError(f"the pipeline is given pictures as {segment!r}, and the data has none")
        return to_pixels(self.data.pictures[[self.data.picture_of[row] for row in self.rows]]) / 2 + 0.5

    def with_labels(self, names: Mapping[str, list[str]]) -> "SpokenRows":
        """Those whose labels are among the names of each segment."""
        labels = {segment: self.of(segment) for segment in names}
        kept = [n for n in range(len(self.rows)) if all(labels[one][n] in among for one, among in names.items())]
        return replace(self, rows=[self.rows[n] for n in kept], sounds=[self.sounds[n] for n in kept])


class SpeechMeasures:
    """Figures of a pipeline that speaks or listens.

    Args:
        args: of ``evaluate_speech.py``.

    Raises:
        ValueError: if the pipeline has no sounds, or the data no column of labels that a task needs.
    """

    def __init__(self, pipeline: VQDiTPipeline, data: SpeechData, args: argparse.Namespace) -> None:
        self.pipeline, self.data, self.args = pipeline, data, args
        segments = pipeline._segments
        self.fields = {name: one.kind for name, one in segments.items()}
        self.sounds = [name for name in sorted(segments) if self.fields[name] == "audios"]
        if not self.sounds:
            raise ValueError(f"the pipeline has no sounds, which the figures are of; it has {sorted(segments)}")
        tasks = [Task.parse(task) for task in pipeline.transformer.config.tasks]
        # What is partly known is heard; another segment of sounds may be what the pipeline says alone.
        given = [name for name in self.sounds if any(name in task.given for task in tasks)]
        self.audio = (given or self.sounds)[0]
        self.segment = cast(Any, segments[self.audio])
        self.rate = self.segment.sampling_rate
        if rates := {cast(Any, segments[name]).sampling_rate for name in self.sounds} - {self.rate}:
            raise ValueError(f"the pipeline's sounds are of several sampling rates: {sorted({self.rate, *rates})}")
        # Those that have recordings of their own beside what is heard.
        self.recorded = [name for name in self.sounds if name != self.audio and name in data.others]
        self.known = set(tasks)
        others = set(self.sounds) - {
            self.audio
        }  # which may be said: of what they are given the data has no recordings
        single = [task for task in tasks if len(task.generated) == 1 and not others & set(task.given)]
        self.tasks = [task for task in single if set(self.sounds) & set(task.segments)]
        self.labels = {name: label_names(pipeline, name) for name, one in self.fields.items() if one == "labels"}
        own = ARGUMENTS["class_labels"]
        self.columns = {"": args.caption_column, **{n: args.label_column if n == own else n for n in self.labels}}
        needed = {name for task in self.tasks for name in task.segments} & set(self.labels)
        if lacking := sorted(self.columns[name] for name in needed if self.columns[name] not in data.columns):
            flag = "label_column=" if args.label_column in lacking else "column "
            raise ValueError(f"{flag}{lacking[0]!r} is not in the data: it has {sorted(data.columns)}")
        self.report = SpeechReport({}, [], [], self.rate)

    @cached_property
    def real(self) -> torch.Tensor:
        """(M, D): all pictures as the image tokenizer gives them back."""
        return reconstruct(self.pipeline.image_vq, self.data.pictures, self.args.batch_size)[1].flatten(1)

    def measure(self, kind: str, some: SpokenRows, report: SpeechReport) -> None:
        """All figures of one kind of ``held_out``.

        Args:
            report: its figures are added to, and so are its examples.
        """

        def heard(task: str, title: str, sounds: Sequence[Any], rate: int, captions: list[str] | None) -> None:
            """What is recognised in sounds, and how loud they are."""
            both = recognised(self.data, sounds, rate, captions) | levels(sounds, rate)
            found = {f"{kind}, {title}{name}": one for name, one in both.items()}
            self.report.figures.setdefault(task, {}).update(found)
            report.show(f"{task}, {title}".removesuffix(", "), sounds, captions or [""] * len(sounds), rate)

        captions, own = some.captions, self.segment.beside.sampling_rate
        for name in (self.audio, *self.recorded):
            its, segment = self._recordings(name, some), cast(Any, self.pipeline._segments[name])
            if its.rows:
                title = "" if name == self.audio else f"{name}, "
                heard("codec", f"{title}originals, ", its.sounds, segment.beside.sampling_rate, its.captions)
                trips = [one for sound in its.sounds for one in segment.decode(segment.encode(sound))]
                heard("codec", f"{title}round trips, ", trips, self.rate, its.captions)
        for task in self.tasks:
            its = some.with_labels({name: self.labels[name] for name in task.segments if name in self.labels})
            if not its.rows:
                continue
            (wanted,) = task.generated
            drawn = self._sample(f"{task}, {kind}", its, wanted, {name: its.of(name) for name in task.given})
            if wanted in self.sounds:
                said = set(task.given) - set(self.labels)  # labels alone say no caption
                heard(str(task), "", drawn, self.rate, its.captions if said else None)
                if any(self.fields[name] == "texts" for name in task.given):
                    report.said.extend(zip(its.captions[:SHOWN], drawn, strict=False))
                continue
            report.show(str(task), drawn, its.captions)
            for name, figure in self._figures(wanted, drawn, its).items():
                self.report.figures.setdefault(str(task), {})[f"{kind}, {name}"] = figure
        if Task((), (self.audio,)) in self.known:
            blank = [with_silence(sound) for sound in some.sounds]
            options = {"mask_image": [middle_third(sound) for sound in some.sounds]}
            filled = self._sample(f"inpainting, {kind}", some, self.audio, {self.audio: blank}, **options)
            heard("inpainting", "middle third of what is heard silent, ", blank, own, captions)
            heard("inpainting", "filled in, ", filled, self.rate, captions)
            seeds = [self.args.seed + row for row in some.rows]
            noisy = [with_bursts(sound, seed) for sound, seed in zip(some.sounds, seeds, strict=True)]
            mended = self._sample(f"repair, {kind}", some, self.audio, {self.audio: noisy}, strength=0.5)
            heard("repair", "bursts of noise, ", noisy, own, captions)
            heard("repair", "repaired, ", mended, self.rate, captions)
        for task in self.tasks:
            if len(task.given) != 1 or set(task.segments) & ({*self.labels, *self.sounds} - {self.audio}):
                continue  # of another segment of sounds the data has no recordings
            # As retrieval ranks: by the likelihood of the query, or of what is sought beside its own.
            if {Task(task.generated, task.given), Task((), task.generated)} & self.known:
                (given,), (wanted,) = task.given, task.generated
                contents = (some.of(given), some.of(wanted), captions, self.args.batch_size)
                name = f"{kind}, {wanted} by {given}, the first is right"
                self.report.figures.setdefault("retrieval", {})[name] = _recall(self.pipeline, task, *contents)

    def _sample(self, title: str, some: SpokenRows, wanted: str, passed: dict[str, Any], **options: Any) -> Any:
        return sample(self.pipeline, self.args, len(some.rows), title, wanted, passed, **options)

    def _recordings(self, name: str, some: SpokenRows) -> SpokenRows:
        """Those whose column of a segment of sounds has a recording, with that."""
        if name == self.audio:
            return some
        rate, values = self.pipeline._segments[name].beside.sampling_rate, self.data.others[name]
        found = {row: value for row in some.rows if (value := values[row]) is not None}
        return replace(some, rows=list(found), sounds=[read_sound(value, rate) for value in found.values()])

    def _figures(self, wanted: str, drawn: Any, some: SpokenRows) -> dict[str, dict[str, Any]]:
        """The share of what was drawn of a segment that is right, and of labels what the most frequent one alone would
        have; none without pictures to compare with."""
        if self.fields[wanted] == "texts":
            return {"exact match": equal(drawn, some.captions)}
        if wanted in self.labels:
            labels = some.of(wanted)
            return {
                "right": equal(drawn, labels),
                "rows of the most frequent label": {"value": max(Counter(labels).values()) / len(labels)},
            }
        if self.data.pictures is None:
            return {}
        return {"nearest picture": share(_nearest(drawn, self.real, [self.data.picture_of[row] for row in some.rows]))}


def measure_speech(pipeline: VQDiTPipeline, data: SpeechData, args: argparse.Namespace) -> SpeechReport:
    """Figures of the codec alone, of each task that makes one segment and speaks or listens, of sounds partly known,
    and of retrieval; examples of the first kind of rows. Where labels that the pipeline doesn't know, such as a voice
    that training never heard, would be given or drawn, their rows are left out."""
    measures = SpeechMeasures(pipeline, data, args)
    own = measures.segment.beside.sampling_rate
    for number, (kind, rows) in enumerate(data.rows.items()):
        sounds = [read_sound(data.sounds[row], own) for row in rows]
        report = SpeechReport({}, [], [], measures.rate) if number else measures.report
        measures.measure(kind, SpokenRows(data, rows, sounds, measures.fields, measures.columns), report)
    return measures.report


def with_silence(sound: np.ndarray) -> np.ndarray:
    """A sound (T,) without the middle third of what is heard."""
    return np.where(middle_third(sound), np.float32(0), sound)


def with_bursts(sound: np.ndarray, seed: int) -> np.ndarray:
    """A sound (T,) with four bursts of white noise as loud as its loudest sample, a quarter of its length together."""
    generator, sound = np.random.default_rng(seed), sound.copy()
    length = len(sound) // 16
    for start in generator.integers(0, len(sound) - length + 1, 4):
        sound[start : start + length] = generator.uniform(-1, 1, length) * np.abs(sound).max()
    return sound


def _recall(
    pipeline: VQDiTPipeline, task: Task, given: Any, wanted: Any, captions: list[str], batch_size: int
) -> dict[str, Any]:
    """Share of given values whose best match has their caption, among all that is wanted, texts and pictures once."""
    ((query,), (name,)), items = (task.given, task.generated), list(zip(captions, wanted, strict=True))
    if pipeline._segments[name].output_field != "audios":
        items = list(dict(items).items())
    index = pipeline.index(**as_arguments({name: [item for _, item in items]}), query=query, batch_size=batch_size)
    found = pipeline.retrieve(list(given), index, top_k=1, batch_size=batch_size).indices[:, 0].tolist()
    return share([items[best][0] == caption for best, caption in zip(found, captions, strict=True)])


def _nearest(drawn: torch.Tensor, real: torch.Tensor, own: list[int]) -> list[bool]:
    """Whether of real pictures (M, D), in [-1, 1], none is nearer to a drawn one (S, 3, H, W), in [0, 1], than its
    own."""
    distance = torch.cdist((drawn * 2 - 1).flatten(1).float().cpu(), real)
    return (distance.gather(1, torch.tensor(own)[:, None])[:, 0] <= distance.min(1).values + 1e-4).tolist()
