"""Sounds as segments: the codes of an audio codec, all of a frame in one position, with an end."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging

from ..utils.checks import check_integer, check_number, shown
from ..utils.sounds import audio_library, read_sound, read_sounds, sound_bytes, sound_seconds
from .audio_codecs import (
    check_codec,
    decode_waveform,
    encode_waveform,
    load_audio_codec,
    num_audio_codes,
    output_rate,
    samples_per_frame,
)
from .segment_base import MEASURED, ColumnReader, EncodedValue, SegmentProcessor


_audio_logger = logging.get_logger(__name__)

MAX_AUDIO_LENGTH = 20.0  # seconds, where nothing else is said
FADE = 0.01  # seconds, of what is generated into what is known


def with_end(codes: torch.LongTensor, length: int, end: int) -> torch.LongTensor:
    """Codes (length, q) of codes (n, q), cut or followed by the code `end`."""
    codes = codes[:length]
    return F.pad(codes, (0, 0, 0, length - len(codes)), value=end)


def _seconds(value: Any) -> float:
    """A sound's length; of one that can't be read 0, until it is left out."""
    try:
        return sound_seconds(value)
    except ValueError:
        return 0.0


class AudioReader(ColumnReader):
    """A column of sounds. Codes are in [0, K], where K, of the codec's K codes, is the end.

    Args:
        max_audio_length: seconds of a sound at most; a longer one is cut, and has no end.
        audio_codebooks: codes a frame, the first so many of the codec's; by default all.
        frames: frames of the longest sound; by default those of the longest in the column.
    """

    feature = "Audio"
    measure = staticmethod(_seconds)

    def __init__(
        self,
        dataset: Any,
        column: str,
        tokenizer: Any = None,
        beside: Any = None,
        *,
        max_audio_length: float = MAX_AUDIO_LENGTH,
        audio_codebooks: int | None = None,
        frames: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, column, tokenizer, beside)
        check_codec(tokenizer)
        limit = check_number("max_audio_length", max_audio_length, 0, above=True)
        self.rate, self.end = beside.sampling_rate, num_audio_codes(tokenizer)
        if (known := f"{column}{MEASURED}") in dataset.column_names:
            lengths = dataset.select_columns(known).with_format("numpy")[:][known]
        else:
            lengths = np.array([_seconds(self.dataset[row][column]) for row in range(len(dataset))])
        longest = np.zeros(max(1, int(min(limit, lengths.max()) * self.rate)), dtype=np.float32)
        if audio_codebooks is not None:
            check_integer("audio_codebooks", audio_codebooks, 1)
        shape = encode_waveform(tokenizer, beside, longest, tokenizer.device, audio_codebooks).shape
        self.given_frames, self.frames, self.codebooks = frames, frames or shape[0], shape[1]
        self.shape = [self.frames, self.codebooks]
        self.lengths = lengths
        self.notes = self._cut()

    def _cut(self) -> list[str]:
        limit = self.frames * samples_per_frame(self.tokenizer, self.beside) / self.rate
        cut, count = int((self.lengths > limit).sum()), len(self.lengths)
        return [f"column {self.column!r}: {cut} of {count} sounds are cut to {limit:.1f} s"] if cut else []

    def lengthen(self, others: Sequence[Self]) -> None:
        """Take as many frames as a pretrained model has for the codec's sounds, or as the longest column: segments of
        one length share embeddings."""
        if self.given_frames is None:
            given = [other.given_frames for other in others if other.given_frames is not None]
            self.frames = max(given or [other.frames for other in others])
            self.shape = [self.frames, self.codebooks]
            self.notes = self._cut()

    @property
    def vocab_size(self) -> int:
        return self.end + 1

    @property
    def reads(self) -> tuple:
        return *super().reads, self.rate

    def read(self, row: int) -> Any:
        """The undecoded sound, as waveforms of a shard would be too large; decoded once to see that it can be."""
        value = self.dataset[row][self.column]
        read_sound(value, self.rate)
        return value

    def digest(self, values: list) -> bytes:
        return b"".join(hashlib.sha256(sound_bytes(value)).digest() for value in values)

    def encode(self, values: list, batch_size: int) -> list[torch.LongTensor]:
        return [self._codes(read_sound(value, self.rate))[None] for value in values]

    def _codes(self, waveform: np.ndarray) -> torch.LongTensor:
        codes = encode_waveform(self.tokenizer, self.beside, waveform, self.tokenizer.device, self.codebooks)
        return with_end(codes, self.frames, self.end).cpu()


class AudioSegment(SegmentProcessor):
    """Sounds: waveforms of any length up to the training's, or whatever [`read_sound`] takes."""

    ndims = (1, 2)
    tokenizer = "audio_codec"
    named_beside = "feature_extractor"
    reader = AudioReader
    noun = "sound"
    output_field = "audios"
    takes_mask = True
    takes_integers = True
    how_to_pass = "give mask_image to fill a part in, or strength to draw what fits worst anew"

    @classmethod
    def place_beside(cls, tokenizer: str) -> str | None:
        return f"{tokenizer}.tokenizer"  # the pipeline's own feature extractor is that of its pictures

    @classmethod
    def load_tokenizer(cls, name: str, *, cache_dir: str | None = None, **options: Any) -> tuple[Any, Any]:
        return load_audio_codec(name, cache_dir)

    @classmethod
    def check_entry(cls, where: str, entry: dict[str, Any], name: str, segments: Mapping[str, Any]) -> dict[str, Any]:
        entry, shape = super().check_entry(where, entry, name, segments), list(segments[name]["shape"])
        if len(shape) != 2:
            raise ValueError(
                f"{where}: the transformer has {name!r} of shape {shape}, which must be [frames, codebooks]"
            )
        return entry

    @classmethod
    def known_options(cls, entry: Mapping[str, Any], geometry: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        return {"frames": geometry["shape"][0], "audio_codebooks": geometry["shape"][1]}

    @property
    def end(self) -> int:
        """The code that follows a sound's last frame."""
        return self.vocab_size - 1

    @property
    def sampling_rate(self) -> int:
        """Of what is generated."""
        return output_rate(self.vq, self.beside)

    def fields(self, value: Any) -> dict[str, Any]:
        rate = {"sampling_rate": self.sampling_rate} if isinstance(value, list) else {}  # not of codes
        return super().fields(value) | rate

    def read(self, value: Any) -> list[np.ndarray]:
        try:
            return read_sounds(value, self.beside.sampling_rate)
        except ValueError as error:
            raise ValueError(f"{self.argument}: {error}") from error

    def encode(self, values: Any) -> torch.LongTensor:
        """Codes (B, frames, q) of sounds, the end after each; what is too long is cut off, with a warning."""
        frames, codebooks = self.shape
        rows = []
        for waveform in self.read(values):
            codes = encode_waveform(self.vq, self.beside, waveform, self.device(), codebooks)
            if len(codes) > frames:
                _audio_logger.warning(f"{self.argument} has a sound of {len(codes)} frames; {frames} are used")
            rows.append(with_end(codes, frames, self.end))
        return torch.stack(rows)

    def read_mask(self, mask_image: Any, values: list) -> torch.Tensor:
        """Masks (B, T) of sounds, T the samples of the longest: from arrays of any length, stretched over the sound,
        one for each or one for all.

        Raises:
            ValueError: for other values than 0 and 1, or as many masks as there are no sounds.
        """
        every = mask_image if isinstance(mask_image, list) else [mask_image] * len(values)
        if len(every) != len(values):
            raise ValueError(
                f"mask_image has {len(every)} masks for {len(values)} sounds; give one each, or one for all"
            )
        masks = torch.zeros(len(values), max(map(len, values)), dtype=torch.bool)
        for row, (one, waveform) in enumerate(zip(every, values, strict=True)):
            mask = torch.as_tensor(one) if isinstance(one, np.ndarray | torch.Tensor) else torch.empty(0)
            if mask.ndim != 1 or not len(mask) or not ((mask == 0) | (mask == 1)).all():
                raise ValueError(f"mask_image={shown(one)} must be an array (T,) over the sound: 1 to fill in, else 0")
            masks[row, : len(waveform)] = mask[torch.arange(len(waveform)) * len(mask) // len(waveform)].bool()
        return masks

    def encode_partial(self, values: list, mask_image: torch.Tensor | None = None) -> EncodedValue:
        """Codes of sounds, unknown at all frames that the mask touches; without a mask, all of them.

        As in VampNet (Garcia et al. 2023), the other codes are those of the whole sound: a codec's neighbouring frames
        tell a little of what is filled in, and a mask that is wider says less.
        """
        codes = self.encode(values)
        if mask_image is None:
            return EncodedValue(codes)
        hop, frames = samples_per_frame(self.vq, self.beside), self.shape[0]
        if (late := mask_image[:, frames * hop :].any(0).nonzero()).numel():
            rate = self.beside.sampling_rate
            raise ValueError(
                f"mask_image asks to fill in what is at {(frames * hop + int(late[0])) / rate:.2f} s, but sounds of "
                f"{self.name!r} end at {frames * hop / rate:.2f} s: cut the sound, or mask what comes before"
            )
        covered = F.pad(mask_image.float(), (0, -mask_image.shape[1] % hop))
        touched = covered.unflatten(1, (-1, hop)).amax(2)[:, :frames] > 0  # (B, n)
        touched = F.pad(touched, (0, frames - touched.shape[1])).to(codes.device)

        def finish(codes: torch.LongTensor, repeats: int, output_type: str) -> list:
            waveforms = []
            for row, one in enumerate(codes):
                known, mask = values[row // repeats], mask_image[row // repeats]
                used = min(-(-len(known) // hop), frames)
                waveforms.append(self.paste(self._waveform(one, used), known, mask[: len(known)]))
            return as_sounds(waveforms, output_type)

        return EncodedValue(codes.masked_fill(touched[..., None], self.vocab_size), self.name, finish)

    def paste(self, filled: torch.Tensor, known: np.ndarray, mask: torch.Tensor) -> torch.Tensor:
        """The samples of `known` where a mask is 0, and those of `filled` where it is 1, of its length.

        By how much they differ at the edges is added to what is filled in and fades out there: no click is heard, and
        nothing of what was blanked.
        """
        rate, own = self.sampling_rate, self.beside.sampling_rate
        if rate != own:
            known = audio_library("soxr").resample(known, own, rate)
            mask = mask[torch.arange(len(known)) * len(mask) // len(known)]
        samples, places = torch.from_numpy(known), (~mask).nonzero()[:, 0].numpy()
        filled = F.pad(filled.cpu()[: len(samples)], (0, max(0, len(samples) - len(filled))))
        if not len(places):
            return filled
        steps = np.interp(np.arange(len(samples)), places, (samples - filled).numpy()[places])
        size = 2 * int(FADE * rate) + 1
        near = F.avg_pool1d(mask.float()[None], size, 1, size // 2, count_include_pad=False)[0]
        share = (2 * near - 1).clamp(0, 1)  # 0 at the mask's edges, 1 some way in
        joined = filled + torch.from_numpy(steps).float() * (1 - share)
        return torch.where(mask, joined.clamp(-1, 1), samples)

    def decode(self, codes: torch.LongTensor, output_type: str = "pil") -> list:
        """Waveforms (T,) of codes (B, frames, q), each up to its end: arrays, or with ``"pt"`` tensors."""
        # A frame is of the end where most of its codes are.
        ends = (codes == self.end).sum(2) * 2 > codes.shape[2]  # (B, n)
        used = (~ends).long().cumprod(1).sum(1).tolist()
        return as_sounds([self._waveform(one, size) for one, size in zip(codes, used, strict=True)], output_type)

    def _waveform(self, codes: torch.LongTensor, used: int) -> torch.Tensor:
        """A waveform (T,) in [-1, 1] of the first `used` frames of codes (n, q); an end among them stands for the code
        before."""
        codes = codes[:used].clone()
        for frame in range(used):
            stray = codes[frame] == self.end
            codes[frame][stray] = codes[frame - 1][stray] if frame else 0
        return decode_waveform(self.vq, codes).clamp(-1, 1)


def as_sounds(waveforms: list[torch.Tensor], output_type: str) -> list:
    """Waveforms as a pipeline gives them: on the CPU, as tensors for ``"pt"`` and else as arrays."""
    sounds = [waveform.cpu().float() for waveform in waveforms]
    return sounds if output_type == "pt" else [waveform.numpy() for waveform in sounds]
