"""Audio codecs: loading them, and the same calls for those of transformers and for our own."""

import inspect
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, EncodecFeatureExtractor

from ..models.spectrogram_vq import SpectrogramVQModel
from ..utils.checks import shown
from ..utils.components import find_beside, find_component, has_file


EXTRACTOR_FILE = "preprocessor_config.json"


def load_audio_codec(name: str, cache_dir: str | None = None, *, frozen: bool = True) -> tuple[Any, Any]:
    """The codec in a folder or Hub repository, a [`SpectrogramVQModel`] or one of transformers (`DacModel`,
    `EncodecModel`, `MimiModel`, ...), and its feature extractor, which stands in its folder or in ``tokenizer`` there.

    Args:
        frozen: without, the codec's parameters have the gradients that they are made with, for training.

    Raises:
        ValueError: if there is no feature extractor, which a [`SpectrogramVQModel`] can do without, or the codec is
            none that can be used ([`check_codec`]).
    """
    source, folder = find_component(name, "audio_codec", cache_dir)
    options = {"subfolder": folder, "cache_dir": cache_dir}
    found = SpectrogramVQModel.load_config(source, subfolder=folder or None, cache_dir=cache_dir)
    if found.get("_class_name") == SpectrogramVQModel.__name__:
        codec = SpectrogramVQModel.from_pretrained(source, subfolder=folder or None, cache_dir=cache_dir)
    else:
        codec = AutoModel.from_pretrained(source, config=AutoConfig.from_pretrained(source, **options), **options)
    check_codec(codec)
    own = f"{folder}/{EXTRACTOR_FILE}" if folder else EXTRACTOR_FILE
    place: tuple[str, str] | None = (source, folder)
    if not has_file(source, own, cache_dir):
        place = find_beside(source, folder, "tokenizer", EXTRACTOR_FILE, cache_dir)
    if place is not None:
        extractor = AutoFeatureExtractor.from_pretrained(place[0], subfolder=place[1], cache_dir=cache_dir)
    elif has_own_codes(codec):
        extractor = EncodecFeatureExtractor(sampling_rate=codec.config.sampling_rate)
    else:
        raise ValueError(f"audio_codec={name!r} has no feature extractor ({EXTRACTOR_FILE}) in its folder")
    return (codec.eval().requires_grad_(False) if frozen else codec), extractor


def check_codec(codec: Any) -> None:
    """Raise a ValueError unless a codec's codes are all that its sounds are made of: one channel, no chunks, whose
    overlaps they would hold twice, and no scale beside them."""
    config, kind = codec.config, type(codec).__name__
    if not has_own_codes(codec) and not (hasattr(codec, "encode") and hasattr(codec, "decode")):
        raise ValueError(f"audio_codec is {kind}, which doesn't encode sounds and decode them")
    for name, usual in (("audio_channels", 1), ("normalize", False), ("chunk_length_s", None)):
        value = getattr(config, name, usual)
        if value != usual:
            raise ValueError(f"audio_codec: {name}={shown(value)} of {kind}'s config must be {usual}")


def has_own_codes(codec: Any) -> bool:
    """Whether a codec is a [`SpectrogramVQModel`], of this package or of a repository's own code."""
    return hasattr(codec, "encode_codes")


def num_audio_codes(codec: Any) -> int:
    """The codes of each of a codec's codebooks."""
    if has_own_codes(codec):
        return codec.num_codes
    levels = getattr(codec.config, "quantization_levels", None)  # of FSQ
    return codec.config.codebook_size if levels is None else math.prod(levels)


def output_rate(codec: Any, feature_extractor: Any) -> int:
    """The sampling rate of what a codec decodes to."""
    return getattr(codec.config, "output_sampling_rate", feature_extractor.sampling_rate)


def samples_per_frame(codec: Any, feature_extractor: Any) -> int:
    """The samples of an encoded sound that each frame of codes is of."""
    if has_own_codes(codec):
        return codec.downsample_factor
    config = codec.config
    hop = getattr(config, "encoder_hop_length", getattr(config, "hop_length", None))
    return hop or round(feature_extractor.sampling_rate / config.frame_rate)


@torch.no_grad()
def encode_waveform(
    codec: Any, feature_extractor: Any, waveform: np.ndarray, device: torch.device, num_codebooks: int | None = None
) -> torch.LongTensor:
    """Codes (n, q) of a waveform (T,), n the frames that it fills.

    Each sound is encoded on its own: what it becomes must not depend on the padding of others.

    Args:
        num_codebooks: q, the first so many of residual codes; by default all that the codec has.

    Raises:
        ValueError: if the codec has fewer.
    """
    hop = samples_per_frame(codec, feature_extractor)
    whole = F.pad(torch.from_numpy(waveform), (0, -len(waveform) % hop))
    if has_own_codes(codec):
        codes = codec.encode_codes(whole[None].to(device))[0]  # (n, q)
    else:
        rate = feature_extractor.sampling_rate
        inputs = dict(feature_extractor(whole.numpy(), sampling_rate=rate, return_tensors="pt"))
        taken = inspect.signature(codec.encode).parameters
        passed: dict[str, Any] = {
            name: value.to(device, codec.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if name in taken
        }
        if "bandwidth" in taken:  # by default the lowest, of the fewest codebooks
            passed["bandwidth"] = max(codec.config.target_bandwidths)
        found = codec.encode(**passed).audio_codes
        codes = found.reshape(-1, found.shape[-1]).T  # of one sound, without Encodec's axis of chunks: (n, q)
    if num_codebooks is not None and codes.shape[1] < num_codebooks:
        raise ValueError(f"audio_codebooks={num_codebooks}, but the codec makes {codes.shape[1]} codes a frame")
    return codes[:, :num_codebooks].long()


@torch.no_grad()
def decode_waveform(codec: Any, codes: torch.LongTensor) -> torch.Tensor:
    """A waveform (T,), float32, of codes (n, q)."""
    if not len(codes):
        return torch.zeros(0, device=codes.device)
    if has_own_codes(codec):
        return codec.decode_codes(codes[None]).sample[0].float()
    rows: Any = codes.T[None]  # (1, q, n)
    if "audio_scales" in inspect.signature(codec.decode).parameters:  # Encodec's, with an axis of chunks
        return codec.decode(rows[None], [None]).audio_values.flatten().float()
    return codec.decode(audio_codes=rows).audio_values.flatten().float()
