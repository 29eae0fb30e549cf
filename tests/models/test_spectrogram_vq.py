"""The audio tokenizer, and spectrograms made waveforms again."""

import math

import pytest
import torch
from accelerate import cpu_offload
from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan, SpeechT5HifiGanConfig

from diffusers_vqdit import SpectrogramVQModel
from diffusers_vqdit.models.mel_spectrogram import griffin_lim, log_mel_spectrogram


@pytest.fixture
def codec(audio_codecs):
    return audio_codecs.audio_codec("spectrogram")[0]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 160])
def test_codes_are_frames_of_bands(codec, length):
    waveform = torch.rand(2, length) - 0.5
    codes = codec.encode_codes(waveform)
    frames = -(-length // codec.downsample_factor)
    assert codec.downsample_factor == 16 and codes.shape == (2, frames, 3) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < codec.num_codes
    decoded = codec.decode_codes(codes).sample
    assert decoded.shape == (2, 16 * frames) and decoded.dtype == torch.float32 and decoded.isfinite().all()
    assert codec.decode_codes(codes, return_dict=False)[0].equal(decoded)
    # Of a batch each is what it is alone.
    alone = codec.encode_codes(waveform[1:])
    assert alone.equal(codes[1:]) and torch.allclose(codec.decode_codes(alone).sample, decoded[1:], atol=1e-4)


def test_saved_and_loaded_it_makes_the_same_codes(codec, tmp_path):
    waveform = torch.rand(1, 320) - 0.5
    codes = codec.encode_codes(waveform)
    codec.save_pretrained(tmp_path)
    loaded = SpectrogramVQModel.from_pretrained(tmp_path)
    assert loaded.encode_codes(waveform).equal(codes)
    assert loaded.decode_codes(codes).sample.equal(codec.decode_codes(codes).sample)
    half = SpectrogramVQModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.decode_codes(half.encode_codes(waveform.bfloat16())).sample.isfinite().all()


def test_it_learns(codec):
    """Log-mel spectrograms come back better after some steps, and gradients reach the encoder."""
    time = torch.arange(160) / 1600
    waveforms = torch.stack([torch.sin(2 * math.pi * f * time) for f in (100, 200, 400, 600)]) / 2
    codec.train()
    optimizer, losses = torch.optim.Adam(codec.parameters(), 3e-3), []
    for _ in range(40):
        output = codec(waveforms)
        loss = (output.sample - output.spectrogram).square().mean()
        (loss + output.commit_loss).backward()
        assert codec.vq.encoder.conv_in.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert output.spectrogram.shape == (4, 1, 6, 20) and output.spectrogram.abs().max() <= 1
    assert len(codec(waveforms, return_dict=False)) == 2


def test_griffin_lim_finds_a_waveform_of_the_spectrogram():
    """Of a gliding tone: nearer with more iterations, and always the same."""
    codec = SpectrogramVQModel(block_out_channels=(8, 8, 8, 8))
    time = torch.arange(8192) / 11025
    waveform = 0.5 * torch.sin(2 * math.pi * (300 * time + 400 * time**2))[None]
    log_mel = log_mel_spectrogram(waveform, codec.filters("cpu"), 512, 128).clamp(-4, 0.5)
    errors = {}
    for count in (1, 32):
        made = griffin_lim(log_mel, codec.filters("cpu"), 512, 128, count)
        assert made.shape == waveform.shape and made.equal(griffin_lim(log_mel, codec.filters("cpu"), 512, 128, count))
        errors[count] = (
            (log_mel_spectrogram(made, codec.filters("cpu"), 512, 128).clamp(-4, 0.5) - log_mel).square().mean()
        )
    assert errors[32] < errors[1] / 2 and errors[32] < 0.08
    assert 0.7 < made.square().mean() / waveform.square().mean() < 1.3


def test_a_spectrogram_comes_back_without_codes_as_griffin_lim_makes_it(codec):
    """And that of codes as the codes do."""
    waveform = torch.rand(2, 320) - 0.5
    made = codec.invert_spectrogram(codec.spectrogram(waveform))
    assert made.shape == waveform.shape and made.dtype == torch.float32 and not made.requires_grad
    codes = codec.encode_codes(waveform)
    decoded = codec.vq.decode_codes(codes.transpose(1, 2)).sample
    assert codec.invert_spectrogram(decoded).equal(codec.decode_codes(codes).sample)
    assert not made.equal(codec.decode_codes(codes).sample)


def test_a_vocoder_takes_the_place_of_griffin_lim(codec):
    codes, seen = codec.encode_codes(torch.rand(2, 64) - 0.5), []

    def vocoder(log_mel):
        seen.append(log_mel)
        return log_mel.sum(2)

    assert codec.decode_codes(codes, vocoder).sample.shape == (2, 8)
    assert seen[0].equal(codec.decode_log_mel(codes)) and seen[0].shape == (2, 8, 6)
    low, high = codec.config.log_mel_range
    assert low <= seen[0].min() and seen[0].max() <= high


def test_a_vocoder_of_transformers_takes_spectrograms_of_its_kind():
    """Those that docs/audio.md gives the flags of: SpeechT5's own, of as many samples a frame."""
    options = {"sampling_rate": 16000, "n_fft": 1024, "hop_length": 256, "num_mel_bins": 80}
    codec = SpectrogramVQModel(**options, min_frequency=80, max_frequency=7600, block_out_channels=(8, 8, 8, 8)).eval()
    torch.manual_seed(0)
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=32)).eval()
    waveform = torch.rand(2, 16000) - 0.5
    own = SpeechT5FeatureExtractor()(audio_target=waveform[0].numpy(), sampling_rate=16000, return_tensors="pt")
    log_mel = log_mel_spectrogram(waveform[:1, : 62 * 256], codec.filters("cpu"), 1024, 256)[0].T
    assert torch.allclose(log_mel[2:-2], own.input_values[0][2:60], atol=1e-4)  # ends are padded in another way
    codes = codec.encode_codes(waveform)
    with torch.no_grad():
        sample = codec.decode_codes(codes, vocoder).sample
    assert codes.shape == (2, 8, 10) and sample.shape == codec.decode_codes(codes).sample.shape == (2, 8 * 8 * 256)
    assert sample.isfinite().all() and sample.std() > 0 and sample.abs().max() <= 1
    assert not sample[0].equal(sample[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_rate": 0}, "sampling_rate=0"),
        ({"hop_length": 300}, "hop_length=300"),
        ({"num_mel_bins": 60}, "num_mel_bins=60 must be a multiple of 8"),
        ({"max_frequency": 30.0}, "max_frequency=30.0"),
        ({"max_frequency": 9000.0}, "max_frequency=9000.0"),
        ({"log_mel_range": (1.0, 0.0)}, r"log_mel_range\[1\]=0.0 must be a finite number above 1.0"),
        ({"log_mel_range": 3}, "log_mel_range=3"),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"griffin_lim_iterations": 0}, "griffin_lim_iterations=0"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings=0"),
    ],
)
def test_arguments_that_dont_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SpectrogramVQModel(**options)


def test_what_is_no_waveform_or_no_codes_is_refused(codec):
    for waveform in (torch.zeros(3), torch.zeros(1, 0), torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 1, 5)):
        with pytest.raises(ValueError, match="waveform must be floats .B, T."):
            codec.encode_codes(waveform)
    for codes in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 2, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="codes must have shape .B, n, 3."):
            codec.decode_codes(codes)
    with pytest.raises(ValueError, match="codes must be in"):
        codec.decode_codes(torch.full((1, 2, 3), 16))


def test_offloaded_layer_by_layer_it_gives_the_same(codec):
    waveform = torch.rand(1, 160) - 0.5
    codes = codec.encode_codes(waveform)
    expected = codec.decode_codes(codes).sample
    cpu_offload(codec, execution_device=torch.device("cpu"))
    assert codec.encode_codes(waveform).equal(codes) and codec.decode_codes(codes).sample.equal(expected)
