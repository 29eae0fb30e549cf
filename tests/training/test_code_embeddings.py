"""New embeddings of codes lie as the codes' vectors do, in the scale of those that are drawn anyhow."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_vqdit import ImageVQModel, VQDiTTransformer2DModel
from diffusers_vqdit.models.quantizers.vector import RETIRED
from diffusers_vqdit.training.code_embeddings import code_vectors, start_embeddings, tokenizers_of


SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1}
VQ = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
VQ |= {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4, "vq_embed_dim": 6}
QUANTIZERS = [
    {"num_vq_embeddings": 64},
    {"num_vq_embeddings": 64, "codebook_norm": "l2"},
    {"quantizer_type": "fsq", "fsq_levels": (4, 4, 4), "vq_embed_dim": 3, "num_vq_embeddings": 64},
    {"quantizer_type": "lfq", "num_vq_embeddings": 64},
    {"quantizer_type": "simvq", "num_vq_embeddings": 64},
]
PATCHES = [{}, {"patch": [2, 2]}, {"vocab_size": 65, "patch": [1, 8], "separate_codebooks": True}]


def transformer(**segment):
    torch.manual_seed(1)
    return VQDiTTransformer2DModel(segments={"image": {"vocab_size": 64, "shape": [4, 8], **segment}}, **SMALL)


@pytest.mark.parametrize(
    "more", [{}, {"patch": [2, 2]}, {"vocab_size": 65, "patch": [1, 8], "separate_codebooks": True}]
)
@pytest.mark.parametrize(
    "options", QUANTIZERS, ids=lambda one: one.get("quantizer_type", one.get("codebook_norm", "vq"))
)
def test_embeddings_are_as_far_apart_as_vectors(options, more):
    vq, model = ImageVQModel(**{**VQ, **options}), transformer(**more)
    before = model.code_embeddings["image"].weight.detach().clone()
    start_embeddings(model, {"image": vq})
    vectors, after = code_vectors(vq), model.code_embeddings["image"].weight.detach()
    assert vectors.shape == (64, vq.config.vq_embed_dim)
    assert after.std().item() == pytest.approx(before.std().item(), rel=0.15)
    size = more.get("vocab_size", 64) + 1
    for table, old in zip(after.split(size), before.split(size), strict=True):
        assert torch.equal(table[64:], old[64:]) and not torch.isclose(table[:64], old[:64]).all(1).any()
        apart = torch.stack([torch.pdist(vectors), torch.pdist(table[:64])])
        assert torch.corrcoef(apart)[0, 1] > 0.6 > torch.corrcoef(torch.stack([apart[0], torch.pdist(old[:64])]))[0, 1]
        assert torch.pdist(table[:64]).min() > 0.05  # all can be told apart
    if len(after) > size:  # each codebook's directions are its own
        assert not torch.allclose(*after.split(size)[:2])


def test_codes_out_of_use_and_segments_without_vectors_stay_as_they_were(image_vq, text_vq):
    model = transformer()
    before = model.code_embeddings["image"].weight.detach().clone()
    start_embeddings(model, {"image": text_vq, "other": image_vq, "label": None})
    assert torch.equal(model.code_embeddings["image"].weight, before)
    vq = ImageVQModel(**VQ, num_vq_embeddings=64)
    vq.quantize.embedding.weight.data[10:] = RETIRED
    start_embeddings(model, {"image": vq})
    after = model.code_embeddings["image"].weight
    assert torch.equal(after[10:], before[10:]) and (after[:10] - before[:10]).abs().amax(1).min() > 0.1
    vq.quantize.embedding.weight.data[:] = 0.0  # all alike: noise tells them apart
    start_embeddings(model, {"image": vq})
    assert after.isfinite().all() and torch.pdist(after[:64].detach()).min() > 0.1


def test_a_segments_tokenizer_is_found_where_the_pipeline_has_it(image_vq):
    entries = {"image": {"tokenizer": "image_vq"}, "sketch": {"tokenizer": "sketch_vq"}, "label": {}}
    own = SimpleNamespace(parts={"sketch_vq": "a"})
    assert tokenizers_of({"image_vq": image_vq, "segment_tokenizers": own}, entries) == {
        "image": image_vq,
        "sketch": "a",
    }
    assert tokenizers_of({"image_vq": image_vq, "segment_tokenizers": None}, entries) == {"image": image_vq}


def test_training_from_scratch_begins_there(script, monkeypatch, image_vq, picture_folder, tmp_path):
    """And a pretrained transformer, which knows its codes, does not."""
    module, seen = script("train_vqdit"), []
    monkeypatch.setattr(module, "start_embeddings", lambda transformer, tokenizers: seen.append(sorted(tokenizers)))
    image_vq.save_pretrained(tmp_path / "image_vq")
    tiny = "--num_layers 1 --num_attention_heads 2 --attention_head_dim 8"
    common = (
        f"--train_data_dir {picture_folder} --report_to none --train_batch_size 2 --max_train_steps 1 --tasks=->image"
    )
    scratch = f"{common} {tiny} --image_vq {tmp_path / 'image_vq'} --output_dir {tmp_path / 'run'}"
    module.main(module.parse_args(scratch.split()))
    assert seen == [["image"]]
    tuned = f"{common} --pretrained_model_name_or_path {tmp_path / 'run'} --output_dir {tmp_path / 'tuned'}"
    module.main(module.parse_args(tuned.split()))
    assert seen == [["image"]]
