"""States of a frozen encoder as a given segment: their padding is seen by nothing, their number is free."""

import pytest
import torch

from diffusers_vqdit import VQDiTTransformer2DModel


SEGMENTS = {
    "image": {"vocab_size": 30, "shape": [4, 4]},
    "text": {"vocab_size": 20, "shape": [6]},
    "prompt": {"channels": 12, "shape": [9]},
}
CONFIG = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "segments": SEGMENTS}


@pytest.fixture(params=[False, True], ids=["added", "rotary"])
def model(request):
    model = VQDiTTransformer2DModel(**CONFIG, use_rotary_positional_embeddings=request.param)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def image():
    return {"image": torch.randint(31, (3, 4, 4))}


def test_states_are_seen_in_their_order_and_to_the_last_code(model, image):
    states = torch.randn(3, 9, 12)
    logits = model(image, given={"prompt": states}).sample["image"]
    assert (logits - model(image).sample["image"]).abs().max() > 1e-2
    assert (logits - model(image, given={"prompt": states.flip(1)}).sample["image"]).abs().max() > 1e-3
    # An encoder's scale has no meaning.
    torch.testing.assert_close(model(image, given={"prompt": 1000 * states}).sample["image"], logits)


@pytest.mark.parametrize("others", [(), ("text",)])
@pytest.mark.parametrize("lengths", [[9, 4, 1], [2, 2, 2], [0, 5, 9]])
def test_padding_is_as_good_as_not_there(model, image, lengths, others):
    """Each sample alone, without its padding."""
    states, text = torch.randn(3, 9, 12), torch.randint(20, (3, 6))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    given = {"prompt": states, **{name: text for name in others}}
    prefix = model.encode_prefix(given, given_mask={"prompt": mask})
    logits = model(image, prefix=prefix).sample["image"]
    assert torch.equal(model(image, given=given, given_mask={"prompt": mask}).sample["image"], logits)
    for row, length in enumerate(lengths):
        alone = {name: text[row : row + 1] for name in others}
        if length:
            alone["prompt"] = states[row : row + 1, :length]
        expected = model({"image": image["image"][row : row + 1]}, given=alone).sample["image"]
        torch.testing.assert_close(logits[row : row + 1], expected, atol=2e-5, rtol=1e-4)
    both = model(image, prefix=prefix, with_unconditional=True).sample["image"]
    torch.testing.assert_close(both[:3], logits)
    torch.testing.assert_close(both[3:], model(image).sample["image"])
    picked = model({"image": image["image"][[2, 0]]}, prefix=prefix.select(torch.tensor([2, 0]))).sample["image"]
    torch.testing.assert_close(picked, logits[[2, 0]])


def test_a_mask_may_be_of_codes_too(model, image):
    text = torch.randint(20, (3, 6))
    mask = torch.arange(6).expand(3, 6) < 4
    logits = model(image, given={"text": text}, given_mask={"text": mask}).sample["image"]
    text[:, 4:] = 7
    assert torch.equal(model(image, given={"text": text}, given_mask={"text": mask}).sample["image"], logits)


def test_states_train_save_and_load(model, image, tmp_path):
    model.train()
    sample = model(image, given={"prompt": torch.randn(3, 9, 12)}).sample["image"]
    sample.logsumexp(-1).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.proj_in["prompt"].parameters())
    model.eval().save_pretrained(tmp_path)
    given, loaded = {"prompt": torch.randn(3, 5, 12)}, VQDiTTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(image, given=given).sample["image"], model(image, given=given).sample["image"])
    grown = VQDiTTransformer2DModel(**{**CONFIG, "segments": {"image": SEGMENTS["image"]}})
    assert grown.with_segments({"prompt": SEGMENTS["prompt"]}).config.segments["prompt"]["channels"] == 12


@pytest.mark.parametrize(
    ("given", "masks", "message"),
    [
        ({"prompt": torch.randn(3, 9, 11)}, None, r"given\['prompt'\] must be states \(B, n, 12\)"),
        ({"prompt": torch.zeros(3, 9, 12).long()}, None, "must be states"),
        ({"prompt": torch.full((3, 9, 12), torch.nan)}, None, "not finite"),
        ({"prompt": [[[1.0] * 12]] * 3}, None, r"given\['prompt'\]=.* must be a tensor, got list"),
        ({"prompt": torch.randn(3, 9, 12).numpy()}, None, "must be a tensor, got ndarray"),
        ({"prompt": torch.randn(3, 9, 12)}, {"prompt": torch.ones(3, 8)}, r"given_mask\['prompt'\] must have shape"),
        ({"prompt": torch.randn(3, 9, 12)}, {"text": torch.ones(3, 6)}, "given_mask must be a dict with some of"),
        ({}, {"prompt": torch.ones(3, 9)}, "given_mask needs given"),
        ({"prompt": torch.randn(3, 9, 12)}, {"prompt": torch.full((3, 9), -1e9)}, "must be 0 at padding and else 1"),
    ],
)
def test_what_does_not_fit_is_named(model, image, given, masks, message):
    with pytest.raises(ValueError, match=message):
        model(image, given=given, given_mask=masks)


@pytest.mark.parametrize(
    ("segment", "tasks", "message"),
    [
        ({"channels": 0, "shape": [9]}, None, "channels"),
        ({"channels": 12, "shape": [3, 3]}, None, "shape"),
        ({"channels": 12, "shape": [9], "vocab_size": 8}, None, r"\['vocab_size'\] are for codes"),
        ({"channels": 12, "shape": [9]}, ["image->prompt"], "given, never generated"),
    ],
)
def test_a_config_that_does_not_fit_is_named(segment, tasks, message):
    with pytest.raises(ValueError, match=message):
        VQDiTTransformer2DModel(**{**CONFIG, "segments": {**SEGMENTS, "prompt": segment}, "tasks": tasks})


def test_states_have_no_vocabulary_to_grow(model):
    with pytest.raises(ValueError, match="name='prompt' must be a segment with embeddings of its own, one of"):
        model.with_vocab_size("prompt", 99)


def test_states_meet_a_quantized_projection_as_they_are(model, image):
    """Its weights are integers, which states are not to become."""

    class Quantized(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.weight = layer, torch.zeros(1, dtype=torch.uint8)

        def forward(self, states):
            return self.layer(states)

    given = {"prompt": torch.randn(3, 5, 12)}
    whole = model(image, given=given).sample["image"]
    projection = model.proj_in["prompt"].projection
    projection.linear_1 = Quantized(projection.linear_1)
    assert torch.equal(model(image, given=given).sample["image"], whole)


def test_states_are_never_generated(model):
    with pytest.raises(ValueError, match="never generated"):
        model({"prompt": torch.randn(3, 9, 12)})
