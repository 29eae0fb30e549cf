"""Sounds through the public scripts: an audio tokenizer trained, and codecs of every kind under a transformer: their
codes trained on, published, loaded with and without the package, spoken and heard."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffusers_vqdit import SpectrogramVQModel, VQDiTPipeline
from diffusers_vqdit.pipelines.audio_codecs import load_audio_codec
from diffusers_vqdit.training.codes import CodeDataset


TUNE = "--report_to none --train_batch_size 4 --max_train_steps 2 --mixed_precision no"
TINY = f"--num_layers 1 --num_attention_heads 2 --attention_head_dim 16 {TUNE}"
TASKS = "--tasks kind->sound,sound->kind,->sound --segment kind=label:label"
ALONE = """
import json
import sys
import torch
from diffusers import DiffusionPipeline

repository, output = sys.argv[1:]
options = {"custom_pipeline": "pipeline", "trust_remote_code": True, "token": "hf_alice"}
pipe = DiffusionPipeline.from_pretrained(repository, **options)
assert "diffusers_vqdit" not in sys.modules
pipe.set_progress_bar_config(disable=True)
drawn = pipe(inputs={"kind": "low"}, output="sound", generator=torch.Generator().manual_seed(0))
heard = pipe(inputs={"sound": drawn.audios[0]}, output="kind").labels
with open(output, "w") as file:
    json.dump([drawn.audios[0].tolist(), drawn.sampling_rate, heard], file)
"""


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(inputs={"kind": "low"}, output="sound", generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["dac", "encodec", "mimi"])
def test_codecs_of_transformers(run, audio_codecs, hub, client, tmp_path, kind):
    data = audio_codecs.sound_table(tmp_path / "sounds.parquet")
    for part in audio_codecs.audio_codec(kind):
        part.save_pretrained(tmp_path / kind)
    sound = f"--segment sound=audio:audio:{tmp_path / kind}"
    run(
        "encode_dataset",
        f"--dataset_name {data} {sound} --segment kind=label:label --audio_codebooks 2 --max_audio_length 0.15 "
        f"--output_dir {tmp_path / 'codes'}",
    )
    encoded = CodeDataset(tmp_path / "codes")
    assert encoded.segments["sound"]["shape"] == [15, 2] and len(encoded) == 8
    run("train_vqdit", f"--codes_dir {tmp_path / 'codes'} {sound} {TASKS} {TINY} --output_dir {tmp_path / 'out'}")
    saved = VQDiTPipeline.from_pretrained(tmp_path / "out")
    saved.push_to_hub(f"alice/{kind}")
    loaded = VQDiTPipeline.from_pretrained(f"alice/{kind}", cache_dir=tmp_path / "cache")
    assert type(loaded.segment_tokenizers.tokenizers["sound"]) is type(audio_codecs.audio_codec(kind)[0])
    first, second = draw(saved), draw(loaded)
    assert np.array_equal(first.audios[0], second.audios[0]) and second.sampling_rate == audio_codecs.RATE
    tone = audio_codecs.tone(0.1)
    assert loaded(inputs={"sound": tone}, output="kind").labels == saved(inputs={"sound": tone}, output="kind").labels

    # The codec of a pipeline is one to be given.
    codec, _ = load_audio_codec(str(tmp_path / "out" / "segment_tokenizers" / "sound.tokenizer"))
    assert type(codec) is type(saved.segment_tokenizers.tokenizers["sound"])

    # A pipeline's finetuning keeps its codec, its length and its codebooks, and encodes at the start what was encoded.
    run(
        "train_vqdit",
        f"--pretrained_model_name_or_path {tmp_path / 'out'} --dataset_name {data} --segment sound=audio:audio {TUNE} "
        f"{TASKS} --output_dir {tmp_path / 'tuned'}",
    )
    again = CodeDataset(tmp_path / "tuned" / "codes")
    assert again.segments["sound"]["shape"] == [15, 2] and again.codes["sound"].equal(encoded.codes["sound"])


@pytest.mark.slow
def test_a_tokenizer_that_was_trained_here(run, audio_codecs, hub, client, tmp_path):
    folder, data = audio_codecs.sound_folder(tmp_path / "files"), audio_codecs.sound_table(tmp_path / "sounds.parquet")
    sizes = "--sampling_rate 1600 --n_fft 32 --hop_length 8 --num_mel_bins 6 --block_out_channels 8 8 "
    sizes += "--norm_num_groups 4 --latent_channels 4 --num_vq_embeddings 16 --crop_length 0.1 --use_ema"
    run(
        "train_audio_vq",
        f"--train_data_dir {folder} {sizes} --train_batch_size 4 --max_train_steps 3 --validation_steps 2 "
        f"--report_to none --push_to_hub --hub_model_id alice/codec --output_dir {tmp_path / 'codec'}",
    )
    assert len(list((tmp_path / "codec" / "samples").glob("step-000003-*.wav"))) == 4
    card = (tmp_path / "codec" / "README.md").read_text()
    assert (
        "| audio tokenizer | files, training sounds | psnr |" in card and "SpectrogramVQModel.from_pretrained" in card
    )
    files = client.list_repo_files("alice/codec")
    assert {"config.json", "preprocessor_config.json"} <= set(files) and not [f for f in files if "samples" in f]
    trained = SpectrogramVQModel.from_pretrained(tmp_path / "codec")
    codes = trained.encode_codes(torch.from_numpy(audio_codecs.tone(0.2))[None])
    finer = f"--pretrained_model_name_or_path alice/codec --train_data_dir {folder} --crop_length 0.1 --report_to none"
    run("train_audio_vq", f"{finer} --max_train_steps 1 --output_dir {tmp_path / 'finer'}")
    finer = SpectrogramVQModel.from_pretrained(tmp_path / "finer")
    assert finer.config.num_mel_bins == 6 and not finer.state_dict().keys() ^ trained.state_dict().keys()

    # The codec by its name on the Hub; encoded before, and at the start.
    sound = "--segment sound=audio:audio:alice/codec"
    run(
        "encode_dataset", f"--dataset_name {data} {sound} --segment kind=label:label --output_dir {tmp_path / 'codes'}"
    )
    run("train_vqdit", f"--codes_dir {tmp_path / 'codes'} {sound} {TASKS} {TINY} --output_dir {tmp_path / 'out'}")
    run("train_vqdit", f"--dataset_name {data} {sound} {TASKS} {TINY} --output_dir {tmp_path / 'again'}")
    saved = VQDiTPipeline.from_pretrained(tmp_path / "out")
    assert (
        saved.segment_tokenizers.tokenizers["sound"]
        .encode_codes(torch.from_numpy(audio_codecs.tone(0.2))[None])
        .equal(codes)
    )
    saved.push_to_hub("alice/speaker")
    first, second = draw(saved), draw(VQDiTPipeline.from_pretrained(tmp_path / "again"))
    assert np.array_equal(first.audios[0], second.audios[0])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", ALONE, "alice/speaker", str(tmp_path / "alone.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    samples, rate, heard = json.loads((tmp_path / "alone.json").read_text())
    assert np.allclose(samples, first.audios[0], atol=1e-5) and rate == 1600 and heard[0] in ("low", "high")
