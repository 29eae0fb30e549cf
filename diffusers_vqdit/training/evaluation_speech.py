"""Figures of spoken captions: what a recogniser hears, what a pipeline writes of them, and draws."""

import argparse
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from ..pipelines.audio_codecs import decode_waveform, encode_waveform, has_own_codes, num_audio_codes, output_rate
from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..pipelines.segment_base import ARGUMENTS
from ..tasks import Task
from ..utils.decoding import decode_image, to_bytes, to_pixels
from ..utils.sounds import read_sound
from ..utils.texts import check_captions
from .audio_losses import SpectralLoss
from .caption_recogniser import CaptionRecogniser
from .data import MissingSplitError, load_training_dataset
from .evaluation import as_arguments, label_names, mean, sample, share
from .evaluation_pictures import load_measured_split, read_pictures, reconstruct
from .evaluation_texts import equal
from .metrics import counts_by_level, level_figures, psnr, usage_of_counts


CLIPPED = 0.999
SHOWN = 8  # examples


@dataclass
class SpeechData:
    """Spoken captions that training never saw.

    Args:
        rows: of each kind of ``held_out``; without such a column all are ``"test"``.
        sounds: by row, undecoded.
        columns: values of the other columns by row.
        recogniser: of the rows' captions; None for a language that it doesn't know.
        pictures: (M, 3, H, W) uint8, all that differ, of the training split too, and `picture_of` the number of each
            row's, -1 of one that has none; None without pictures.
    """

    rows: dict[str, list[int]]
    sounds: list[Any]
    columns: dict[str, list]
    recogniser: CaptionRecogniser | None
    pictures: torch.Tensor | None
    picture_of: list[int]

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
        wanted = [args.audio_column, args.caption_column]
        dataset = load_measured_split(args.dataset_name, "test", columns=wanted, image_column=images)
        dataset = dataset.cast_column(args.audio_column, Audio(decode=False))
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
        english = args.language.split("-")[0] == "en"
        if english:
            everyone = CaptionRecogniser(captions)
            fit = [row for row in fit if everyone.knows(captions[row])]
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
        return cls(rows, list(dataset[args.audio_column]), columns, recogniser, pictures, picture_of)


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


def recognised(data: SpeechData, sounds: Sequence[Any], rate: int, captions: list[str]) -> dict[str, dict]:
    """The share of sounds in which their captions are heard; nothing without a recogniser."""
    if data.recogniser is None:
        return {}
    hits = [data.recogniser.hears(one, rate, said) for one, said in zip(sounds, captions, strict=True)]
    return {"recognised": share(hits)}


def levels(sounds: Sequence[Any]) -> dict[str, Any]:
    """Of sounds (T,): their level, the share of samples that are clipped, and the length."""
    parts = [torch.as_tensor(one, dtype=torch.float64) for one in sounds if len(one)]
    powers = torch.stack([part.square().mean().clamp_min(1e-12) for part in parts])
    return {
        "level": mean(10 * powers.log10(), "dB"),
        "clipped samples": {"value": float((torch.cat(parts).abs() > CLIPPED).double().mean())},
        "empty": {"value": 1 - len(parts) / len(sounds)},
    }


