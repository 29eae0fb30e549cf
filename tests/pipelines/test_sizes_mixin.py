"""Pictures of other sizes and aspect ratios than were trained on, by ``height`` and ``width``."""

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_vqdit import VQDiTPipeline, VQDiTTransformer2DModel


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def factor(pipeline):
    return pipeline.image_vq.downsample_factor


@pytest.mark.parametrize("grid", [(4, 4), (4, 8), (6, 3), (1, 5)])
def test_a_size_is_that_of_latents_of_its_grid_bit_for_bit(pipeline, factor, grid):
    """Which is how another grid could be drawn before; a size left out is the training's."""
    latents = torch.full((2, *grid), 32)
    expected = pipeline(["a red apple", "a blue box"], latents=latents, generator=generators(1, 2)).images
    size = {"height": grid[0] * factor, "width": grid[1] * factor}
    found = pipeline(["a red apple", "a blue box"], generator=generators(1, 2), **size).images
    assert [picture.size for picture in found] == [(size["width"], size["height"])] * 2
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    alone = pipeline("a blue box", generator=generators(2), **size).images[0]
    assert np.array_equal(alone, found[1])
    one = {name: value for name, value in size.items() if grid[name == "width"] != 4}
    assert np.array_equal(pipeline("a blue box", generator=generators(2), **one).images[0], alone)


@pytest.mark.parametrize("output", ["image", "text", "image+text"])
def test_codes_of_another_grid_are_those_of_a_height_and_a_width_alone(pipeline, factor, output):
    """Given ones, and partly known ones; without a size, or with another one, they are refused by name."""
    codes = torch.randint(32, (2, 4, 8))
    codes[:, :, 5:] = 31 if output == "text" else 32
    options = {"output": output, "output_type": "latent", "num_inference_steps": 2, "generator": generators(1, 2)}
    size = {"height": 4 * factor, "width": 8 * factor}
    found = pipeline(image=codes, **size, **options).segments[output.split("+")[-1]]
    assert found.shape[0] == 2
    if output == "image":
        assert torch.equal(found[:, :, :5], codes[:, :, :5])
        plain = {**options, "generator": generators(1, 2), "num_images_per_prompt": 2}
        assert torch.equal(found, pipeline(latents=codes, **plain).images)
    for other in ({}, {"height": 4 * factor}, {"height": 8 * factor, "width": 4 * factor}):
        with pytest.raises(
            ValueError, match=r"^image must be int64 codes of shape .* height and width, got \(2, 4, 8\)"
        ):
            pipeline(image=codes, **other, **options)
    known = codes.clamp_max(31)
    for call in (lambda: pipeline.score("image->text", "a box", known), lambda: pipeline.classify(image=known)):
        with pytest.raises(ValueError, match=r"^image must be int64 codes of shape \('B', 4, 4\), got"):
            call()


def test_a_picture_to_repaint_is_seen_at_the_size_and_comes_out_at_its_own(pipeline, factor):
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 44, 3), dtype=np.uint8))
    mask = np.zeros((20, 44), np.uint8)
    mask[:, 30:] = 255
    shapes = []

    def seen(pipe, index, timestep, inputs):
        shapes.append(tuple(inputs["latents"].shape))

    size = {"height": 4 * factor, "width": 8 * factor}
    found = pipeline(
        image=picture, output="image", mask_image=PIL.Image.fromarray(mask), callback_on_step_end=seen, **size
    ).images[0]
    assert set(shapes) == {(1, 4, 8)} and found.size == picture.size
    assert np.array_equal(np.asarray(found)[:, :30], np.asarray(picture)[:, :30])
    repaired = pipeline(image=picture, output="image", strength=0.3, callback_on_step_end=seen, **size).images[0]
    assert shapes[-1] == (1, 4, 8) and repaired.size == (size["width"], size["height"])


def test_patches_and_several_segments(pipeline, factor):
    segments = {name: dict(segment) for name, segment in pipeline.transformer.config.segments.items()}
    segments["image"]["patch"] = [2, 1]
    for name, segment in segments.items():
        if segment.get("shared_with") == "image":
            segments[name] = {**segment, "patch": [2, 1]}
    config = {**pipeline.transformer.config, "segments": segments}
    patched = VQDiTPipeline(**{**pipeline.components, "transformer": VQDiTTransformer2DModel.from_config(config)})
    patched.set_progress_bar_config(disable=True)
    found = patched(output="image+text", height=6 * factor, width=3 * factor)
    assert found.images[0].size == (3 * factor, 6 * factor) and len(found.texts) == 1
    with pytest.raises(ValueError, match=f"height={5 * factor} must be a multiple of {2 * factor}.*such as"):
        patched("a red apple", height=5 * factor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "height=0 must be"),
        ({"height": 7}, "height=7 must be a multiple of"),
        ({"height": 2**20}, "height=1048576 must be an integer in .* 65536"),
        ({"width": 16.0}, "width=16.0 must be"),
        ({"width": "16"}, "width='16' must be"),
        ({"width": True}, "width=True must be"),
        ({"height": 16, "output": "text"}, "height=16: the task .* generates nothing that has a size"),
        ({"height": 32, "latents": torch.full((1, 4, 4), 32)}, "give one of the two"),
    ],
)
def test_what_does_not_fit_is_named(pipeline, arguments, message):
    given = {"image": PIL.Image.new("RGB", (16, 16))} if arguments.get("output") == "text" else {"prompt": "a box"}
    with pytest.raises(ValueError, match=message):
        pipeline(**given, **arguments)
