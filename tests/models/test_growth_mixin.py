"""A transformer with more labels does what it did, to the bit."""

import pytest
import torch
from peft import LoraConfig

from diffusers_vqdit import VQDiTTransformer2DModel


@torch.no_grad()
@pytest.mark.parametrize("size", [4, 7, 40])
def test_known_codes_give_the_same_after_growing(transformer, size):
    grown = transformer.with_vocab_size("label", size)
    assert grown.config.segments["label"]["vocab_size"] == size and not grown.training
    assert transformer.config.segments["label"]["vocab_size"] == 3  # as it was
    image, labels = {"image": torch.randint(33, (3, 4, 4))}, torch.arange(3)[:, None]
    for given in (None, {"label": labels}):
        assert torch.equal(grown(image, given=given).sample["image"], transformer(image, given=given).sample["image"])
    before = transformer({"label": torch.full((3, 1), 3)}, given={"image": image["image"] % 32}).sample["label"]
    after = grown({"label": torch.full((3, 1), size)}, given={"image": image["image"] % 32}).sample["label"]
    # The head's weights are the same ones; the order of the products' sums may not be.
    assert torch.equal(grown.heads["label"].weight[:3], transformer.heads["label"].weight)
    torch.testing.assert_close(after[..., :3], before, atol=1e-6, rtol=1e-6)
    assert after.shape[-1] == size
    assert not torch.equal(grown(image, given={"label": labels + 1}).sample["image"], grown(image).sample["image"])


def test_segments_that_share_embeddings_grow_together(transformer):
    shared = transformer.with_segments({"kind": {"vocab_size": 3, "shape": [1], "shared_with": "label"}})
    sizes = {n: s["vocab_size"] for n, s in shared.with_vocab_size("label", 5).config.segments.items()}
    assert sizes == {"text": 64, "image": 32, "label": 5, "kind": 5}


@torch.no_grad()
@pytest.mark.parametrize("shares", [True, False])
def test_known_labels_give_the_same_latents_after_growing(shares):
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4, "patch_size": 2}
    model = VQDiTTransformer2DModel(**config, num_embeds_ada_norm=3, norm_num_groups=4).eval()
    if shares:
        model.share_embedder()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    grown = model.with_num_embeds_ada_norm(5)
    assert grown.config.num_embeds_ada_norm == 5 and grown.has_shared_embedder == shares
    latents, times = torch.randn(4, 4, 4, 4), torch.tensor([0, 5, 500, 999])
    before = model(latents, times, torch.tensor([0, 1, 2, 3])).sample  # 3 and 5 are no label
    after = grown(latents, times, torch.tensor([0, 1, 2, 5])).sample
    assert torch.equal(after, before)
    with pytest.raises(ValueError, match="size=5 must be an integer of at least 6"):
        grown.with_num_embeds_ada_norm(5)


@pytest.mark.parametrize(("name", "size"), [("label", 3), ("label", 2), ("label", 4.0), ("sound", 9)])
def test_what_can_not_grow_is_named(transformer, name, size):
    with pytest.raises(ValueError, match=f"{'size' if name == 'label' else 'name'}="):
        transformer.with_vocab_size(name, size)


def test_with_adapters_loaded_nothing_grows(transformer):
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "mine")
    latents = VQDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4)
    latents.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "mine")
    for grow in (
        lambda: transformer.with_vocab_size("label", 9),
        lambda: transformer.with_segments({"kind": {"vocab_size": 3, "shape": [1]}}),
        lambda: latents.with_num_embeds_ada_norm(2000),
    ):
        with pytest.raises(ValueError, match=r"the adapters \['mine'\] are loaded, .*unload_lora_weights"):
            grow()