@torch.no_grad()
def measure_audio_tokenizer(
    codec: Any, feature_extractor: Any, sounds: Iterable[np.ndarray], captions: Sequence[str] | None = None
) -> dict[str, float]:
    """How well a codec gives sounds back, and how it uses its codes.

    Args:
        codec, feature_extractor: as [`~pipelines.audio_codecs.load_audio_codec`] gives them.
        sounds: waveforms (T,) at the feature extractor's rate, one after the other.
        captions: English texts that the sounds say, for a recogniser to tell them by, among all of them.

    Returns:
        ``spectral_distance`` ([`~training.audio_losses.SpectralLoss`]), the mean over the sounds, of a codec that
        gives sounds at the rate that it takes; ``psnr`` of the log-mel spectrograms of a [`SpectrogramVQModel`];
        ``usage`` and ``perplexity``, by level too; with `captions` the shares ``recognised_originals`` and
        ``recognised``; ``count``.
    """
    rate, made_rate = feature_extractor.sampling_rate, output_rate(codec, feature_extractor)
    spectral = SpectralLoss(rate).to(codec.device)
    found: dict[str, list[float]] = {}
    every: list[torch.Tensor] = []
    recogniser = None if captions is None else CaptionRecogniser(sorted(set(captions)))
    for number, sound in enumerate(sounds):
        codes = encode_waveform(codec, feature_extractor, sound, codec.device)
        every.append(codes.cpu())
        waveform, made = torch.from_numpy(sound).to(codec.device)[None], decode_waveform(codec, codes)
        if made_rate == rate:
            size = min(len(sound), len(made))
            found.setdefault("spectral_distance", []).append(spectral(made[None, :size], waveform[:, :size]).item())
        if has_own_codes(codec):
            decoded = codec.vq.decode_codes(codes.T[None]).sample
            found.setdefault("psnr", []).append(psnr(decoded, codec.spectrogram(waveform)).item())
        if recogniser is not None and captions is not None and recogniser.knows(said := captions[number]):
            found.setdefault("recognised_originals", []).append(recogniser.hears(sound, rate, said))
            found.setdefault("recognised", []).append(recogniser.hears(made.cpu().numpy(), made_rate, said))
    codes = torch.cat(every)
    codes = codes.reshape(-1, 1) if has_own_codes(codec) else codes  # of one codebook
    counts = counts_by_level(codes.reshape(-1, 1, 1, codes.shape[1]), num_audio_codes(codec))
    figures = {name: sum(values) / len(values) for name, values in found.items()}
    return figures | level_figures(*usage_of_counts(counts)) | {"count": len(every)}


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
        self.fields = {name: one.output_field for name, one in segments.items()}
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
            hits = {} if captions is None else recognised(self.data, sounds, rate, captions)
            found = {f"{kind}, {title}{name}": one for name, one in {**hits, **levels(sounds)}.items()}
            self.report.figures.setdefault(task, {}).update(found)
            report.show(f"{task}, {title}".removesuffix(", "), sounds, captions or [""] * len(sounds), rate)

        segment, captions, own = self.segment, some.captions, self.segment.beside.sampling_rate
        heard("codec", "originals, ", some.sounds, own, captions)
        trips = [one for sound in some.sounds for one in segment.decode(segment.encode(sound))]
        heard("codec", "round trips, ", trips, self.rate, captions)
        for task in self.tasks:
            its = some.with_labels({name: self.labels[name] for name in task.segments if name in self.labels})
            if not its.rows:
                continue
            (wanted,) = task.generated
            drawn = self._sample(f"{task}, {kind}", its, wanted, {name: its.of(name) for name in task.given})
            if wanted in self.sounds:
                heard(str(task), "", drawn, self.rate, its.captions if task.given else None)
                if any(self.fields[name] == "texts" for name in task.given):
                    report.said.extend(zip(its.captions[:SHOWN], drawn, strict=False))
                continue
            report.show(str(task), drawn, its.captions)
            if (figure := self._figure(wanted, drawn, its)) is not None:
                self.report.figures.setdefault(str(task), {})[f"{kind}, {figure[0]}"] = figure[1]
        if Task((), (self.audio,)) in self.known:
            blank = [with_silence(sound) for sound in some.sounds]
            options = {"mask_image": [np.array([0, 1, 0])] * len(blank)}
            filled = self._sample(f"inpainting, {kind}", some, self.audio, {self.audio: blank}, **options)
            heard("inpainting", "middle third silent, ", blank, own, captions)
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

    def _figure(self, wanted: str, drawn: Any, some: SpokenRows) -> tuple[str, dict[str, Any]] | None:
        """The share of what was drawn of a segment that is right, and what it is called; None without pictures to
        compare it with."""
        if self.fields[wanted] == "texts":
            return "exact match", equal(drawn, some.captions)
        if wanted in self.labels:
            return "right", equal(drawn, some.of(wanted))
        if self.data.pictures is None:
            return None
        return "nearest picture", share(_nearest(drawn, self.real, [self.data.picture_of[row] for row in some.rows]))


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
    """A sound (T,) without its middle third."""
    sound = sound.copy()
    sound[len(sound) // 3 : -(-2 * len(sound) // 3)] = 0
    return sound


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
