"""Segments of blocks: keys and values that are appended are those computed anew, and training predicts what sampling
does."""

import pytest
import torch

from diffusers_vqdit import VQDiTTransformer2DModel


SEGMENTS = {
    "title": {"vocab_size": 7, "shape": [6], "block_length": 2},
    "poem": {"vocab_size": 7, "shape": [12], "block_length": 3, "shared_with": "title"},
    "label": {"vocab_size": 4, "shape": [1]},
}


def model(**options) -> VQDiTTransformer2DModel:
    torch.manual_seed(0)
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, segments=SEGMENTS, **options
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transformer.double().eval()


KINDS = [{}, {"use_rotary_positional_embeddings": True}, {"time_conditioned": True}]


def codes(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(7, (rows, length), generator=torch.Generator().manual_seed(seed))


def noised(clean: torch.Tensor, seed: int = 1) -> torch.Tensor:
    hidden = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return clean.masked_fill(hidden, 7)


def given_prefix(transformer, kind: str):
    if kind == "nothing":
        return None
    given = {"title": codes(2, 5, 3), "label": torch.tensor([[1], [2]])}
    mask = {"title": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])} if kind == "masked" else None
    return transformer.encode_prefix(given, mask)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("kind", ["nothing", "given", "masked"])
@torch.no_grad()
def test_appended_blocks_are_those_computed_at_once(options, kind):
    transformer, clean = model(**options), codes(2, 12)
    first = given_prefix(transformer, kind)
    whole = transformer.extend_prefix(first, {"poem": clean})
    prefix = first
    for part in (slice(0, 3), slice(3, 9), slice(9, 12)):
        prefix = transformer.extend_prefix(prefix, {"poem": clean[:, part]})
    assert prefix.offsets == whole.offsets == {"poem": 12}
    for one, other in zip([*prefix.keys, *prefix.values], [*whole.keys, *whole.values], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("kind", ["nothing", "given", "masked"])
@pytest.mark.parametrize("length", [3, 12, 15])
@torch.no_grad()
def test_training_predicts_each_block_as_sampling_does(options, kind, length):
    transformer, clean = model(**options), codes(2, length)
    prefix, hidden = given_prefix(transformer, kind), noised(codes(2, length))
    times = torch.rand(2, length // 3, generator=torch.Generator().manual_seed(4))
    at_once = transformer({"poem": hidden}, times, clean={"poem": clean}, prefix=prefix).sample["poem"]
    where = hidden == 7
    masked = transformer({"poem": hidden}, times, clean={"poem": clean}, prefix=prefix, masked={"poem": where})
    torch.testing.assert_close(masked.sample["poem"], at_once[where])
    for block in range(length // 3):
        part = slice(3 * block, 3 * block + 3)
        logits = transformer({"poem": hidden[:, part]}, times[:, block], prefix=prefix).sample["poem"]
        torch.testing.assert_close(logits, at_once[:, part], rtol=0, atol=1e-12)
        prefix = transformer.extend_prefix(prefix, {"poem": clean[:, part]})


@torch.no_grad()
def test_later_blocks_are_not_seen_and_earlier_ones_are():
    transformer, clean, hidden = model(), codes(1, 12), noised(codes(1, 12))
    logits = transformer({"poem": hidden}, clean={"poem": clean}).sample["poem"]
    for block in range(4):
        changed = clean.clone()
        changed[:, 3 * block] = (changed[:, 3 * block] + 1) % 7
        other = transformer({"poem": hidden}, clean={"poem": changed}).sample["poem"]
        end = 3 * block + 3
        assert torch.equal(other[:, :end], logits[:, :end])
        assert end == 12 or (other[:, end:] != logits[:, end:]).any(-1).all()


@pytest.mark.parametrize(
    "clean, message",
    [
        ({"label": torch.zeros(1, 1, dtype=torch.long)}, "one segment with a block_length"),
        ({"poem": codes(1, 4)}, "no whole blocks of 3"),
        ({"poem": codes(1, 3) + 7}, "must be in"),
        ({"poem": codes(1, 3), "title": codes(1, 2)}, "one segment with a block_length"),
    ],
)
def test_wrong_blocks_are_refused(clean, message):
    with pytest.raises(ValueError, match=message):
        model().extend_prefix(None, clean)
    with pytest.raises(ValueError, match="clean"):
        model()({"poem": codes(1, 6)}, clean=clean)


@pytest.mark.parametrize(
    "segment, message",
    [
        ({"shape": [5], "block_length": 2}, "whole blocks of 2"),
        ({"shape": [4, 4], "block_length": 2}, "must be \\[n\\]"),
        ({"shape": [4], "block_length": 0}, "block_length"),
        ({"shape": [4], "block_length": 2, "patch": [2]}, "one of the two"),
    ],
)
def test_wrong_block_lengths_are_refused(segment, message):
    with pytest.raises(ValueError, match=message):
        VQDiTTransformer2DModel(2, 8, segments={"poem": {"vocab_size": 4, **segment}})
