"""Figures of spoken captions: what a recogniser hears, what a pipeline writes of them, and draws."""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from ..pipelines.audio_codecs import decode_waveform, encode_waveform, has_own_codes, num_audio_codes, output_rate
from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..tasks import Task
from ..utils.decoding import decode_image, to_pixels
from ..utils.sounds import audio_library, read_sound
from .audio_losses import SpectralLoss
from .data import load_training_dataset
from .evaluation import mean, reconstruct, sample, share
from .evaluation_texts import equal
from .metrics import counts_by_level, level_figures, psnr, usage_of_counts


RECOGNISER_RATE = 16_000  # Hz, of its acoustic model
DITHER, SILENCE = 1e-3, 0.3  # of a full scale, and seconds: it is lost in silence that is all zeros
BEAMS = {"beam": 1e-80, "wbeam": 1e-60, "pbeam": 1e-80}  # none of the captions is given up early
CLIPPED = 0.999


class CaptionRecogniser:
    """Which of some English captions is said: pocketsphinx with their grammar.

    Args:
        captions: those among which it chooses; without those that have a word its dictionary lacks.
    """

    def __init__(self, captions: Sequence[str]) -> None:
        try:
            pocketsphinx = import_module("pocketsphinx")
        except ImportError as error:
            raise ImportError("pocketsphinx is needed to recognise speech: pip install pocketsphinx") from error
        self.decoder = pocketsphinx.Decoder(samprate=RECOGNISER_RATE, loglevel="FATAL", **BEAMS)
        said = {caption: spoken_words(caption) for caption in captions}
        known = {c: words for c, words in said.items() if words and all(map(self.decoder.lookup_word, words.split()))}
        self.captions = {words: caption for caption, words in known.items()}
        if not self.captions:
            raise ValueError("none of the captions has English words alone")
        self.decoder.add_jsgf_string(
            "captions", f"#JSGF V1.0; grammar captions; public <caption> = {' | '.join(self.captions)};"
        )
        self.decoder.activate_search("captions")

    def knows(self, caption: str) -> bool:
        return self.captions.get(spoken_words(caption)) is not None

    def hears(self, waveform: Any, sampling_rate: int, caption: str) -> bool:
        """Whether a sound (T,) is recognised as a caption."""
        samples = audio_library("soxr").resample(np.asarray(waveform, np.float32), sampling_rate, RECOGNISER_RATE)
        samples = np.pad(samples, int(SILENCE * RECOGNISER_RATE))
        samples = samples + DITHER * np.random.default_rng(0).standard_normal(len(samples))
        self.decoder.start_utt()
        self.decoder.process_raw((samples.clip(-1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self.decoder.end_utt()
        heard = self.decoder.hyp()
        return heard is not None and heard.hypstr == spoken_words(caption)


def spoken_words(caption: str) -> str:
    """A caption's words as a dictionary has them."""
    return " ".join(re.findall(r"[a-z']+", caption.lower()))


@dataclass
class SpeechData:
    """Spoken captions that training never saw.

    Args:
        rows: of each kind of ``held_out``; without such a column all are ``"test"``.
        sounds: by row, undecoded.
        columns: values of the other columns by row.
        recogniser: of the rows' captions.
        pictures: (M, 3, H, W) uint8, all pictures that there are, and `picture_of` the number of each row's; None
            without pictures.
    """

    rows: dict[str, list[int]]
    sounds: list[Any]
    columns: dict[str, list]
    recogniser: CaptionRecogniser
    pictures: torch.Tensor | None
    picture_of: list[int]

    @classmethod
    def load(cls, args: argparse.Namespace, resolution: int | None) -> "SpeechData":
        """By ``dataset_name``, ``audio_column``, ``caption_column``, ``image_column``, ``language`` and
        ``num_samples`` of `args`.

        Args:
            resolution: of the pictures; None where they are not needed.
        """
        from datasets import Audio

        images = [] if resolution is None else [args.image_column]
        source = {"dataset_name": args.dataset_name, "split": "test", "columns": [args.caption_column]}
        dataset = load_training_dataset(**source, image_column=images).cast_column(
            args.audio_column, Audio(decode=False)
        )
        names = [name for name in dataset.column_names if name not in (args.audio_column, args.image_column)]
        columns = {name: list(dataset[name]) for name in names}
        held = columns.get("held_out", ["test"] * len(dataset))
        spoken = columns.get("language", [args.language] * len(dataset))
        recogniser = CaptionRecogniser([columns[args.caption_column][row] for row in range(len(dataset))])
        fit = [
            row
            for row, caption in enumerate(columns[args.caption_column])
            if spoken[row] == args.language and recogniser.knows(caption)
        ]
        rows = {kind: [row for row in fit if held[row] == kind] for kind in dict.fromkeys(held)}
        generator = np.random.default_rng(args.seed)
        rows = {kind: generator.permutation(some)[: args.num_samples].tolist() for kind, some in rows.items() if some}
        chosen = {columns[args.caption_column][row] for some in rows.values() for row in some}
        recogniser = CaptionRecogniser(sorted(chosen))
        pictures, picture_of = None, []
        if resolution is not None:
            files: dict[bytes, int] = {}
            values = [one["bytes"] for one in dataset[args.image_column]]
            picture_of = [files.setdefault(value, len(files)) for value in values]
            pictures = torch.stack([decode_image({"bytes": value}, resolution) for value in files])
            pictures = ((pictures + 1) * 127.5).round().to(torch.uint8)
        return cls(rows, list(dataset[args.audio_column]), columns, recogniser, pictures, picture_of)


def recognised(data: SpeechData, sounds: Sequence[Any], rate: int, captions: list[str]) -> dict[str, Any]:
    return share([data.recogniser.hears(one, rate, said) for one, said in zip(sounds, captions, strict=True)])


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


def measure_speech(pipeline: VQDiTPipeline, data: SpeechData, args: argparse.Namespace) -> dict[str, dict]:
    """Figures by task: of the codec alone, and of all tasks of one segment from one that speak or listen."""
    segments = pipeline._segments
    field = {name: one.output_field for name, one in segments.items()}
    audio = next((name for name in sorted(segments) if field[name] == "audios"), None)
    if audio is None:
        raise ValueError(f"the pipeline has no sounds, which the figures are of; it has {sorted(segments)}")
    segment: Any = segments[audio]
    rate, own = segment.sampling_rate, segment.beside.sampling_rate
    tasks = [Task.parse(task) for task in pipeline.transformer.config.tasks]
    report: dict[str, dict] = {}
    for kind, rows in data.rows.items():
        captions = [data.columns[args.caption_column][row] for row in rows]
        sounds = [read_sound(data.sounds[row], own) for row in rows]
        trips = [one for sound in sounds for one in segment.decode(segment.encode(sound))]
        found = report.setdefault("codec", {})
        found[f"{kind}, originals recognised"] = recognised(data, sounds, own, captions)
        found[f"{kind}, round trips recognised"] = recognised(data, trips, rate, captions)
        found |= {f"{kind}, originals, {name}": value for name, value in levels(sounds).items()}
        found |= {f"{kind}, round trips, {name}": value for name, value in levels(trips).items()}
        for task in tasks:
            if len(task.generated) > 1 or len(task.given) > 1 or audio not in task.segments:
                continue
            (wanted,), found = task.generated, report.setdefault(str(task), {})
            passed = {name: _values(data, field[name], rows, captions, sounds, args) for name in task.given}
            drawn = sample(pipeline, args, len(rows), f"{task}, {kind}", wanted, passed)
            if wanted == audio:
                if task.given:
                    found[f"{kind}, recognised"] = recognised(data, drawn, rate, captions)
                found |= {f"{kind}, {name}": value for name, value in levels(drawn).items()}
            elif field[wanted] == "texts":
                found[f"{kind}, exact match"] = equal(drawn, captions)
            elif field[wanted] == "labels":
                found[f"{kind}, right"] = equal(drawn, [data.columns[args.label_column][row] for row in rows])
            elif data.pictures is not None:
                found[f"{kind}, nearest picture"] = share(_nearest(pipeline, data, drawn, rows, args))
        if any(task.generated == (audio,) for task in tasks):
            found = report.setdefault("inpainting", {})
            blank = np.array([0, 1, 0])
            options = {"mask_image": [blank] * len(rows)}
            filled = sample(pipeline, args, len(rows), f"inpainting, {kind}", audio, {audio: sounds}, **options)
            found[f"{kind}, middle third blanked, recognised"] = recognised(data, filled, own, captions)
    return report


def _values(data: SpeechData, field: str, rows: list[int], captions: list[str], sounds: list, args: Any) -> Any:
    if field == "audios":
        return sounds
    if field == "texts":
        return captions
    if field == "labels":
        return [data.columns[args.label_column][row] for row in rows]
    if data.pictures is None:
        raise ValueError(f"image_column={args.image_column!r} is needed: the pipeline is given pictures")
    return to_pixels(data.pictures[[data.picture_of[row] for row in rows]]) / 2 + 0.5


def _nearest(
    pipeline: VQDiTPipeline, data: SpeechData, drawn: torch.Tensor, rows: list[int], args: argparse.Namespace
) -> list[bool]:
    """Whether no picture of the data, as the image tokenizer gives it back, is nearer than the row's."""
    assert data.pictures is not None
    real = reconstruct(pipeline.image_vq, data.pictures, args.batch_size)[1].flatten(1)
    distance = torch.cdist((drawn * 2 - 1).flatten(1).float().cpu(), real)
    own = distance.gather(1, torch.tensor([data.picture_of[row] for row in rows])[:, None])[:, 0]
    return (own <= distance.min(1).values + 1e-4).tolist()
