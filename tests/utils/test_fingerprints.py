import pytest
import torch
from diffusers import VQModel

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.utils.fingerprints import file_sha256, model_fingerprint, tensor_sha256, tokenizer_fingerprint


def test_a_model_is_known_again_after_saving(image_vq, tmp_path):
    known = model_fingerprint(image_vq)
    image_vq.save_pretrained(tmp_path)
    assert model_fingerprint(ImageVQModel.from_pretrained(tmp_path)) == known
    image_vq.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scaling_factor=1.0)
    assert model_fingerprint(image_vq) == known  # it encodes the same


@pytest.mark.parametrize("kind", ["t5", "clip", "bert", "gpt2", "dinov2"])
def test_a_model_of_transformers_is_the_same_before_it_is_saved_first(encoders, tmp_path, kind):
    make = encoders.image_encoder if kind == "dinov2" else encoders.text_encoder
    known = model_fingerprint(make(kind))
    model = make(kind)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(model) == model_fingerprint(type(model).from_pretrained(tmp_path)) == known


def test_any_weight_and_what_encodes_otherwise_counts(image_vq):
    known = {model_fingerprint(image_vq)}
    for value in image_vq.state_dict().values():
        if value.is_floating_point():
            value.view(-1)[-1] += 1e-3
            known.add(model_fingerprint(image_vq))
    assert len(known) == 1 + sum(v.is_floating_point() for v in image_vq.state_dict().values())
    image_vq.register_to_config(act_fn="relu")
    assert model_fingerprint(image_vq) not in known
    assert len(model_fingerprint(VQModel(block_out_channels=(32,)))) == 64


def test_tokenizers_tensors_and_files(tokenizer, tmp_path):
    known = tokenizer_fingerprint(tokenizer)
    tokenizer(["a dot"], padding="max_length", truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == known
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(type(tokenizer).from_pretrained(tmp_path)) == known
    zeros = torch.zeros(2, 3)
    assert len({tensor_sha256(x) for x in (zeros, zeros.T.contiguous(), zeros.int(), zeros + 1)}) == 4
    assert tensor_sha256(zeros.T) == tensor_sha256(zeros.T.contiguous())
    (tmp_path / "x").write_bytes(b"")
    assert file_sha256(tmp_path / "x") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
