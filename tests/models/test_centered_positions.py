"""Centered positions: a coordinate is the same part of a picture, whatever the grid's size and aspect ratio."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.models.layers import sincos_positions


SIDES = st.integers(1, 12)
GRIDS = st.tuples(SIDES, SIDES)
SEGMENT = {"vocab_size": 9, "shape": [4, 4]}


def reference(shape, trained, dim):
    """Position by position: where its middle lies in the picture, in units of the trained grid's cells."""
    part, rows = dim // 4 * 2, []
    cell = max(trained) / max(shape)  # the side of one of this grid's cells
    for y in range(shape[0]):
        for x in range(shape[1]):
            waves = []
            for index, count, base in ((y, shape[0], trained[0]), (x, shape[1], trained[1])):
                middle = base / 2 + cell * (index + 0.5 - count / 2)
                angles = [(middle - 0.5) * 10_000.0 ** (-2 * k / part) for k in range(part // 2)]
                waves += [*map(math.sin, angles), *map(math.cos, angles)]
            rows.append(waves + [0.0] * (dim - 2 * part))
    return torch.tensor(rows)


@given(GRIDS, GRIDS, st.sampled_from([8, 30, 64]))
def test_they_are_those_of_the_middles_of_cells(shape, trained, dim):
    found = sincos_positions(shape, trained, dim, scale=max(trained) / max(shape))
    torch.testing.assert_close(found, reference(shape, trained, dim), atol=1e-5, rtol=0)


@given(st.lists(SIDES, min_size=1, max_size=3), st.sampled_from([30, 64]))
def test_on_the_trained_grid_they_are_the_scaled_ones_to_the_bit(shape, dim):
    shape = tuple(shape)
    assert torch.equal(sincos_positions(shape, shape, dim, scale=1.0), sincos_positions(shape, shape, dim))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))
def test_a_cut_has_the_positions_of_its_part(cut, height, more):
    """A picture that is cut above and below keeps the positions of what is left, if its width is the longest side."""
    width = height + 2 * cut + more
    whole, part = (
        sincos_positions((rows, width), (16, 16), 32, scale=16 / width).view(rows, width, 32)
        for rows in (height + 2 * cut, height)
    )
    torch.testing.assert_close(part, whole[cut:-cut], atol=1e-5, rtol=0)


def make(**options):
    torch.manual_seed(0)
    segments = {"image": {**SEGMENT, **options}}
    model = VQDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, num_layers=2, segments=segments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("patch", [{}, {"patch": [2, 2]}, {"shape": [4, 4, 3], "patch": [1, 1, 3]}])
def test_a_model_has_them_by_its_config(patch, tmp_path):
    scaled, centered = make(**patch), make(**patch, centered_positions=True)
    assert "centered_positions" not in scaled.config.segments["image"]
    rest = patch.get("shape", [4, 4])[2:]
    for shape, same in (((4, 4), True), ((8, 4), False), ((6, 2), False)):
        codes = {"image": torch.randint(10, (2, *shape, *rest))}
        one, other = (model(codes).sample["image"] for model in (scaled, centered))
        assert torch.equal(one, other) == same
    centered.save_pretrained(tmp_path)
    loaded = VQDiTTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(codes).sample["image"], other)
    again = VQDiTTransformer2DModel.from_config(dict(scaled.config))  # an older checkpoint's has no word of them
    again.load_state_dict(scaled.state_dict())
    torch.testing.assert_close(again.eval()(codes).sample["image"], one)


CODEBOOKS = {"shape": [4, 4, 12], "patch": [1, 1, 12], "separate_codebooks": True}


@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (8, 8), (2, 4)])
@pytest.mark.parametrize(
    "options",
    [{}, *({"patch": [h, w]} for h in (1, 2) for w in (1, 2, 4)), CODEBOOKS, {**CODEBOOKS, "patch": [1, 2, 3]}],
)
def test_the_longest_sides_are_those_of_codes_whatever_the_patch(options, shape):
    model = make(**options, centered_positions=True)
    patch, codebooks = options.get("patch", [1, 1]), options.get("shape", [4, 4])[2:]
    grid, trained = (
        tuple(side // size for side, size in zip([*sides, *codebooks], patch, strict=True))
        for sides in (shape, (4, 4))
    )
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)  # what is embedded is the positions alone
    found = model._embed({"image": torch.zeros(1, *shape, *codebooks, dtype=torch.long)})[0][0]
    expected = sincos_positions(grid, trained, model.inner_dim, scale=4 / max(shape))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({**SEGMENT, "centered_positions": 1}, r"segments\['image'\]: centered_positions=1"),
        ({**SEGMENT, "centered_positions": None}, "centered_positions=None"),
        ({**SEGMENT, "centered_positions": "yes"}, "centered_positions='yes'"),
        ({"vocab_size": 9, "shape": [4], "centered_positions": True}, r"needs a grid, not shape=\[4\]"),
        ({"channels": 9, "shape": [4], "centered_positions": True}, r"\['centered_positions'\] are for codes"),
    ],
)
def test_they_are_of_grids(segment, message):
    with pytest.raises(ValueError, match=message):
        VQDiTTransformer2DModel(2, 16, num_layers=1, segments={"image": segment})
