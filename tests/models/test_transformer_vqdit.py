import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.models import attention_processor
from diffusers_vqdit.models.layers import rotary_positions, sincos_positions


SEGMENTS = {
    "text": {"vocab_size": 20, "shape": [6]},
    "image": {"vocab_size": 30, "shape": [4, 4]},
    "label": {"vocab_size": 5, "shape": [1]},
}
CONFIG = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "segments": SEGMENTS}


@pytest.fixture(params=[False, True], ids=["added", "rotary"], autouse=True)
def positions(request, monkeypatch):
    """Each test with both kinds of positions."""
    monkeypatch.setitem(CONFIG, "use_rotary_positional_embeddings", request.param)
    return request.param


def make(**options):
    model = VQDiTTransformer2DModel(**{**CONFIG, **options})
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def codes():
    return {
        "text": torch.randint(20, (3, 6)),
        "image": torch.randint(31, (3, 4, 4)),
        "label": torch.randint(5, (3, 1)),
    }


def test_the_loss_of_a_new_model_is_log_k(codes):
    model = VQDiTTransformer2DModel(**CONFIG)
    sample = model(codes).sample
    for name, segment in SEGMENTS.items():
        target = torch.randint(segment["vocab_size"], sample[name].shape[:2])
        loss = F.cross_entropy(sample[name].flatten(0, 1), target.flatten())
        assert loss.item() == pytest.approx(math.log(segment["vocab_size"]), rel=1e-6)


def test_the_mask_is_never_predicted(codes):
    assert make()(codes).sample["image"].shape == (3, 16, 30)


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 5)])
@pytest.mark.parametrize("head_dim", [6, 16, 21])
def test_rotated_products_depend_on_distances_alone(shape, head_dim):
    """Su et al. 2021, equation 11; the channels left over are not rotated."""
    query, key = torch.randn(2, head_dim).double()
    cos, sin = (table.double() for table in rotary_positions(shape, head_dim))
    assert cos.shape == sin.shape == (math.prod(shape), head_dim)

    def rotated(x):
        pairs = F.pad(x, (0, head_dim % 2)).unflatten(0, (-1, 2))
        other = torch.stack([-pairs[:, 1], pairs[:, 0]], 1).flatten()[:head_dim]
        return x * cos + other * sin

    scores = rotated(query) @ rotated(key).T
    coordinates = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape))
    distances = (coordinates[:, None] - coordinates[None]).flatten(0, 1)
    for distance in distances.unique(dim=0):
        same = scores.flatten()[(distances == distance).all(1)]
        assert same.max() - same.min() < 1e-5
    assert scores.std() > 0.1


def test_a_prefix_equals_the_given_segments_bit_for_bit(codes):
    model = make()
    image, given = {"image": codes["image"]}, {"text": codes["text"], "label": codes["label"]}
    whole = model(image, given=given).sample["image"]
    prefix = model.encode_prefix(given)
    assert torch.equal(model(image, prefix=prefix).sample["image"], whole)
    assert not torch.allclose(model(image).sample["image"], whole, atol=1e-3)
    picked = model({"image": codes["image"][[2, 0]]}, prefix=prefix.select(torch.tensor([2, 0]))).sample["image"]
    torch.testing.assert_close(picked, whole[[2, 0]])
    twice = model({"image": codes["image"].repeat_interleave(2, 0)}, prefix=prefix.repeat_interleave(2))
    torch.testing.assert_close(twice.sample["image"], whole.repeat_interleave(2, 0))


class MaskedSequenceProcessor:
    """The same attention in one sequence, its first positions kept from seeing the others by a mask."""

    def __init__(self, given_length):
        self.given_length = given_length

    def __call__(self, attn, hidden_states, prefix=None, image_rotary_emb=None, attention_mask=None):
        assert prefix is None
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb) for x in (query, key))
        visible = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool)
        visible[: self.given_length, self.given_length :] = False
        weights = (query @ key.mT / math.sqrt(attn.head_dim)).masked_fill(~visible, -math.inf).softmax(-1)
        return attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2)), key, value


