"""Converted tokenizers against what the original code computed, and what is refused."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_vqdit import ImageVQModel


FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "interop"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))
RANGES = {"maskgit-vqgan": (0.0, 1.0)}


def read(name):
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    weights = {key.removeprefix("checkpoint."): v for key, v in tensors.items() if key.startswith("checkpoint.")}
    io = {key.removeprefix("io."): value for key, value in tensors.items() if key.startswith("io.")}
    return weights, io, metadata["format"], json.loads(metadata["config"])


def pixels(values, format):
    low, high = RANGES.get(format, (-1.0, 1.0))
    return 2 * (values - low) / (high - low) - 1


@torch.no_grad()
def check(model, io, format):
    sample = pixels(io["pixel_values"], format)
    torch.testing.assert_close(model.encode(sample).latents, io["latents"], atol=1e-4, rtol=0)
    assert torch.equal(model.encode_codes(sample), io["code_indices"])
    low, high = RANGES.get(format, (-1.0, 1.0))
    decoded = low + (high - low) * (model.decode_codes(io["code_indices"]).sample + 1) / 2
    torch.testing.assert_close(decoded, io["decoded"], atol=1e-4, rtol=0)


def test_all_six_fixtures_are_there():
    assert len(NAMES) == 6


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_latents_codes_and_pictures_are_the_originals(name, with_config, tmp_path):
    weights, io, format, config = read(name)
    model = ImageVQModel.from_original(weights, format=format, config=config if with_config else None)
    check(model, io, format)
    model.save_pretrained(tmp_path)
    loaded = ImageVQModel.from_pretrained(tmp_path)
    check(loaded, io, format)
    again = ImageVQModel.from_original(weights, format=format, config=config if with_config else None)
    for key, value in again.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    resolution = {**config, **config.get("ddconfig", {})}.get("resolution", 256)  # LlamaGen has none
    assert loaded.config.sample_size == (resolution if with_config else 256)


@pytest.mark.parametrize("name", NAMES)
def test_the_format_is_told_where_it_can_be(name):
    weights, io, format, _ = read(name)
    if format in ("taming", "ibq"):
        with pytest.raises(ValueError, match="format='taming' for .*format='ibq' for .*format='open-muse' for"):
            ImageVQModel.from_original(weights)
    else:
        check(ImageVQModel.from_original(weights), io, format)


def test_ibq_and_taming_differ_only_by_the_choice_of_the_code():
    weights, io, _, _ = read("ibq_tiny")
    taming = ImageVQModel.from_original(weights, format="taming")
    with torch.no_grad():
        assert not torch.equal(taming.encode_codes(io["pixel_values"]), io["code_indices"])


def test_amused_takes_its_pixels_in_0_1(tmp_path):
    stock = VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=32,
        vq_embed_dim=8,
        mid_block_add_attention=False,
    ).eval()
    stock.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    model = ImageVQModel.from_original(path, config=tmp_path / "config.json")
    sample = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(2 * sample - 1).latents, stock.encode(sample).latents)
        torch.testing.assert_close(model(2 * sample - 1).sample / 2 + 0.5, stock(sample).sample, atol=1e-5, rtol=0)


def test_open_muse_is_taming_for_pixels_in_0_1():
    weights, io, _, _ = read("ldm_vq_f4_tiny")
    weights = {name: value for name, value in weights.items() if ".mid.attn_1." not in name}
    model = ImageVQModel.from_original(weights)
    assert model.config.pixel_range == (0.0, 1.0) and not model.config.mid_block_add_attention
    assert ImageVQModel.from_original(weights, config={"pixel_range": [-1, 1]}).config.pixel_range == (-1, 1)


class ModelCheckpoint:
    """Stands for a class of PyTorch Lightning that a checkpoint refers to."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.fixture
def lightning(monkeypatch):
    """Its module, importable while a checkpoint is written."""
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = ModelCheckpoint
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks.model_checkpoint", module)


def test_a_lightning_checkpoint_is_read_without_its_classes(lightning, monkeypatch, tmp_path):
    weights, io, format, _ = read("taming_vqgan_tiny")
    discriminator = {"loss.discriminator.main.0.weight": torch.zeros(3)}
    content = {
        "state_dict": {**weights, **discriminator},
        "callbacks": {ModelCheckpoint: {"best": 1.0}},
        "hyper_parameters": {"callback": ModelCheckpoint()},
        "epoch": 3,
    }
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.undo()
    check(ImageVQModel.from_original(tmp_path / "last.ckpt", format="taming"), io, format)


