"""What a position holds: one code, or a patch of them."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as generated_cases
from hypothesis import settings
from hypothesis import strategies as st

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTTransformer2DModel
from diffusers_vqdit.models.segment_layers import patchify, unpatchify
from diffusers_vqdit.training.masked_loss import masked_diffusion_loss


IMAGE = {"vocab_size": 30, "shape": [4, 4], "patch": [2, 2]}
SPEECH = {"vocab_size": 11, "shape": [5, 3], "patch": [1, 3], "separate_codebooks": True}
VIDEO = {"vocab_size": 9, "shape": [2, 4, 2], "patch": [2, 2, 1]}
SEGMENTS = {
    "image": IMAGE,
    "image_lowres": {"vocab_size": 30, "shape": [4, 4], "shared_with": "image"},
    "speech": SPEECH,
    "video": VIDEO,
    "text": {"vocab_size": 20, "shape": [6], "patch": [3]},
    "label": {"vocab_size": 5, "shape": [1]},
}
CONFIG = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "segments": SEGMENTS}


def make(**options):
    model = VQDiTTransformer2DModel(**{**CONFIG, **options})
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def draw(name, size=3, masks=1):
    segment = SEGMENTS[name]
    return torch.randint(segment["vocab_size"] + masks, (size, *segment["shape"]))


def sides(names=("image", "speech", "video"), given=("text", "label", "image_lowres")):
    return {name: draw(name) for name in names}, {name: draw(name, masks=0) for name in given}


@generated_cases(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_codes_are_cut_into_patches_and_put_back(axes):
    grid, patch = zip(*axes, strict=True)
    shape = tuple(n * p for n, p in axes)
    codes = torch.arange(2 * math.prod(shape)).view(2, *shape)
    patches = patchify(codes, patch)
    assert patches.shape == (2, math.prod(grid), math.prod(patch))
    assert torch.equal(unpatchify(patches[..., None], shape, patch)[..., 0], codes.flatten(1))
    for number, cell in enumerate(itertools.product(*map(range, grid))):
        block = tuple(slice(i * p, (i + 1) * p) for i, p in zip(cell, patch, strict=True))
        assert torch.equal(patches[1, number], codes[1][block].flatten())


@pytest.mark.parametrize("more", [{}, {"separate_codebooks": True}, {"separate_codebooks": False}])
def test_a_patch_of_one_code_is_none_bit_for_bit(more):
    plain = {name: {"vocab_size": 30, "shape": [4, 4]} for name in ("image", "image_lowres")}
    plain["image_lowres"]["shared_with"] = "image"
    one = {**plain, "image": {**plain["image"], "patch": [1, 1], **more}}
    models = []
    for segments in (plain, one):
        torch.manual_seed(0)
        models.append(make(segments=segments))
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    codes, masked = draw("image"), torch.rand(3, 16) < 0.5
    for options in ({}, {"masked": {"image": masked}}, {"given": {"image_lowres": draw("image", masks=0)}}):
        first, second = (model({"image": codes}, **options).sample["image"] for model in models)
        assert torch.equal(first, second)


def test_a_patch_is_one_position_and_its_codes_are_in_row_major_order(monkeypatch):
    """By loops over the grids: the codes of a patch in, their logits out."""
    model = make()
    hidden, lengths, _ = model._embed({"image": draw("image"), "speech": draw("speech"), "video": draw("video")})
    assert lengths == (4, 5, 4) and hidden.shape == (3, 13, 32)
    names = ("image", "speech", "video")
    states = {}
    for name in names:
        model.proj_out[name].register_forward_hook(lambda m, i, o, name=name: states.update({name: o}))
    codes, _ = sides(names)
    logits = model(codes).sample
    for name in names:
        shape, patch = SEGMENTS[name]["shape"], SEGMENTS[name]["patch"]
        grid = [n // p for n, p in zip(shape, patch, strict=True)]
        table = states[name].view(3, *grid, *patch, -1)
        for number, cell in enumerate(itertools.product(*map(range, shape))):
            inside = tuple(i % p for i, p in zip(cell, patch, strict=True))
            state = table[(slice(None), *(i // p for i, p in zip(cell, patch, strict=True)), *inside)]
            head = model.heads[name]
            if name == "speech":
                head = head[inside[1]]
            torch.testing.assert_close(logits[name][:, number], head(state))


def test_the_codebooks_of_a_patch_have_embeddings_of_their_own():
    model = make()
    table = model.code_embeddings["speech"].weight
    assert len(table) == 3 * 12 and len(model.code_embeddings["image"].weight) == 31
    codes = draw("speech")
    before, *_ = model._embed({"speech": codes})
    table.data[12 + 7] += 1.0  # code 7 of the second codebook
    after, *_ = model._embed({"speech": codes})
    assert torch.equal((before != after).any(-1), codes[:, :, 1] == 7) and (codes[:, :, [0, 2]] == 7).any()


def test_each_code_has_its_own_mask_and_logits():
    model = make()
    codes, _ = sides(("image",))
    before = model(codes).sample["image"]
    changed = codes["image"].clone()
    changed[0, 2, 3] = (changed[0, 2, 3] + 1) % 30
    after = model({"image": changed}).sample["image"]
    assert (before[0] - after[0]).abs().amax(-1).min() > 0  # all codes of the sample see it, also those beside it
    assert torch.equal(before[1:], after[1:])
    assert not torch.allclose(before[0, 0], before[0, 1], atol=1e-3)  # of one patch


@pytest.mark.parametrize("time_conditioned", [False, True])
def test_logits_at_masked_codes_equal_all_logits_picked(time_conditioned):
    model = make(time_conditioned=time_conditioned)
    codes, given = sides()
    masked = {name: torch.rand(3, value[0].numel()) < 0.4 for name, value in codes.items()}
    masked["video"][:] = False
    time = torch.rand(3)
    rows = []
    for head in (model.heads["image"], *model.heads["speech"]):
        head.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].numel() // inputs[0].shape[-1]))
    whole = model(codes, time, given=given).sample
    rows.clear()
    picked = model(codes, time, given=given, masked=masked).sample
    assert sum(rows) == int(masked["image"].sum() + masked["speech"].sum())  # the heads run on these alone
    for name, where in masked.items():
        torch.testing.assert_close(picked[name], whole[name][where])


def test_a_prefix_equals_the_given_segments_bit_for_bit():
    model = make()
    codes, given = sides(("image", "text"), ("speech", "video", "image_lowres"))
    prefix = model.encode_prefix(given)
    assert prefix.keys[0].shape[1] == 5 + 4 + 4
    whole, cached = model(codes, given=given).sample, model(codes, prefix=prefix).sample
    assert all(torch.equal(whole[name], cached[name]) for name in codes)


def test_a_new_model_has_the_loss_log_k_and_embeddings_of_the_positions_scale():
    model = VQDiTTransformer2DModel(**{**CONFIG, "num_attention_heads": 8})
    codes, given = sides()
    sample = model(codes, given=given).sample
    assert all(not logits.any() for logits in sample.values())
    for name in ("image", "speech", "video"):
        value = patchify(draw(name, 64, masks=0), SEGMENTS[name]["patch"])
        embedded = model._embed({name: draw(name, 64, masks=0)})[0]
        embedded = embedded - embedded.mean(0)  # less positions
        assert value.shape[:2] == embedded.shape[:2] and 0.4 < embedded.std() < 0.6


def test_another_grid_runs_and_one_that_the_patch_does_not_divide_is_named():
    model = make()
    assert model({"image": torch.randint(31, (1, 6, 2))}).sample["image"].shape == (1, 12, 30)
    assert model({"speech": torch.randint(12, (1, 8, 3))}).sample["speech"].shape == (1, 24, 11)
    for argument in ("hidden_states", "given"):
        with pytest.raises(ValueError, match=rf"{argument}\['image'\]: shape=\[4, 5\] .* patch \[2, 2\]"):
            odd = {"image": torch.zeros(1, 4, 5, dtype=torch.int64)}
            model(odd) if argument == "hidden_states" else model.encode_prefix(odd)


BASE = {"vocab_size": 4, "shape": [4, 4]}


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        *(
            ({**BASE, "patch": patch}, r"segments\['image'\]: patch")
            for patch in ([2], [2, 2, 2], [0, 2], [2.0, 2], [True, 2], 2, "22", None, [])
        ),
        ({**BASE, "patch": [3, 2]}, r"shape=\[4, 4\] must be divisible by the segment's patch \[3, 2\]"),
        ({**BASE, "patch": [8, 1]}, "divisible"),
        ({**BASE, "separate_codebooks": True}, "separate_codebooks=True needs a patch"),
        ({**BASE, "patch": [2, 2], "separate_codebooks": 1}, "separate_codebooks=1 must be True or False"),
        ({**BASE, "shape": [1, 2, 3, 4]}, "shape"),
    ],
)
def test_patches_that_do_not_fit_are_named(segment, message):
    with pytest.raises(ValueError, match=message):
        VQDiTTransformer2DModel(**{**CONFIG, "segments": {"image": segment}})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({**BASE, "patch": [1, 2]}, r"segments\['other'\]: patch=\[1, 2\] must be \[2, 2\], as that of 'image'"),
        ({**BASE, "separate_codebooks": True}, r"separate_codebooks=True must be None, as that of 'image'"),
        ({**BASE, "shape": [4, 3]}, r"segments\['other'\]: shape=\[4, 3\] must be divisible"),
        ({**BASE, "shape": [16]}, r"segments\['other'\]: patch=\[2, 2\]"),
    ],
)
def test_a_shared_segment_has_the_patch_of_the_other(other, message):
    image = {**BASE, "patch": [2, 2]}
    with pytest.raises(ValueError, match=message):
        VQDiTTransformer2DModel(**{**CONFIG, "segments": {"image": image, "other": {**other, "shared_with": "image"}}})


def test_more_segments_leave_known_tasks_exactly_as_they_were(tmp_path):
    model = make()
    more = model.with_segments(
        {
            "depth": {"vocab_size": 30, "shape": [4, 2], "shared_with": "image"},
            "sketch": {"vocab_size": 7, "shape": [4, 4], "patch": [4, 1], "separate_codebooks": True},
        }
    )
    codes, given = sides()
    expected, actual = model(codes, given=given).sample, more(codes, given=given).sample
    assert all(torch.equal(expected[name], actual[name]) for name in codes)
    assert more({"depth": codes["image"][:, :, :2]}).sample["depth"].shape == (3, 8, 30)
    more.save_pretrained(tmp_path)
    loaded = VQDiTTransformer2DModel.from_pretrained(tmp_path)
    sketch = {"sketch": torch.randint(8, (3, 4, 4))}
    for hidden_states in (codes, sketch):
        expected, actual = more(hidden_states, given=given).sample, loaded(hidden_states, given=given).sample
        torch.testing.assert_close(actual, expected)


def test_gradient_checkpointing_gives_the_same_gradients_to_all_of_a_patchs_layers():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        codes, given = sides()
        scheduler = MaskedDiffusionScheduler()
        codes = {name: value % SEGMENTS[name]["vocab_size"] for name, value in codes.items()}
        masked_diffusion_loss(model, scheduler, given, codes, generator=torch.Generator().manual_seed(0)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    for layer in ("code_embeddings.speech", "proj_in.speech", "proj_out.speech", "heads.speech.2", "proj_in.text"):
        assert gradients[0][f"{layer}.weight"].abs().max() > 0


def test_half_precision_autocast_layerwise_casting_lora_and_export():
    from peft import LoraConfig

    codes, given = sides()
    masked = {name: torch.rand(3, value[0].numel()) < 0.4 for name, value in codes.items()}
    model = make()
    expected = model(codes, given=given, masked=masked).sample
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(codes, given=given, masked=masked).sample
    assert all((actual[name] - expected[name]).abs().max() < 0.1 * expected[name].abs().max() for name in codes)
    halved = make().to(torch.bfloat16)(codes, given=given, masked=masked).sample
    assert all(value.dtype == torch.bfloat16 and value.isfinite().all() for value in halved.values())

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, codes, given):
            return self.model(codes, given=given).sample

    exported = torch.export.export(Logits(), (codes, given)).module()
    torch.testing.assert_close(exported(codes, given), model(codes, given=given).sample)

    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_in.image", "proj_out.image", "heads.image"]))
    assert torch.equal(model(codes, given=given, masked=masked).sample["image"], expected["image"])
    model.unload_lora()
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    actual = model(codes, given=given, masked=masked).sample
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("separate", [False, True])
def test_what_a_patch_shows_of_its_codes_is_learned(separate):
    """The codes of a patch are one draw, in another order of the codebook at each place: one visible code tells the
    others, which are random otherwise."""
    image = {"vocab_size": 8, "shape": [4, 4], "patch": [2, 2], "separate_codebooks": separate}
    model = VQDiTTransformer2DModel(**{**CONFIG, "num_attention_heads": 4, "segments": {"image": image}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    orders = torch.stack([torch.randperm(8) for _ in range(4)])

    def batch(size):
        drawn = torch.randint(8, (size, 4, 1)).expand(-1, -1, 4)  # (B, n, P)
        return unpatchify(orders[torch.arange(4), drawn][..., None], (4, 4), (2, 2)).view(size, 4, 4)

    for _ in range(120):
        image = batch(32)
        masked = torch.rand(32, 16) < torch.rand(32, 1)
        logits = model({"image": image.flatten(1).masked_fill(masked, 8).view_as(image)}, masked={"image": masked})
        F.cross_entropy(logits.sample["image"], image.flatten(1)[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    image = batch(32)
    masked = torch.ones(32, 4, 4, dtype=torch.bool)
    masked[:, ::2, 1::2] = False  # the second code of each patch is visible
    with torch.no_grad():
        logits = model({"image": image.masked_fill(masked, 8)}, masked={"image": masked.flatten(1)}).sample["image"]
        nothing = model({"image": torch.full_like(image, 8)}).sample["image"].flatten(0, 1)
    assert F.cross_entropy(logits, image[masked]) < 0.1
    assert F.cross_entropy(nothing, image.flatten()) > 0.9 * math.log(8)