def test_prefix_and_targets_equal_one_masked_sequence(codes):
    model = make()
    given, generated = {"text": codes["text"], "label": codes["label"]}, {"image": codes["image"]}
    expected = model(generated, given=given).sample["image"]
    model.set_attn_processor(MaskedSequenceProcessor(7))
    order = {"label": codes["label"], "text": codes["text"], "image": codes["image"]}
    hidden, lengths, rotary = model._embed(order)
    conditioning = torch.cat(
        [model._conditioning({"label": codes["label"], "text": codes["text"]}, False)]
        + [model._conditioning(generated, True)],
        dim=1,
    )
    for block in model.transformer_blocks:
        hidden, _, _ = block(hidden, conditioning, lengths, image_rotary_emb=rotary)
    shift, scale = model.adaln_out(conditioning[:, -1:]).chunk(2, dim=-1)
    actual = model.heads["image"](model.norm_out(hidden[:, 7:]) * (1 + scale) + shift)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_given_segments_see_only_one_another(codes, monkeypatch):
    model = make()
    calls = []

    def record(query, key, value, **options):
        calls.append((query.shape[1], key.shape[1]))
        return dispatch_attention_fn(query, key, value, **options)

    monkeypatch.setattr(attention_processor, "dispatch_attention_fn", record)
    model({"image": codes["image"]}, given={"text": codes["text"]})
    # 6 text positions among themselves, but in the last layer, whose output nobody reads; 16 image positions to all.
    assert calls == [(6, 6)] * 2 + [(16, 22)] * 3


def test_generated_codes_see_what_is_given(codes):
    model = make()
    before = model({"image": codes["image"]}, given={"text": codes["text"]}).sample["image"]
    codes["text"][0] = (codes["text"][0] + 1) % 20
    after = model({"image": codes["image"]}, given={"text": codes["text"]}).sample["image"]
    assert (before[0] - after[0]).abs().max() > 1e-3
    torch.testing.assert_close(before[1:], after[1:])


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("generated", [["image"], ["image", "label"]])
def test_one_pass_with_and_without_what_is_given_equals_two(codes, generated, timed):
    model = make(time_conditioned=timed)
    timestep = torch.tensor([1.0, 0.5, 0.2]) if timed else None
    masked = {name: torch.rand(codes[name].flatten(1).shape) < 0.7 for name in generated}
    sides = {name: codes[name] for name in generated}
    prefix = model.encode_prefix({"text": codes["text"]})
    for where in (None, masked):
        own = model(sides, timestep=timestep, prefix=prefix, masked=where).sample
        free = model(sides, timestep=timestep, masked=where).sample
        both = model(sides, timestep=timestep, prefix=prefix, masked=where, with_unconditional=True).sample
        for name in generated:
            torch.testing.assert_close(both[name], torch.cat([own[name], free[name]]), atol=1e-5, rtol=1e-5)
    given = model(sides, timestep=timestep, given={"text": codes["text"]}, with_unconditional=True).sample
    whole = model(sides, timestep=timestep, prefix=prefix, with_unconditional=True).sample
    assert all(torch.equal(given[name], whole[name]) for name in generated)
    with pytest.raises(ValueError, match="with_unconditional"):
        model(sides, timestep=timestep, with_unconditional=True)


@pytest.mark.parametrize("generated", [["image"], ["image", "label"]])
@pytest.mark.parametrize("with_unconditional", [True, False])
def test_adaln_once_a_run_equals_adaln_at_each_call(codes, generated, with_unconditional):
    """Bit for bit, and through the calls of the blocks: weights that are offloaded by blocks come with those."""
    model = make()
    given = {"text": codes["text"]}
    targets = {name: codes[name] for name in generated}
    inside = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: inside.append(True))
        block.register_forward_hook(lambda *_: inside.pop() and None)
        block.adaln.register_forward_pre_hook(lambda *_: inside[-1] and None)
    options = {"prefix": model.encode_prefix(given), "with_unconditional": with_unconditional}
    plain = model(targets, **options).sample
    modulation = model.encode_modulation(targets)
    for block in model.transformer_blocks:
        block.adaln = None  # not needed any more
    found = model(targets, modulation=modulation, **options).sample
    assert all(torch.equal(found[name], plain[name]) for name in generated)
    with pytest.raises(ValueError, match="modulation is of the segments .* but these are .'text'."):
        model({"text": codes["text"]}, modulation=modulation)
    with pytest.raises(ValueError, match="encode_modulation: the model is time_conditioned"):
        make(time_conditioned=True).encode_modulation(targets)


