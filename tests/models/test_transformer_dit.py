"""Without segments: stock DiT's weights and outputs, one embedder, other sizes, captions as a given prefix."""

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.models.transformer_dit import DiTBlock


CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
    "out_channels": 8,
}


def perturb(model):
    """Zero modulation and output would hide every mistake."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def make_stock(**options):
    return perturb(DiTTransformer2DModel(**{**CONFIG, **options}))


def make(**options):
    return perturb(VQDiTTransformer2DModel(**{**CONFIG, **options}).share_embedder())


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def inputs():
    return torch.randn(3, 4, 8, 8), torch.tensor([5, 2, 999]), torch.tensor([3, 4, 10])


@pytest.fixture(autouse=True)
def no_grad(request):
    if "gradient" in request.node.name or "train" in request.node.name:
        yield
    else:
        with torch.no_grad():
            yield


def public(config):
    return {name: value for name, value in config.items() if name[0] != "_"}


def equal_embedders(model):
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


@pytest.mark.parametrize("equal", [False, True])
def test_weights_saved_by_either_load_in_the_other(inputs, tmp_path, equal):
    stock = make_stock()
    if equal:
        equal_embedders(stock)
    expected = stock(*inputs).sample
    stock.save_pretrained(tmp_path / "stock")
    ours = VQDiTTransformer2DModel.from_pretrained(tmp_path / "stock").eval()
    assert ours.has_shared_embedder is equal
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert {name: ours.config[name] for name in stock.config if name[0] != "_"} == public(stock.config)
    close(ours(*inputs).sample, expected)
    ours.save_pretrained(tmp_path / "ours")
    back = DiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    close(back(*inputs).sample, expected)
    stock.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())
    close(ours(*inputs).sample, expected)
    positional = ours(*inputs, None, False)  # the fifth argument is return_dict, as in the parent
    assert isinstance(positional, tuple)


def test_no_label_is_the_null_label(inputs):
    model = make()
    latents, timestep, _ = inputs
    expected = model(latents, timestep, torch.full((3,), 10)).sample
    assert torch.equal(model(latents, timestep).sample, expected)
    assert torch.equal(model(latents[:1], timestep[0]).sample, model(latents[:1], timestep[:1]).sample)


def test_the_conditioning_is_computed_once_where_weights_allow(inputs):
    calls = []
    for model, count in ((make(), 1), (perturb(VQDiTTransformer2DModel(**CONFIG)), 3)):
        calls.clear()
        for block in model.transformer_blocks:
            if block.norm1.emb is not None:
                block.norm1.emb.register_forward_hook(lambda *_: calls.append(1))
        model(*inputs)
        assert len(calls) == count


def test_a_shared_embedder_refuses_weights_that_differ():
    shared, differing = make(), make_stock()
    with pytest.raises(RuntimeError, match="block 1's embedder differs"):
        shared.load_state_dict(differing.state_dict())
    unshared = VQDiTTransformer2DModel(**CONFIG)
    unshared.load_state_dict(differing.state_dict())
    with pytest.raises(ValueError, match="embedders of time and label differ"):
        unshared.share_embedder()


def test_sharing_saves_weights_and_trains_one_embedder(inputs):
    whole = VQDiTTransformer2DModel(**CONFIG)
    embedder = sum(p.numel() for p in whole.transformer_blocks[0].norm1.emb.parameters())
    before = sum(p.numel() for p in whole.parameters())
    model = perturb(whole.share_embedder())
    assert sum(p.numel() for p in model.parameters()) == before - 2 * embedder
    model(*inputs).sample.square().mean().backward()
    for parameter in model.transformer_blocks[0].norm1.emb.timestep_embedder.parameters():
        parameter.data -= parameter.grad
    assert model.share_embedder() is model
    stock = DiTTransformer2DModel(**CONFIG).eval()
    stock.load_state_dict(model.state_dict())
    close(model(*inputs).sample, stock(*inputs).sample)


def test_gradient_checkpointing_gives_the_same_gradients(inputs):
    states, mask = torch.randn(3, 5, 6), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0] * 5])
    model = make(caption_channels=6).train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        sample = model(*inputs, encoder_hidden_states=states, encoder_attention_mask=mask).sample
        sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_labels_are_not_dropped_inside_in_training(inputs):
    model = make().train()
    assert torch.equal(model(*inputs).sample, model(*inputs).sample)


@pytest.mark.parametrize("size", [(8, 8), (12, 12), (6, 10), (2, 16)])
def test_other_sizes_cover_the_trained_range(size):
    model = make()
    latents = torch.randn(1, 4, *size)
    sample = model(latents, torch.tensor([7])).sample
    assert sample.shape == (1, 8, *size)
    if size[0] == size[1]:  # the only ones that stock DiT can put together again
        stock = DiTTransformer2DModel(**CONFIG).eval()
        stock.load_state_dict(model.state_dict())
        close(sample, stock(latents, torch.tensor([7]), torch.tensor([10])).sample)
    # A patch lands where it came from: what changes one corner changes that corner most, without attention.
    for block in model.transformer_blocks:
        block.norm1.linear.weight.data.zero_()
        block.norm1.linear.bias.data.zero_()
    changed = latents.clone()
    changed[..., -2:, -2:] += 1
    difference = (model(changed, torch.tensor([7])).sample - model(latents, torch.tensor([7])).sample).abs() > 1e-6
    assert difference[..., -2:, -2:].any() and not difference[..., :-2, :].any() and not difference[..., :-2].any()


def test_the_initial_model_is_the_original_dits(inputs):
    model = VQDiTTransformer2DModel(**CONFIG)
    assert not model(*inputs).sample.any()
    assert model._embedders_are_equal()
    assert model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.std().item() == pytest.approx(
        0.02, rel=0.2
    )
    assert isinstance(model.transformer_blocks[0], DiTBlock) and model.config.num_layers == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_stay_close(inputs, dtype):
    model = make(caption_channels=6)
    states = {"encoder_hidden_states": torch.randn(3, 5, 6)}
    expected = model(*inputs, **states).sample
    scale = expected.abs().max()
    with torch.autocast("cpu", dtype):
        assert (model(*inputs, **states).sample - expected).abs().max() < 0.05 * scale
    half = model.to(dtype)(inputs[0].to(dtype), *inputs[1:], **states).sample
    assert half.dtype == dtype and (half - expected).abs().max() < 0.1 * scale


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def test_no_caption_and_a_masked_caption_are_the_same(inputs):
    model = make(caption_channels=6)
    states, mask = torch.randn(3, 5, 6), torch.ones(3, 5)
    mask[1] = 0
    free = model(*inputs).sample
    sample = model(*inputs, encoder_hidden_states=states, encoder_attention_mask=mask).sample
    close(sample[1], free[1])
    assert (sample[0] - free[0]).abs().max() > 1e-3
    everything = model(*inputs, encoder_hidden_states=states).sample
    close(everything[0], sample[0])


def test_padding_is_not_seen(inputs):
    model = make(caption_channels=6)
    states = torch.randn(3, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0]]).expand(3, -1)
    expected = model(*inputs, encoder_hidden_states=states[:, :3]).sample
    states[:, 3:] = 100.0
    close(model(*inputs, encoder_hidden_states=states, encoder_attention_mask=mask).sample, expected)


def test_a_caption_is_encoded_once_for_all_times(inputs):
    model = make(caption_channels=6)
    states, mask = torch.randn(3, 5, 6), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0] * 5])
    prefix = model.encode_caption(states, mask)
    latents, _, labels = inputs
    for time in (1.0, 500.0):
        timestep = torch.full((3,), time)
        expected = model(latents, timestep, labels, encoder_hidden_states=states, encoder_attention_mask=mask).sample
        assert torch.equal(model(latents, timestep, labels, prefix=prefix).sample, expected)
    picked = model(latents[[2, 0]], timestep[:2], labels[[2, 0]], prefix=prefix.select(torch.tensor([2, 0]))).sample
    close(picked, expected[[2, 0]])
    assert prefix.repeat_interleave(2).mask.shape == (6, 1, 1, 5)
    assert prefix.select(slice(0, 1)).expand(4).mask.shape == (4, 1, 1, 5)


def test_the_order_of_tokens_counts(inputs):
    model = make(caption_channels=6)
    states = torch.randn(3, 5, 6)
    sample = model(*inputs, encoder_hidden_states=states).sample
    assert (sample - model(*inputs, encoder_hidden_states=states.flip(1)).sample).abs().max() > 1e-3


def test_a_model_with_captions_saves_and_loads(inputs, tmp_path):
    model = make(caption_channels=6, freq_shift=0.0)
    states = torch.randn(3, 5, 6)
    expected = model(*inputs, encoder_hidden_states=states).sample
    model.save_pretrained(tmp_path)
    loaded = VQDiTTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.has_shared_embedder
    close(loaded(*inputs, encoder_hidden_states=states).sample, expected)
    extra = set(loaded.state_dict()) - set(DiTTransformer2DModel(**CONFIG).state_dict())
    assert {name.split(".")[0] for name in extra} == {"caption_projection", "caption_embedding"}


# ---------------------------------------------------------------------------------------------------------------------


def test_diffusers_own_pipeline_draws_with_our_models(image_vq):
    # DiTPipeline's null label is 1000.
    options = {**CONFIG, "num_embeds_ada_norm": 1000, "sample_size": 4, "out_channels": 4}
    model = make(**options)
    stock = DiTTransformer2DModel(**options).eval()
    stock.load_state_dict(model.state_dict())
    drawn = []
    for transformer in (stock, model):
        pipe = DiTPipeline(transformer, image_vq, DDIMScheduler(), id2label={"0": "cat, kitten", "1": "dog"})
        pipe.set_progress_bar_config(disable=True)
        labels = pipe.get_label_ids(["kitten", "dog"])
        generator = torch.Generator().manual_seed(0)
        drawn.append(pipe(labels, num_inference_steps=3, generator=generator, output_type="pt").images)
    assert drawn[0].shape == (2, 3, 16, 16)
    # The nearest code is a step function of the latents, so that a code may differ; here none does.
    torch.testing.assert_close(drawn[1], drawn[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.randn(1, 3, 8, 8)}, r"latents \(B, 4, H, W\).* got \(1, 3, 8, 8\)"),
        ({"hidden_states": {"image": torch.ones(1, 4, 4)}}, "got dict"),
        ({"hidden_states": torch.randn(1, 4, 7, 8)}, "multiples of patch_size=2"),
        ({"timestep": None}, "timestep is None"),
        ({"class_labels": torch.tensor([11])}, r"class_labels must be in \[0, 10\]"),
        ({"given": {"text": torch.zeros(1, 6)}}, "with_unconditional, modulation and cache need"),
        ({"encoder_hidden_states": torch.randn(1, 5, 7)}, r"must have shape \(B, S, 6\), got \(1, 5, 7\)"),
        (
            {"encoder_hidden_states": torch.randn(1, 5, 6), "encoder_attention_mask": torch.ones(1, 4)},
            r"encoder_attention_mask must have shape \(1, 5\)",
        ),
        ({"encoder_hidden_states": torch.randn(2, 5, 6)}, "the caption has 2 samples, but hidden_states 1"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([1])}
    with pytest.raises(ValueError, match=message):
        make(caption_channels=6)(**{**arguments, **change})


def test_captions_need_their_channels():
    with pytest.raises(ValueError, match="need a model with caption_channels"):
        make()(torch.randn(1, 4, 8, 8), torch.tensor([1]), encoder_hidden_states=torch.randn(1, 5, 6))
