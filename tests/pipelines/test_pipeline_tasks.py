"""Inpainting, repair, infilling and enlarging, which start from a part of what they generate; and more segments."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline
from diffusers_vqdit.utils.images import (
    back_project,
    fill_with_surroundings,
    join_tiles,
    resize,
    split_tiles,
    touched_patches,
)


MORE_TASKS = ["->text", "image->text_zh", "text->text_zh", "text_zh->text", "image_lowres->image"]
MORE_TASKS += ["image_lowres+text->image", "image_lowres->text"]


@pytest.fixture
def pipe(pipeline):
    pipeline.transformer = pipeline.transformer.with_segments(
        {
            "text_zh": {"vocab_size": 64, "shape": [12], "shared_with": "text"},
            "image_lowres": {"vocab_size": 32, "shape": [4, 4], "shared_with": "image"},
        }
    ).eval()
    pipeline.transformer.register_to_config(tasks=pipeline.transformer.config.tasks + MORE_TASKS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def picture(size=(16, 16), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def hole(size=(16, 16), box=(4, 4, 12, 12)):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Inpainting


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (10, 10)])
@pytest.mark.parametrize("prompt", [None, "a red apple"])
def test_pixels_outside_the_mask_are_bit_identical(pipe, size, prompt):
    image = picture(size)
    box = tuple(n // 4 for n in size) + tuple(3 * n // 4 for n in size)
    out = pipe(prompt, image, mask_image=hole(size, box)).images[0]
    before, after = np.asarray(image), np.asarray(out)
    inside = np.asarray(hole(size, box)) > 0
    assert out.size == size and np.array_equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside]).mean() > 0.9
    tensor = torch.rand(1, 3, 16, 16)
    out = pipe(prompt, tensor, mask_image=hole(), output_type="pt").images
    assert torch.equal(out[..., :4, :], tensor[..., :4, :])


def test_what_is_under_the_mask_is_never_seen(pipe):
    image, mask = picture(), hole()
    other = image.copy()
    other.paste((255, 0, 0), mask=mask)
    first, second = (pipe(image=one, mask_image=mask, generator=generators(3)).images[0] for one in (image, other))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_codes_that_the_mask_does_not_change_are_kept(pipe, monkeypatch):
    size = pipe.transformer.config.segments["image"]["vocab_size"]
    codes = pipe._segment("image").encode_partial(picture(), hole(box=(5, 5, 6, 6))).codes
    assert codes.shape == (1, 4, 4) and codes[0, 1, 1] == size
    drawn = pipe(image=picture(), mask_image=hole(box=(5, 5, 6, 6)), output_type="latent").images
    assert torch.equal(drawn[codes < size], codes[codes < size]) and drawn.max() < size
    # With an encoder that sees no further than its patches, these are all the codes that the mask touches.
    monkeypatch.setattr(
        pipe.image_vq, "encode_codes", lambda x: (torch.nn.functional.avg_pool2d(x, 4).mean(1) * 15 + 16).long()
    )
    codes = pipe._segment("image").encode_partial(picture(), hole(box=(5, 5, 9, 6))).codes
    assert (codes == size).nonzero().tolist() == [[0, 1, 1], [0, 1, 2]]


def test_masks_touch_patches_also_when_pictures_are_resized():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16, 63] = 1  # one pixel, which a resized mask could lose
    assert touched_patches(mask, (16, 16), (4, 4)).nonzero().tolist() == [[0, 1, 3]]
    small = torch.zeros(1, 1, 8, 8)
    small[..., 0, 3] = 1
    assert touched_patches(small, (16, 16), (4, 4)).nonzero().tolist() == [[0, 0, 1]]


def test_holes_take_the_colours_around_them():
    pixels = torch.full((1, 3, 16, 16), 0.25)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:14, 2:13] = 1
    filled = fill_with_surroundings(torch.where(mask > 0, torch.tensor(-9.0), pixels), mask)
    torch.testing.assert_close(filled, pixels)
    halves = torch.cat([torch.zeros(1, 3, 16, 8), torch.ones(1, 3, 16, 8)], dim=3)
    filled = fill_with_surroundings(halves * (1 - mask), mask)
    assert filled[0, 0, 8, 3] < 0.4 and filled[0, 0, 8, 12] > 0.6
    everything = fill_with_surroundings(pixels, torch.ones(1, 1, 16, 16))
    assert torch.equal(everything, torch.zeros(1, 3, 16, 16))


def test_several_samples_of_one_hole(pipe):
    image, mask = picture(), hole()
    batch = pipe(image=image, mask_image=mask, num_images_per_prompt=3, generator=generators(1, 2, 3)).images
    alone = pipe(image=image, mask_image=mask, generator=generators(2)).images[0]
    assert len(batch) == 3 and np.array_equal(np.asarray(batch[1]), np.asarray(alone))
    two = pipe(["a dot", "pink"], [image, picture(seed=1)], mask_image=mask, generator=generators(1, 2)).images
    assert len(two) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Repair


def test_repair_draws_the_stated_share_of_codes_anew(pipe):
    codes = pipe.encode_image(picture())
    masked = pipe._forget(codes, 0.25, None, "image")
    assert (masked == 32).sum() == 4 and torch.equal(masked[masked < 32], codes[masked < 32])
    assert (pipe._forget(codes, 1.0, None, "image") == 32).all() and (
        pipe._forget(codes, 0.001, None, "image") == 32
    ).sum() == 1
    fixed = pipe("a dot", picture(), strength=0.25, output_type="latent").images
    assert (fixed == codes).sum() >= 12
    assert pipe(image=picture((30, 20)), strength=0.5).images[0].size == (16, 16)


def test_the_codes_that_fit_worst_are_the_ones_that_were_damaged(pipe, monkeypatch):
    """A model that expects every code to be 7 finds the codes that are not."""
    transformer = pipe.transformer
    forward = type(transformer).forward

    def expects_seven(self, hidden_states, *args, **options):
        output = forward(self, hidden_states, *args, **options)
        output.sample["image"] = torch.zeros_like(output.sample["image"])
        output.sample["image"][..., 7] = 5.0
        return output

    monkeypatch.setattr(type(transformer), "forward", expects_seven)
    codes = torch.full((2, 4, 4), 7)
    codes[0, 2, 3], codes[1, 0, 1], codes[1, 3, 3] = 1, 2, 3
    assert (pipe._forget(codes[:1], 1 / 16, None, "image") == 32).nonzero().tolist() == [[0, 2, 3]]
    assert (pipe._forget(codes[1:], 2 / 16, None, "image") == 32).nonzero().tolist() == [[0, 0, 1], [0, 3, 3]]


# ---------------------------------------------------------------------------------------------------------------------
# Infilling


def test_blanks_are_filled_and_the_rest_stays(pipe):
    codes, ids, known = pipe._segment("text").infill(["a <mask> apple"])
    assert (codes == 64).sum() == (~known).sum() == 1
    seen = set()
    for token in range(5, 300, 7):  # whatever stands in the blank
        filled = pipe.text_vq.encode_codes(torch.where(known, ids, token), (ids != 0).long())
        assert torch.equal(filled[codes < 64], codes[codes < 64])
        seen.add(int(filled[codes == 64]))
    assert len(seen) > 1
    out = pipe("a <mask> apple")
    assert out.images is None and out.texts[0].startswith("a") and out.texts[0].endswith(" apple")
    two = pipe(["a <mask> apple", "<mask> <mask> box"], output="text", generator=generators(1, 2)).texts
    assert two[1].endswith(" box")
    assert pipe("<mask> <mask> box", generator=generators(2)).texts[0] == two[1]


def test_blanks_are_filled_from_a_picture_and_in_any_text(pipe):
    assert pipe("a <mask> box", picture()).texts[0].endswith(" box")
    out = pipe(image=picture(), inputs={"text_zh": "红<mask>果"}, output="text_zh")
    assert out.texts[0].startswith("红") and out.texts[0].endswith("果") and set(out.segments) == {"text_zh"}
    both = pipe("a <mask> box", output="image+text")
    assert both.texts[0].endswith(" box") and len(both.images) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Enlarging


@pytest.mark.parametrize("size", [(8, 8), (5, 3), (20, 8), (13, 21)])
def test_pictures_of_any_size_become_twice_as_large(pipe, size):
    image = picture(size)
    out = pipe(image=image, output="image", num_inference_steps=2).images[0]
    assert out.size == (2 * size[0], 2 * size[1])
    assert pipe("a dot", image, output="image", num_inference_steps=2).images[0].size == out.size


def test_enlarged_pictures_agree_with_what_they_came_from(pipe):
    lowres = resize(torch.rand(1, 3, 16, 16), (8, 8)) / 2 + 0.5  # within the range, so that nothing is clipped
    large = pipe(image=lowres, output="image", output_type="pt").images
    assert (resize(2 * large - 1, (8, 8)) - (2 * lowres - 1)).abs().mean() < 0.05


def test_a_batch_of_tiled_pictures_equals_each_alone(pipe):
    images = [picture((13, 9)), picture((13, 9), seed=1)]
    options = {"output": "image", "num_inference_steps": 2, "num_images_per_prompt": 2}
    batch = pipe(image=images, generator=generators(1, 2, 3, 4), **options).images
    alone = pipe(image=images[1], generator=generators(3, 4), **options).images
    assert len(batch) == 4
    for one, other in zip(batch[2:], alone, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_tiles_joined_are_the_picture():
    for size in [(8, 8), (20, 9), (3, 30)]:
        pixels = torch.rand(2, 3, *size)
        tiles = split_tiles(pixels, (8, 8))
        assert tiles.shape[1:] == (3, 8, 8) and len(tiles) % 2 == 0
        torch.testing.assert_close(join_tiles(tiles, size, 1), pixels)
        enlarged = join_tiles(tiles.repeat_interleave(2, 2).repeat_interleave(2, 3), size, 2)
        torch.testing.assert_close(enlarged, pixels.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_back_projection_gives_the_small_picture_again():
    lowres = torch.rand(1, 3, 8, 8) - 0.5
    assert (resize(back_project(torch.zeros(1, 3, 16, 16), lowres), (8, 8)) - lowres).abs().max() < 0.02


# ---------------------------------------------------------------------------------------------------------------------
# More segments


def test_any_pair_of_texts(pipe, tmp_path):
    zh = pipe("a red apple", output="text_zh", generator=generators(0))
    assert len(zh.texts) == 1 and zh.segments == {"text_zh": zh.texts}
    assert len(pipe(inputs={"text_zh": ["红苹果", "蓝色"]}, output="text").texts) == 2
    assert len(pipe(image=picture(), output="text_zh").texts) == 1
    assert len(pipe(output="text").texts) == 1
    assert pipe.score("text_zh->text", "a dot", inputs={"text_zh": "红"}, num_samples=2).nll.shape == (1,)
    pipe.save_pretrained(tmp_path)
    loaded = VQDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded("a red apple", output="text_zh", generator=generators(0)).texts == zh.texts
    assert loaded.config.lowres_factor == 2


def test_texts_take_a_step_a_code_and_the_likeliest_where_something_is_given(pipe, monkeypatch):
    seen = []
    step = MaskedDiffusionScheduler.step
    monkeypatch.setattr(
        MaskedDiffusionScheduler, "step", lambda *a, **k: seen.append(k["temperature"]) or step(*a, **k)
    )
    pipe(image=picture())
    assert seen == [0.0] * 12
    for arguments, expected in (({"output": "text"}, None), ({"prompt": "x", "temperature": 0.3}, 0.3)):
        seen.clear()
        pipe(num_inference_steps=2, **arguments)
        assert seen == [expected] * 2
    seen.clear()
    pipe("a dot")
    assert seen == [None] * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": picture(), "mask_image": hole(), "strength": 0.5}, "not both"),
        ({"image": picture(), "strength": 0}, r"strength=0 must be a finite number in \(0, 1\]"),
        ({"image": picture(), "strength": "0.5"}, "strength='0.5'"),
        ({"mask_image": hole()}, "mask_image needs image"),
        ({"image": picture(), "mask_image": hole(), "output": "text"}, "got output='text'"),
        ({"image": [picture()] * 3, "mask_image": [hole()] * 2}, "2 masks for 3 pictures"),
        (
            {"image": [picture(), picture((9, 9))], "mask_image": hole()},
            r"one size here, got \[\(9, 9\), \(16, 16\)\]",
        ),
        ({"image": picture(), "mask_image": hole(), "latents": torch.full((1, 4, 4), 32)}, "partly known"),
        ({"prompt": "a <mask>", "output": "image"}, "<mask>, which is for what is to be filled in"),
        ({"prompt": "a dot", "output": "text"}, "Put <mask>"),
        ({"prompt": "a dot", "temperature": -1}, "temperature=-1 must be a finite number in .0, "),
        ({"inputs": {"text": "a dot"}}, "inputs has 'text'; it takes .*; 'text' is passed as prompt$"),
        ({"inputs": {"label": 0}}, "; 'label' is passed as class_labels$"),
        ({"inputs": {"sound": "a dot"}}, "inputs has 'sound'"),
        ({"inputs": ["a dot"]}, "inputs must be a dict"),
        ({"inputs": {"text_zh": []}, "output": "text"}, r"text_zh=\[\] is an empty list"),
        ({"image": picture((20, 20)), "inputs": {"image_lowres": picture()}, "output": "image"}, "which you passed"),
        ({"inputs": {"image_lowres": picture((20, 20))}, "output": "text"}, "tiles"),
        ({"prompt": ["a", "b"], "image": picture(), "mask_image": hole()}, "one batch size"),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_checkpoint_without_low_resolution_says_what_to_give(pipeline):
    with pytest.raises(ValueError, match="give mask_image to repaint a part or strength"):
        pipeline(image=picture(), output="image")