def test_a_forward_pass_is_one_graph(codes):
    model = make()
    given, targets = {"text": codes["text"]}, {"image": codes["image"]}
    traced = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        prefix = torch.compile(model.encode_prefix, fullgraph=True, backend="eager")(given)
        options = {"prefix": prefix, "with_unconditional": True, "modulation": model.encode_modulation(targets)}
        expected, found = (one(targets, **options).sample["image"] for one in (model, traced))
    assert all(torch.equal(x, y) for x, y in zip(prefix.keys, model.encode_prefix(given).keys, strict=True))
    assert torch.equal(found, expected)


def test_repeated_blocks_compile_once(codes):
    model, graphs = make(num_layers=4), []
    expected = model({"image": codes["image"]}, given={"text": codes["text"]}).sample["image"]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    prefix = model.encode_prefix({"text": codes["text"]})
    count = len(graphs)
    for _ in range(2):
        found = model({"image": codes["image"]}, prefix=prefix).sample["image"]
    assert torch.equal(found, expected)
    assert count <= 2 and len(graphs) == count + 1  # the last block of what is given stops halfway


def test_the_order_of_a_dict_has_no_meaning(codes):
    model = make()
    one = model({"image": codes["image"], "label": codes["label"]}, given={"text": codes["text"]}).sample
    other = model({"label": codes["label"], "image": codes["image"]}, given={"text": codes["text"]}).sample
    assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    sides = [{"text": codes["text"], "label": codes["label"]}, {"label": codes["label"], "text": codes["text"]}]
    first, second = (model({"image": codes["image"]}, given=given).sample["image"] for given in sides)
    assert torch.equal(first, second)


def test_logits_at_masked_positions_equal_all_logits_picked(codes):
    for options in ({}, {"time_conditioned": True}):
        model = make(**options)
        masked = {"image": torch.rand(3, 16) < 0.5, "text": torch.rand(3, 6) < 0.5}
        generated = {name: codes[name] for name in masked}
        time = torch.rand(3)
        whole = model(generated, time, given={"label": codes["label"]}).sample
        picked = model(generated, time, given={"label": codes["label"]}, masked=masked).sample
        for name, where in masked.items():
            torch.testing.assert_close(picked[name], whole[name][where])


def test_another_grid_size_runs_and_covers_the_same_range():
    model = make()
    assert model({"image": torch.randint(31, (1, 6, 5))}).sample["image"].shape == (1, 30, 30)
    small = sincos_positions((4, 4), (4, 4), 32)
    large = sincos_positions((8, 8), (4, 4), 32).view(8, 8, 32)
    torch.testing.assert_close(large[::2, ::2].reshape(16, 32), small)
    assert torch.cdist(small, small).fill_diagonal_(1).min() > 0.1  # all positions differ


def test_a_shared_segment_has_a_role_but_no_weights_of_its_own(codes):
    model = make(segments={**SEGMENTS, "text_zh": {**SEGMENTS["text"], "shared_with": "text"}})
    assert set(model.code_embeddings) == set(model.heads) == set(SEGMENTS)
    assert len(model.segment_embedding.weight) == 8
    both = model({"text": codes["text"], "text_zh": codes["text"]}).sample
    assert both["text"].shape == both["text_zh"].shape == (3, 6, 20)
    assert not torch.allclose(both["text"], both["text_zh"], atol=1e-3)


