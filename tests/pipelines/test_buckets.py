"""Pictures that are passed to a pipeline that was trained on several aspect ratios."""

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_vqdit import VQDiTPipeline, VQDiTTransformer2DModel


GRIDS = [[4, 4], [6, 3], [3, 6]]
FACTOR = 4


def picture(height, width, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def mask(height, width):
    plane = np.zeros((height, width), np.uint8)
    plane[:, width // 2 :] = 255
    return PIL.Image.fromarray(plane)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def buckets(image_vq, text_vq, tokenizer, pipeline):
    """A pipeline with pictures, sketches of the same tokenizer and small pictures, on three grids."""
    grid = {"vocab_size": 32, "shape": [4, 4]}
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        segments={
            "text": {"vocab_size": 64, "shape": [12]},
            "image": grid,
            "sketch": {**grid, "shared_with": "image"},
            "image_lowres": {**grid, "shared_with": "image"},
        },
        tasks=["text->image", "image->text", "sketch->image", "image->sketch", "->image", "image_lowres->image"],
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    entries = {name: {"modality": "image", "buckets": GRIDS} for name in ("image", "sketch", "image_lowres")}
    entries["image_lowres"] |= {"lowres_of": "image", "factor": 2}
    parts = {**pipeline.components, "transformer": transformer.eval()}
    pipe = VQDiTPipeline(**parts, segments=entries)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def grids(buckets, monkeypatch):
    """The grids of the codes that the tokenizer makes."""
    found, encode = [], buckets.image_vq.encode_codes

    def seen(sample):
        codes = encode(sample)
        found.append(list(codes.shape[1:]))
        return codes

    monkeypatch.setattr(buckets.image_vq, "encode_codes", seen)
    return found


@pytest.mark.parametrize(("size", "grid"), [((20, 20), 0), ((100, 60), 1), ((9, 30), 2), ((17, 16), 0), ((7, 1), 1)])
def test_a_picture_is_seen_at_its_own_aspect_ratio(buckets, grids, size, grid):
    height, width = (FACTOR * side for side in GRIDS[grid])
    one = picture(*size)
    text = buckets(image=one, output="text", generator=generators(1)).texts
    # By its size too; and in a batch with another of the same bucket.
    assert buckets(image=one, output="text", height=height, width=width, generator=generators(1)).texts == text
    pair = buckets(image=[one, picture(*size, seed=1)], output="text", generator=generators(1, 2)).texts
    assert pair[0] == text[0]
    assert grids == [GRIDS[grid]] * 3
    # Another picture of it is made on the same grid.
    drawn = buckets(image=one, output="sketch", generator=generators(1)).segments["sketch"][0]
    assert drawn.size == (width, height)
    assert buckets(inputs={"sketch": one}, output="image", num_images_per_prompt=2).images[1].size == (width, height)
    array = np.asarray(one)[None].astype(np.float32) / 255
    assert (
        buckets(image=array, output="sketch", generator=generators(1), output_type="pil").images[0].size == drawn.size
    )


def test_without_a_picture_and_enlarged_it_is_the_first_grid(buckets):
    assert buckets("a red apple").images[0].size == (16, 16)
    assert buckets(image=picture(8, 20), output="image").images[0].size == (40, 16)  # in tiles
    assert buckets.encode_image(picture(8, 20)).shape == (1, 4, 4)
    nll = buckets.score("image->text", "a box", [picture(8, 20), picture(20, 8)], num_samples=2).nll
    assert nll.shape == (2,) and nll.isfinite().all()
    assert len(buckets.index(image=[picture(8, 20), picture(20, 8)], query="text")) == 2


def test_a_repainted_picture_keeps_its_size_and_what_is_known(buckets):
    one, shapes = picture(60, 30), []

    def seen(pipe, index, timestep, inputs):
        shapes.append(tuple(inputs["latents"].shape))

    options = {"output": "image", "callback_on_step_end": seen}
    found = buckets(image=one, mask_image=mask(60, 30), **options).images[0]
    assert set(shapes) == {(1, 6, 3)} and found.size == (30, 60)
    assert np.array_equal(np.asarray(found)[:, :15], np.asarray(one)[:, :15])
    assert buckets(image=one, strength=0.5, **options).images[0].size == (12, 24) and shapes[-1] == (1, 6, 3)
    assert buckets(image=one, mask_image=mask(60, 30), width=16, height=16, **options).images[0].size == (30, 60)
    assert shapes[-1] == (1, 4, 4)


def test_pictures_of_several_buckets_are_refused_whatever_is_made_of_them(buckets):
    several = [picture(20, 20), picture(40, 20)]
    message = r"pictures of 20 x 20 and 40 x 20 pixels .* call once for each aspect ratio, or give height and width"
    for options in ({"output": "text"}, {"output": "sketch"}, {"output": "image", "strength": 0.5}):
        with pytest.raises(ValueError, match="image has " + message):
            buckets(image=several, **options)
    with pytest.raises(ValueError, match=r"inputs\['sketch'\] has " + message):
        buckets(inputs={"sketch": several})
    texts = buckets(image=several, output="text", height=16, width=16, generator=generators(1, 2)).texts
    assert texts[1] == buckets(image=several[1], output="text", height=16, width=16, generator=generators(2)).texts[0]


def test_latents_say_the_grid_of_what_is_made(buckets):
    latents = torch.full((1, 5, 4), 32)
    assert buckets(inputs={"sketch": picture(40, 20)}, latents=latents).images[0].size == (16, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"modality": "image", "buckets": [[6, 3], [4, 4]]}}, r"must begin with \[4, 4\]"),
        ({"image": {"modality": "image", "buckets": [[4, 4], [8, 8]]}}, "which have one aspect ratio"),
        ({"image": {"modality": "image", "buckets": []}}, r"\['buckets'\]=\[\] must be"),
        ({"image": {"modality": "image", "buckets": 3}}, r"\['buckets'\]=3 must be"),
        ({"text": {"modality": "text", "buckets": [[4, 4]]}}, "the option='buckets' must be one of"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(buckets, change, message):
    with pytest.raises(ValueError, match=message):
        VQDiTPipeline(**buckets.components, segments=change)


def test_positions_of_patches_divide_the_grids(buckets):
    segments = {"image": {"vocab_size": 32, "shape": [4, 4], "patch": [2, 2]}}
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, segments=segments
    )
    parts = {**buckets.components, "transformer": transformer}
    with pytest.raises(ValueError, match=r"\['buckets'\]: \[6, 3\] must be a multiple of \[2, 2\].* such as"):
        VQDiTPipeline(**parts, segments={"image": {"modality": "image", "buckets": GRIDS}})
    VQDiTPipeline(**parts, segments={"image": {"modality": "image", "buckets": [[4, 4], [6, 2]]}})
