"""Codecs of transformers, finetuned: they train, go on where they were stopped, and are codecs as before."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_vqdit.pipelines.audio_codecs import decode_waveform, encode_waveform, load_audio_codec
from diffusers_vqdit.training.codes import CodeDataset


OPTIONS = "--validation_split none --crop_length 1.0 --train_batch_size 4 --learning_rate 3e-3 --lr_warmup_steps 0"


def save(audio_codecs, kind, folder):
    for part in audio_codecs.audio_codec(kind):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["dac", "encodec", "mimi"])
def test_a_codec_is_finetuned_and_stays_one(run, audio_codecs, tmp_path, kind):
    """Against a discriminator, with averages; a run that goes on ends as an unbroken one."""
    data = audio_codecs.sound_table(tmp_path / "sounds.parquet")
    arguments = (
        f"--pretrained_model_name_or_path {save(audio_codecs, kind, tmp_path / kind)} --dataset_name {data} {OPTIONS} "
        "--adversarial_weight 0.5 --adversarial_start 2 --discriminator_warmup 1 --lecam_weight 0.01 "
        "--discriminator_channels 4 --discriminator_layers 2 --use_ema --ema_decay 0.5 --max_train_steps 6 "
        "--checkpointing_steps 4 --validation_steps 3 --gradient_accumulation_steps 2"
    )
    run("train_audio_vq", f"{arguments} --output_dir {tmp_path / 'whole'}")
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    run(
        "train_audio_vq",
        f"{arguments} --report_to none --output_dir {tmp_path / 'broken'} --resume_from_checkpoint latest",
    )
    before, whole, broken = (load_file(tmp_path / n / "model.safetensors") for n in (kind, "whole", "broken"))
    assert before.keys() == whole.keys() == broken.keys()
    assert all(value.equal(broken[name]) for name, value in whole.items())
    changed = {name.split(".")[0] for name, value in whole.items() if not value.equal(before[name])}
    assert "decoder" in changed and (changed == {"encoder", "quantizer", "decoder"}) == (kind == "dac")

    folders = [path.parent for path in (tmp_path / "whole").rglob("events.*")]
    logged = next(log for log in (EventAccumulator(str(f)).Reload() for f in folders) if log.Tags()["scalars"])
    assert [event.step for event in logged.Scalars("discriminator")] == [2, 3, 4, 5, 6]
    assert [event.step for event in logged.Scalars("generator")] == [3, 4, 5, 6]
    distances = [event.value for event in logged.Scalars("validation/spectral_distance")]
    assert len(distances) == 2 and distances[1] < distances[0]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| audio tokenizer | sounds, training sounds | spectral_distance |" in card
    assert "library_name: transformers" in card and "AutoModel.from_pretrained" in card
    assert len(list((tmp_path / "whole" / "samples").glob("step-000006-*.wav"))) == 4

    # A codec as any, here of a segment.
    codec, extractor = load_audio_codec(str(tmp_path / "whole"))
    assert type(codec) is type(audio_codecs.audio_codec(kind)[0]) and extractor.sampling_rate == audio_codecs.RATE
    tone = audio_codecs.tone(0.3)
    codes = encode_waveform(codec, extractor, tone, torch.device("cpu"))
    assert codes.shape == (30, 3) and abs(len(decode_waveform(codec, codes)) - len(tone)) <= 16
    sound = f"--segment sound=audio:audio:{tmp_path / 'whole'}"
    run("encode_dataset", f"--dataset_name {data} {sound} --output_dir {tmp_path / 'codes'}")
    assert CodeDataset(tmp_path / "codes").segments["sound"]["shape"] == [19, 3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dac", "encodec"])
def test_the_spectral_distance_falls(run, audio_codecs, tmp_path, kind):
    data = audio_codecs.sound_table(tmp_path / "sounds.parquet")
    start = f"--pretrained_model_name_or_path {save(audio_codecs, kind, tmp_path / kind)} --dataset_name {data}"
    run(
        "train_audio_vq",
        f"{start} {OPTIONS} --crop_length 0.15 --max_train_steps 60 --validation_steps 15 "
        f"--checkpointing_steps 0 --output_dir {tmp_path / 'out'}",
    )
    folders = [path.parent for path in (tmp_path / "out").rglob("events.*")]
    logged = next(log for log in (EventAccumulator(str(f)).Reload() for f in folders) if log.Tags()["scalars"])
    distances = [event.value for event in logged.Scalars("validation/spectral_distance")]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.93 * distances[0]


def test_a_spectrogram_codec_alone_is_finetuned_against_a_discriminator(run, audio_codecs, tmp_path):
    """It needs no feature extractor beside it, and saves one."""
    audio_codecs.audio_codec("spectrogram")[0].save_pretrained(tmp_path / "codec")
    run(
        "train_audio_vq",
        f"--pretrained_model_name_or_path {tmp_path / 'codec'} {OPTIONS} --report_to none --max_train_steps 2 "
        f"--train_data_dir {audio_codecs.sound_folder(tmp_path / 'sounds')} --adversarial_weight 0.5 "
        f"--discriminator_channels 4 --discriminator_layers 1 --output_dir {tmp_path / 'out'}",
    )
    codec, extractor = load_audio_codec(str(tmp_path / "out"))
    assert codec.num_codes == 16 and extractor.sampling_rate == audio_codecs.RATE


def test_a_crop_that_is_too_short_for_the_discriminator_is_refused(run, audio_codecs, tmp_path):
    data = audio_codecs.sound_folder(tmp_path / "sounds")
    for name in (tmp_path / "dac", tmp_path / "spectrogram"):
        start = f"--pretrained_model_name_or_path {save(audio_codecs, name.name, name)} --train_data_dir {data}"
        with pytest.raises(ValueError, match="discriminator_layers=3 must be fewer, or the part .* larger: it is"):
            run("train_audio_vq", f"{start} --crop_length 0.1 --adversarial_weight 1 --output_dir {tmp_path / 'out'}")


def test_a_codec_without_its_feature_extractor_is_refused(run, audio_codecs, tmp_path):
    audio_codecs.audio_codec("dac")[0].save_pretrained(tmp_path / "dac")
    with pytest.raises(ValueError, match="has no feature extractor"):
        run(
            "train_audio_vq",
            f"--pretrained_model_name_or_path {tmp_path / 'dac'} --train_data_dir {tmp_path} --report_to none "
            f"--output_dir {tmp_path / 'out'}",
        )