def test_weights_inside_a_latent_diffusion_checkpoint_and_as_torch_file(tmp_path):
    weights, io, format, _ = read("ldm_vq_f4_tiny")
    content = {f"first_stage_model.{name}": value for name, value in weights.items()}
    content["model.diffusion_model.out.0.weight"] = torch.zeros(2)
    torch.save({"state_dict": content}, tmp_path / "model.ckpt")
    check(ImageVQModel.from_original(tmp_path / "model.ckpt", format="taming"), io, format)
    content["model_ema.diffusion_modelout0weight"] = torch.ones(2)  # averages of the U-Net alone
    with pytest.raises(ValueError, match="has no moving averages"):
        ImageVQModel.from_original(content, format="taming", use_ema=True)


def test_moving_averages_are_taken_as_the_original_does(tmp_path):
    weights, io, format, _ = read("llamagen_vq_tiny")
    noise = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": noise, "ema": weights, "steps": 7}, tmp_path / "vq.pt")
    check(ImageVQModel.from_original(tmp_path / "vq.pt"), io, format)
    raw = ImageVQModel.from_original(tmp_path / "vq.pt", use_ema=False)
    torch.testing.assert_close(raw.quant_conv.weight, weights["quant_conv.weight"] + 1)

    weights, io, format, _ = read("ibq_tiny")
    averages = {f"model_ema.{name.replace('.', '')}": value for name, value in weights.items()}
    noise = {name: value + 1 for name, value in weights.items()}
    content = {**noise, **averages, "model_ema.decay": torch.tensor(0.9)}
    check(ImageVQModel.from_original(content, format="ibq"), io, format)
    with pytest.raises(ValueError, match="has no moving averages"):
        ImageVQModel.from_original(weights, format="ibq", use_ema=True)


def test_the_command_line_writes_a_folder_that_loads(tmp_path):
    weights, io, format, config = read("maskgit_vqgan_tiny")
    save_file(weights, tmp_path / "vq.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "diffusers_vqdit.interop.convert", "--checkpoint", tmp_path / "vq.safetensors"]
    subprocess.run(
        [*map(str, command), "--config", tmp_path / "config.json", "--output_dir", tmp_path / "out"], check=True
    )
    check(ImageVQModel.from_pretrained(tmp_path / "out"), io, format)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


class Code:
    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


def test_pickled_code_is_refused_and_does_not_run(tmp_path, capsys):
    weights, _, _, _ = read("taming_vqgan_tiny")
    torch.save({"state_dict": weights, "extra": Code()}, tmp_path / "bad.ckpt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Code()))
    for name, message in (("bad.ckpt", "it would load builtins.print"), ("bare.pt", "can run code")):
        with pytest.raises(ValueError, match=message):
            ImageVQModel.from_original(tmp_path / name, format="taming")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_truncated_files_are_refused(tmp_path, suffix):
    weights, _, _, _ = read("taming_vqgan_tiny")
    path = tmp_path / f"half.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is not a whole .*download it again"):
        ImageVQModel.from_original(path, format="taming")


def _without(name):
    def change(weights):
        weights = dict(weights)
        del weights[name]
        return weights

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (_without("decoder.up.1.block.0.conv1.weight"), {}, "resnets.0.conv1.weight is missing"),
        (_without("encoder.conv_in.weight"), {}, "must have one 'encoder.conv_in.weight'"),
        (_without("quantize.embedding.weight"), {}, "a codebook of nearest codes was expected"),
        (lambda w: {**w, "encoder.extra.weight": torch.zeros(1)}, {}, "encoder.extra.weight is not part of"),
        (lambda w: {**w, "encoder.conv_out.bias": torch.zeros(5)}, {}, r"must have shape \(32,\), got \(5,\)"),
        (lambda w: {**w, "encoder.conv_in.weight": torch.zeros(7)}, {}, r"must have 4 dimensions, got shape \(7,\)"),
        (lambda w: w, {"config": {"n_embed": 65}}, "config has n_embed=65, but the weights have 64"),
        (lambda w: w, {"format": "llamagen"}, "not those of format='llamagen'.*look like taming or ibq"),
        (lambda w: w, {"format": "other"}, r"format='other' must be one of \('taming'"),
        (lambda w: {}, {}, "got 0 among 0 tensors"),
        (lambda w: [1], {}, "path or a state dict, got list"),
        (lambda w: "nowhere.ckpt", {}, "nowhere.ckpt is not a file"),
    ],
)
def test_other_architectures_are_refused_and_named(change, options, message):
    weights, _, _, _ = read("taming_vqgan_tiny")
    with pytest.raises(ValueError, match=message):
        ImageVQModel.from_original(change(weights), **{"format": "taming", **options})