def test_more_segments_leave_known_tasks_exactly_as_they_were(codes, tmp_path):
    model = make(tasks=["text->image"])
    zh = {"vocab_size": 20, "shape": [6], "shared_with": "text"}
    more = model.with_segments({"a_text": zh, "depth": {"vocab_size": 7, "shape": [4, 4]}})
    assert more.config.tasks == ["text->image"] and set(more.config.segments) == {*SEGMENTS, "a_text", "depth"}
    image, given = {"image": codes["image"]}, {"text": codes["text"], "label": codes["label"]}
    expected = model(image, given=given).sample["image"]
    assert torch.equal(more(image, given=given).sample["image"], expected)
    # A new segment begins in the role of the one it shares with.
    renamed = {"a_text": codes["text"]}
    torch.testing.assert_close(more(renamed).sample["a_text"], model({"text": codes["text"]}).sample["text"])
    again = more(image, given=renamed).sample["image"]
    torch.testing.assert_close(again, model(image, given={"text": codes["text"]}).sample["image"])
    more.save_pretrained(tmp_path)
    loaded = VQDiTTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, more.state_dict()[name]) for name, value in loaded.state_dict().items())
    # Not bit for bit: loaded weights may lie at other addresses, for which matrix products take other kernels.
    torch.testing.assert_close(loaded(image, given=renamed).sample["image"], again)
    assert set(model.config.segments) == set(SEGMENTS)


@pytest.mark.parametrize(
    ("name", "segment", "message"),
    [
        ("text", {"vocab_size": 20, "shape": [6]}, r"the model has \['text'\] already"),
        ("other", {"vocab_size": 20, "shape": [6], "shared_with": "audio"}, "shared_with='audio' must be another"),
        ("other", {"vocab_size": 21, "shape": [6], "shared_with": "text"}, "with vocab_size=21"),
        ("other", {"vocab_size": 20, "shape": [6], "shared_with": "other"}, "shared_with='other' must be another"),
    ],
)
def test_segments_that_can_not_be_added_are_named(name, segment, message):
    with pytest.raises(ValueError, match=message):
        make().with_segments({name: segment})


def test_time_conditioning_is_used_and_asked_for(codes):
    model = make(time_conditioned=True)
    image = {"image": codes["image"]}
    early, late = (model(image, torch.full((3,), t)).sample["image"] for t in (0.1, 0.9))
    assert (early - late).abs().max() > 1e-3
    with pytest.raises(ValueError, match="timestep is None"):
        model(image)


def test_gradient_checkpointing_gives_the_same_gradients(codes):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model({"image": codes["image"]}, given={"text": codes["text"]}).sample["image"].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_save_and_load_give_the_same_outputs(codes, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = VQDiTTransformer2DModel.from_pretrained(tmp_path)
    arguments = {"hidden_states": {"image": codes["image"], "label": codes["label"]}, "given": {"text": codes["text"]}}
    torch.testing.assert_close(loaded(**arguments).sample["image"], model(**arguments).sample["image"])


def test_state_dict_keys_are_frozen():
    keys = {key.replace("transformer_blocks.0.", "block.") for key in make(num_layers=1).state_dict()}
    linears = [
        *("block.adaln", "block.attn1.to_q", "block.attn1.to_k", "block.attn1.to_v", "block.attn1.to_out.0"),
        *("block.ff.net.0.proj", "block.ff.net.2", "adaln_out", "heads.text", "heads.image", "heads.label"),
    ]
    others = [f"code_embeddings.{name}.weight" for name in SEGMENTS] + [
        *("segment_embedding.weight", "block.attn1.norm_q.weight", "block.attn1.norm_k.weight"),
    ]
    assert keys == {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")} | set(others)


@pytest.mark.parametrize("with_segments", [True, False])
def test_attention_backends_really_switch(codes, monkeypatch, with_segments):
    if with_segments:
        model, arguments = make(), ({"image": codes["image"]},)
    else:
        model = make(segments=None, use_rotary_positional_embeddings=False, sample_size=8, num_embeds_ada_norm=10)
        arguments = (torch.randn(2, 4, 8, 8), torch.tensor([5, 2]), torch.tensor([3, 4]))

    def run():
        sample = model(*arguments).sample
        return sample["image"] if with_segments else sample

    def spy(name):
        original = _AttentionBackendRegistry._backends[name]

        def backend(**options):
            calls.append(name)
            return original(**options)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, name, backend)

    calls = []
    # set_attention_backend also sets the process's default, which other tests must not see.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    spy(AttentionBackendName.NATIVE)
    spy(AttentionBackendName._NATIVE_MATH)
    expected = run()
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)
    assert calls == [AttentionBackendName.NATIVE] * 3 + [AttentionBackendName._NATIVE_MATH] * 3
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("no_such_backend")


