"""What is trained of each kind of audio codec."""

import argparse

import pytest
import torch
from transformers import DacModel

from diffusers_vqdit.pipelines.audio_codecs import encode_waveform
from diffusers_vqdit.training.audio_losses import SPECTRAL_WEIGHT, WINDOWS
from diffusers_vqdit.training.audio_objectives import audio_objective


ARGUMENTS = {"reconstruction_loss": None, "gradient_checkpointing": False, "compile": False}


def objective_of(codec, extractor, **options):
    args = argparse.Namespace(**ARGUMENTS | options)
    return audio_objective(codec.requires_grad_(True), extractor, args), args


def descend(codec, objective, waveforms, steps=5):
    trained = [parameter for parameter in codec.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(steps):
        output = objective.step(codec, waveforms)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return output


@pytest.mark.parametrize("kind", ["dac", "encodec", "mimi"])
def test_what_a_gradient_reaches_is_trained_and_nothing_else_changes(audio_codecs, kind):
    codec, extractor = audio_codecs.audio_codec(kind)
    objective, args = objective_of(codec, extractor)
    assert args.reconstruction_loss == "l1" and objective.sampling_rate == audio_codecs.RATE and objective.hop == 16
    waveforms = torch.stack([torch.from_numpy(audio_codecs.tone(0.4, 100 + 50 * i)) for i in range(4)])
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    codes = [encode_waveform(codec, extractor, one.numpy(), torch.device("cpu")) for one in waveforms]
    first = objective.step(codec, waveforms).reconstruction.item()
    last = descend(codec, objective, waveforms).reconstruction.item()
    assert last < first
    trained = {name for name, parameter in codec.named_parameters() if parameter.requires_grad}
    changed = {name for name, value in codec.state_dict().items() if not value.equal(before[name])}
    assert changed == trained
    after = [encode_waveform(codec, extractor, one.numpy(), torch.device("cpu")) for one in waveforms]
    if kind == "dac":
        assert {name for name, _ in codec.named_parameters()} == trained
    else:
        # The quantizer hands on codes alone: they stay as they were, and what makes sounds of them is trained.
        assert trained and not [name for name in trained if name.startswith("encoder")]
        assert all(name in trained for name, _ in codec.named_parameters() if name.startswith("decoder."))
        assert all(one.equal(other) for one, other in zip(codes, after, strict=True))
        frozen = [module for module in codec.encoder.modules() if list(module.parameters())]
        assert codec.decoder.training and not any(module.training for module in frozen)


@pytest.mark.parametrize("kind", ["dac", "encodec", "mimi"])
def test_loss_is_the_spectral_distance_and_the_models_own(audio_codecs, kind):
    codec, extractor = audio_codecs.audio_codec(kind)
    objective, _ = objective_of(codec, extractor)
    waveforms = torch.from_numpy(audio_codecs.tone(0.4)).expand(2, -1)
    output = objective.step(codec, waveforms)
    options = {"bandwidth": 1.2} if kind == "encodec" else {}
    expected = codec(input_values=waveforms[:, None], **options)
    made = expected.audio_values.reshape(2, -1)[:, : waveforms.shape[1]]
    distance = objective.spectral(made, waveforms[:, : made.shape[1]])
    own = expected.loss.mean() if kind == "dac" else torch.zeros(())
    assert (output.commitment > 0) == (kind == "dac")
    torch.testing.assert_close(output.reconstruction, distance)
    torch.testing.assert_close(output.commitment, own)
    torch.testing.assert_close(output.loss, SPECTRAL_WEIGHT * len(WINDOWS) * distance + own)
    assert output.real.shape == output.made.shape and output.made.requires_grad and not output.real.requires_grad
    assert {"usage", "perplexity", "usage_1", "usage_2", "usage_3"} <= set(output.figures)
    value, codes = objective.measure(codec.eval(), waveforms[0])
    assert codes.shape == (len(waveforms[0]) // 16, 3) and value == pytest.approx(distance.item(), rel=1e-2)


def test_a_codec_of_spectrograms_is_trained_as_it_is(audio_codecs):
    codec, extractor = audio_codecs.audio_codec("spectrogram")
    args = argparse.Namespace(**ARGUMENTS)
    objective = audio_objective(codec, extractor, args)
    assert args.reconstruction_loss == "l2" and objective.quantizer is codec.vq.quantize and codec.training
    assert not codec.vq.quantize.embedding.weight.requires_grad  # moving averages
    waveforms = torch.from_numpy(audio_codecs.tone(0.4)).expand(2, -1)
    output = objective.step(codec, waveforms)
    torch.testing.assert_close(output.reconstruction, (output.made - output.real).square().mean())
    torch.testing.assert_close(output.loss, output.reconstruction + output.commitment)
    assert output.made.shape == (2, 1, 6, 80) and set(output.figures) == {"usage", "perplexity"}


def test_what_cannot_be_trained_is_refused(audio_codecs):
    codec, extractor = audio_codecs.audio_codec("dac")
    codec.config.output_sampling_rate = 2 * audio_codecs.RATE
    with pytest.raises(ValueError, match="a DacModel can't be trained here; .* at one sampling rate"):
        objective_of(codec, extractor)
    codec, extractor = audio_codecs.audio_codec("dac")
    codec.main_input_name = "input_features"
    with pytest.raises(ValueError, match="a DacModel can't be trained here"):
        objective_of(codec, extractor)

    class Frozen(DacModel):
        forward = torch.no_grad()(DacModel.forward)

    with pytest.raises(ValueError, match="a Frozen gives sounds no gradient"):
        objective_of(Frozen(codec.config), extractor)
    with pytest.raises(ValueError, match="does not support (gradient|activation) checkpointing"):
        objective_of(audio_codecs.audio_codec("encodec")[0], extractor, gradient_checkpointing=True)
