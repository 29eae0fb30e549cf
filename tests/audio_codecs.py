"""Tiny audio codecs with random weights, of the real classes, with their feature extractors."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from datasets import Audio, Features, Value
from transformers import (
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    MimiConfig,
    MimiModel,
)

from diffusers_vqdit import SpectrogramVQModel


RATE = 1600  # Hz
CODECS = ["dac", "encodec", "mimi", "spectrogram"]


def with_codebooks(codec):
    """A codec whose codebooks, which are zeros before training, are random."""
    for name, buffer in codec.named_buffers():
        if name.endswith(("embed", "embed_sum")):
            buffer.normal_()
    return codec.eval()


def audio_codec(kind):
    """A codec of `RATE` and 16 codes, and what stands beside it."""
    torch.manual_seed(8)
    extractor = EncodecFeatureExtractor(sampling_rate=RATE)
    if kind == "dac":
        sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "codebook_dim": 4, "n_codebooks": 3}
        config = DacConfig(**sizes, codebook_size=16, downsampling_ratios=[4, 4], sampling_rate=RATE)
        return DacModel(config).eval(), DacFeatureExtractor(sampling_rate=RATE, hop_length=16)
    if kind == "encodec":
        sizes = {"hidden_size": 8, "num_filters": 4, "num_lstm_layers": 1, "codebook_size": 16}
        config = EncodecConfig(
            **sizes, upsampling_ratios=[4, 4], sampling_rate=RATE, target_bandwidths=[0.4, 1.2], codebook_dim=8
        )
        return with_codebooks(EncodecModel(config)), extractor
    if kind == "mimi":
        sizes = {"hidden_size": 16, "num_filters": 4, "codebook_size": 16, "codebook_dim": 8, "num_quantizers": 3}
        sizes |= {"num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
        config = MimiConfig(
            **sizes,
            vector_quantization_hidden_dimension=8,
            upsample_groups=16,
            upsampling_ratios=[4, 2],
            frame_rate=100.0,
            sampling_rate=RATE,
        )
        return with_codebooks(MimiModel(config)), extractor
    codec = SpectrogramVQModel(
        sampling_rate=RATE,
        n_fft=32,
        hop_length=8,
        num_mel_bins=6,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=16,
        vq_embed_dim=4,
        codebook_init="uniform",
        griffin_lim_iterations=4,
    )
    return codec.eval(), extractor


def tone(seconds, frequency=200.0, rate=RATE):
    """A tone that fades out, (T,) float32."""
    time = torch.arange(int(seconds * rate)) / rate
    return (0.5 * torch.sin(2 * torch.pi * frequency * time) * (1 - time / seconds)).numpy()


def sound_folder(folder, count=10):
    """Sounds as FLAC files, all different."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        soundfile.write(folder / f"{index}.flac", tone(0.05 + 0.02 * index, 100 + 40 * (index % 4)), RATE)
    return folder


def sound_table(path, count=8, broken=()):
    """A parquet file of sounds, each with a ``text`` and a ``label``; the rows of `broken` are no sounds."""
    rows = []
    for index in range(count):
        file = io.BytesIO()
        soundfile.write(file, tone(0.05 + 0.02 * index, 100 + 40 * (index % 4)), RATE, format="FLAC")
        data = b"broken" if index in broken else file.getvalue()
        text, label = f"a {('low', 'dull', 'clear', 'high')[index % 4]} tone", ("low", "high")[index % 4 > 1]
        rows.append({"audio": {"bytes": data, "path": None}, "text": text, "label": label})
    features = Features({"audio": Audio(RATE), "text": Value("string"), "label": Value("string")})
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path)
    return path