def test_fused_projections_change_nothing(codes):
    model = make()
    expected = model({"image": codes["image"]}, given={"text": codes["text"]}).sample["image"]
    model.fuse_qkv_projections()
    assert model.transformer_blocks[0].attn1.fused_projections
    actual = model({"image": codes["image"]}, given={"text": codes["text"]}).sample["image"]
    torch.testing.assert_close(actual, expected)


def test_lora_changes_outputs_saves_loads_and_unloads(codes, tmp_path):
    from peft import LoraConfig

    model = make()
    image = {"image": codes["image"]}
    base = model(image).sample["image"]
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    changed = model(image).sample["image"]
    assert (changed - base).abs().max() > 1e-3
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert torch.equal(model(image).sample["image"], base)
    model.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    torch.testing.assert_close(model(image).sample["image"], changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(codes, dtype):
    sample = make().to(dtype)({"image": codes["image"]}, given={"text": codes["text"]}).sample["image"]
    assert sample.dtype == dtype and torch.isfinite(sample).all()


def test_autocast_gives_attention_one_type_and_stays_close(codes):
    model = make()
    image, given = {"image": codes["image"]}, {"text": codes["text"]}
    expected = model(image, given=given).sample["image"]
    with torch.autocast("cpu", torch.bfloat16):
        prefix = model.encode_prefix(given)
        actual = model(image, prefix=prefix).sample["image"]
    assert {x.dtype for x in prefix.keys + prefix.values} == {torch.bfloat16}
    assert (actual - expected).abs().max() < 0.1 * expected.abs().max()


def test_layerwise_casting_stores_less_and_computes_the_same_types(codes):
    model = make(time_conditioned=True)
    arguments = {
        "hidden_states": {"image": codes["image"]},
        "timestep": torch.rand(3),
        "given": {"text": codes["text"]},
    }
    expected = model(**arguments).sample["image"]
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float16
    torch.testing.assert_close(model(**arguments).sample["image"], expected, atol=2e-2, rtol=2e-2)


def test_ten_samples_are_learned_by_heart():
    text, image = torch.randint(20, (10, 6)), torch.randint(30, (10, 4, 4))
    model = VQDiTTransformer2DModel(**{**CONFIG, "num_attention_heads": 4, "num_layers": 2})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    everything = torch.full_like(image, 30)
    for _ in range(220):
        masked = torch.rand(10, 16) < torch.rand(10, 1).sqrt()
        noised = torch.where(masked.view_as(image), everything, image)
        logits = model({"image": noised}, given={"text": text}, masked={"image": masked}).sample["image"]
        F.cross_entropy(logits, image.flatten(1)[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model({"image": everything}, given={"text": text}).sample["image"]
    assert F.cross_entropy(logits.flatten(0, 1), image.flatten()) < 0.1  # log 30 = 3.4 at the start
    assert torch.equal(logits.argmax(-1), image.flatten(1))


ONES = {"image": torch.ones(1, 4, 4, dtype=torch.int64)}
TEXT = {"text": torch.zeros(1, 6, dtype=torch.int64)}


@pytest.mark.parametrize("timestep", ["0.5", True, [0.5], torch.rand(3), torch.rand(0)])
def test_times_that_do_not_fit_are_named(timestep):
    with pytest.raises(ValueError, match="timestep"):
        make(time_conditioned=True)({"image": ONES["image"].expand(2, 4, 4)}, timestep)


def test_one_time_is_all_samples_time(codes):
    model, image = make(time_conditioned=True), {"image": codes["image"]}
    expected = model(image, torch.full((len(codes["image"]),), 0.3)).sample["image"]
    for timestep in (0.3, torch.tensor(0.3), torch.tensor([0.3])):
        torch.testing.assert_close(model(image, timestep).sample["image"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masked": {}}, r"generated segments \['image'\]"),
        ({"masked": {"image": torch.ones(1, 4, 4, dtype=torch.bool)}}, r"bool of shape \(1, 16\)"),
        ({"masked": {"image": torch.ones(1, 16)}}, "float32"),
        ({"class_labels": torch.zeros(1, dtype=torch.int64)}, "labels in given"),
        ({"given": {"text": torch.full((1, 6), 20)}}, r"\[0, 19\], got 20 to 20; 20 is the mask"),
        ({"given": torch.zeros(1, 6)}, "given must be a dict .* got a Tensor"),
        ({"masked": torch.ones(1, 16)}, "masked must be a dict of bools by segment, got Tensor"),
        ({"masked": {"image": [True] * 16}}, r"masked\['image'\]=.* must be a tensor, got list"),
        ({"given": TEXT, "given_mask": torch.ones(1, 6)}, "given_mask must be a dict .* got Tensor"),
        ({"prefix": {}}, "prefix must be a VQDiTPrefix, as encode_prefix makes it, got dict"),
        ({"modulation": [1]}, "modulation must be a VQDiTModulation, as encode_modulation makes it, got list"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make()(ONES, **options)


def test_a_prefix_is_not_given_twice(codes):
    model = make()
    prefix = model.encode_prefix({"text": codes["text"]})
    with pytest.raises(ValueError, match="not both"):
        model({"image": codes["image"]}, given={"text": codes["text"]}, prefix=prefix)
    with pytest.raises(ValueError, match="given must be a dict .* empty dict"):
        model.encode_prefix({})


@pytest.mark.parametrize(
    ("generated", "given", "message"),
    [
        ({}, {}, "an empty dict"),
        ({"sound": torch.zeros(1, 6, dtype=torch.int64)}, {}, "'sound'; this model has"),
        ({"image": torch.zeros(1, 16, dtype=torch.int64)}, {}, "must have 3 dimensions"),
        ({"image": torch.zeros(1, 4, 4)}, {}, "float32"),
        ({"image": torch.full((1, 4, 4), 31)}, {}, r"\[0, 30\]"),
        ({"image": torch.ones(1, 4, 4).long()}, {"image": torch.ones(1, 4, 4).long()}, "at once"),
        (
            {"image": torch.ones(1, 4, 4).long()},
            {"text": torch.ones(2, 6).long()},
            "has 2 samples, but hidden_states 1",
        ),
    ],
)
def test_bad_input_is_named(generated, given, message):
    with pytest.raises(ValueError, match=message):
        make()(generated, given=given)


@pytest.mark.parametrize(
    "segment",
    [
        {"shape": [4]},
        {"vocab_size": 0, "shape": [4]},
        {"vocab_size": 4, "shape": [1, 2, 3, 4]},
        {"vocab_size": 4, "shape": [2.5]},
        {"vocab_size": 4, "shape": [4], "size": 3},
    ],
)
def test_bad_segments_are_named(segment):
    with pytest.raises(ValueError, match=r"segments\['image'\]"):
        VQDiTTransformer2DModel(**{**CONFIG, "segments": {"image": segment}})


@pytest.mark.parametrize("name", ["type", "a.b", "keys", "text->image"])
def test_bad_segment_names_are_named(name):
    with pytest.raises(ValueError, match=f"segments: '{name}'"):
        VQDiTTransformer2DModel(**{**CONFIG, "segments": {name: SEGMENTS["image"]}})


def test_its_output_can_be_made_anew(codes):
    """As DistributedDataParallel, torch.export and Accelerate's mixed precision do."""
    output = make()({"image": codes["image"]}, given={"text": codes["text"]})
    assert output["sample"] is output.sample and output.to_tuple() == (output.sample,)
    leaves, spec = torch.utils._pytree.tree_flatten(output)
    for again in (torch.utils._pytree.tree_unflatten(leaves, spec), type(output)(dict(output))):
        assert torch.equal(again.sample["image"], output.sample["image"]) and list(again.sample) == ["image"]


def test_export_leaves_nothing_behind(codes):
    class ImageLogits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, image, text):
            return self.model({"image": image}, given={"text": text}).sample["image"]

    wide = {"num_attention_heads": 3}  # of a size that no other test has positions for
    model = ImageLogits(make(**wide))
    exported = torch.export.export(model, (codes["image"], codes["text"])).module()
    expected = model(codes["image"], codes["text"])  # on tensors with values again
    torch.testing.assert_close(exported(codes["image"], codes["text"]), expected)
