"""Several tokenizers as one component."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DacConfig, DacModel

from diffusers_vqdit import MultiTokenizerModel
from diffusers_vqdit.utils.hub import saved_files


@pytest.fixture
def several(image_vq, text_vq, tokenizer):
    return MultiTokenizerModel({"sketch": image_vq, "summary": text_vq}, {"summary": tokenizer})


def equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "5KB"])
def test_what_was_saved_is_loaded(several, tmp_path, variant, max_shard_size):
    several.save_pretrained(tmp_path, variant=variant, max_shard_size=max_shard_size)
    loaded = MultiTokenizerModel.from_pretrained(tmp_path, variant=variant)
    assert equal(loaded, several) and loaded.config.kinds == several.config.kinds
    texts = ["a red apple", "红苹果"]
    assert loaded.beside["summary"](texts).input_ids == several.beside["summary"](texts).input_ids
    part = type(several.tokenizers["sketch"]).from_pretrained(tmp_path / "sketch.tokenizer", variant=variant)
    assert equal(part, several.tokenizers["sketch"])
    # All that was written is published, and nothing else.
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sketch.tokenizer" / "notes.json").write_text("mine")
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written - set(saved_files(several, tmp_path)) == {"notes.txt", "sketch.tokenizer/notes.json"}


def test_it_moves_and_casts_as_one(several):
    assert several.to(torch.float16).dtype == torch.float16
    assert several.tokenizers["summary"].to_logits.weight.dtype == torch.float16
    assert {one.device.type for one in several.to("meta").parameters()} == {"meta"}


def test_a_model_of_transformers_is_a_tokenizer_too(several, tmp_path):
    small = {"encoder_hidden_size": 4, "decoder_hidden_size": 8, "hidden_size": 8, "codebook_dim": 2}
    small |= {"downsampling_ratios": [2], "upsampling_ratios": [2], "n_codebooks": 2, "codebook_size": 16}
    codec = DacModel(DacConfig(**small)).eval()
    more = MultiTokenizerModel({**several.tokenizers, "speech": codec}, several.beside)
    more.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["kinds"]["speech"] == ["transformers", "DacModel"]
    loaded = MultiTokenizerModel.from_pretrained(tmp_path, torch_dtype=torch.float32)
    sound = torch.randn(1, 1, 64)
    with torch.no_grad():
        codes = [one.tokenizers["speech"].encode(sound).audio_codes for one in (more, loaded)]
    assert torch.equal(*codes)
    # What a file lacks, as where it is another class's, the library would draw, with a warning.
    file = tmp_path / "speech.tokenizer" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in sorted(weights)[3:]}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"speech\.tokenizer lacks '.*' and 2 more weights of a DacModel"):
        MultiTokenizerModel.from_pretrained(tmp_path)


def test_what_does_not_fit_is_named(several, tmp_path):
    for arguments, message in [
        (({},), r"tokenizers=\{\} must be a dict"),
        (({"a b": several.tokenizers["sketch"]},), "'a b' can't be a name"),
        (({"keys": several.tokenizers["sketch"]},), "'keys' can't be a name"),
        (({"training": several.tokenizers["sketch"]},), "'training' can't be a name"),
        (({"x" * 201: several.tokenizers["sketch"]},), "can't be a name; use .* 200 at most"),
        ((dict(several.tokenizers), {"sketch": 1}), r"beside\['sketch'\]=1 must be a tokenizer"),
        (({"sketch": torch.nn.Linear(1, 1)},), r"tokenizers\['sketch'\]=Linear"),
        (({"sketch": several.tokenizers["sketch"]}, {"summary": None}), "beside has 'summary'"),
    ]:
        with pytest.raises(ValueError, match=message):
            MultiTokenizerModel(*arguments)
    with pytest.raises(ValueError, match='load it with device_map="cuda"'):
        MultiTokenizerModel.from_config(several.config)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="save_directory='.*dangling' is a link to what is not there"):
        several.save_pretrained(tmp_path / "dangling")
    several.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for kinds in (None, [], {"sketch": "ImageVQModel"}, {"sketch": ["os", "system"]}, {"sketch": ["diffusers", "no"]},
                  {"../sketch": ["diffusers", "ImageVQModel"]}):  # fmt: skip
        file.write_text(json.dumps({**config, "kinds": kinds}))
        with pytest.raises(ValueError, match="kinds"):
            MultiTokenizerModel.from_pretrained(tmp_path)
    file.write_text(json.dumps({**config, "_format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        MultiTokenizerModel.from_pretrained(tmp_path)
    (tmp_path / "sketch.tokenizer" / "diffusion_pytorch_model.safetensors").unlink()
    file.write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"diffusion_pytorch_model.*sketch\.tokenizer"):
        MultiTokenizerModel.from_pretrained(tmp_path)


def test_codebooks_are_kept_whole_as_by_the_tokenizers_alone(several):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = several.tokenizers["sketch"].encode_codes(pixels)
    several.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    codebooks = [value for name, value in several.named_parameters() if "quantize" in name]
    assert codebooks and all(value.dtype == torch.float32 for value in codebooks)
    assert several.tokenizers["sketch"].encode_codes(pixels).shape == codes.shape
    with pytest.raises(ValueError, match="group offloading"):
        several.enable_group_offload(torch.device("cpu"))
