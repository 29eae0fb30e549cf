"""Guidance of each given segment on its own: its laws, what it needs, and what it costs."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.guidance import guidance_steps, join_logits


GEOMETRY = {
    "image": {"vocab_size": 32, "shape": [4, 4]},
    "source": {"vocab_size": 32, "shape": [4, 4], "shared_with": "image"},
    "text": {"vocab_size": 64, "shape": [12]},
}
TASKS = ["->image", "source->image", "source+text->image", "text->image"]
SAMPLERS = [{"sampler": "ancestral"}, {"sampler": "confidence"}, {"sampler": "threshold", "threshold": 0.1}]
PICTURES = [
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)) for number in range(3)
]
PROMPTS = ["a red apple", "a blue box", "green"]


def make(image_vq, text_vq, tokenizer, tasks):
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, segments=GEOMETRY, tasks=tasks
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    scheduler, entries = MaskedDiffusionScheduler(), {"source": {"modality": "image"}}
    pipe = VQDiTPipeline(transformer.eval(), scheduler, image_vq, text_vq, tokenizer, segments=entries)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def build(image_vq, text_vq, tokenizer):
    return lambda tasks=TASKS: make(image_vq, text_vq, tokenizer, tasks)


@pytest.fixture
def pipe(build):
    return build()


def draw(pipe, *scales, rows=slice(0, 3), **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)][rows]
    guidance = scales[0] if len(scales) == 1 else dict(zip(("source", "text"), scales, strict=True))
    options = {"guidance_scale": guidance, "num_inference_steps": 6, "output_type": "latent", **options}
    return pipe(
        PROMPTS[rows], inputs={"source": PICTURES[rows]}, output="image", generator=generators, **options
    ).images


def test_steps_leave_out_what_is_taken_away_again():
    def steps(**scales):
        return guidance_steps(sorted(scales), scales)

    for one in (3.0, 0.0, -1.0):
        assert guidance_steps(("a", "b"), one) == ([(), ("a", "b")], [one]) == steps(a=one, b=one)
        assert steps(b=one, a=1.0) == ([(), ("b",), ("b", "a")], [one, 1.0])
        assert steps(b=1.0, a=one) == ([("b",), ("b", "a")], [one])
    assert guidance_steps(("a", "b"), 1.0) == ([("a", "b")], []) == steps(a=1.0, b=1.0)
    assert guidance_steps((), 1.0) == ([()], [])
    assert steps(a=2.0, b=2.0, c=3.0) == ([(), ("a", "b"), ("a", "b", "c")], [2.0, 3.0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_logits_are_joined_step_by_step(count):
    parts = torch.randn(count + 1, 5, 7, 9, dtype=torch.float64)
    scales = [4.0 * torch.rand(5, dtype=torch.float64) - 1.0 for _ in range(count)]
    for scale in scales:
        scale[1] = 1.0
    expected = parts[0].clone()
    for (less, more), scale in zip(itertools.pairwise(parts), scales, strict=True):
        expected += scale[:, None, None] * (more - less)
    found = join_logits(parts[-1], list(parts[:-1]), scales)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert torch.equal(found[1], parts[-1][1])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("options", SAMPLERS)
def test_laws_of_scales(pipe, options, schedule):
    pipe.scheduler = MaskedDiffusionScheduler(guidance_schedule=schedule, **options)
    none = draw(pipe, 1.0)
    assert torch.equal(draw(pipe, 1.0, 1.0), none) and torch.equal(draw(pipe, 1.0, image_guidance_scale=1), none)
    one = draw(pipe, 3.0)
    assert torch.equal(draw(pipe, 3.0, 3.0), one) and not torch.equal(one, none)
    two = draw(pipe, 1.5, 6.0)
    assert torch.equal(draw(pipe, 6.0, image_guidance_scale=1.5), two) and not torch.equal(two, one)
    assert torch.equal(draw(pipe, {"text": 6.0, "source": 1.5}), two)  # pictures first
    for row in range(3):
        assert torch.equal(draw(pipe, 1.5, 6.0, rows=slice(row, row + 1))[0], two[row])
    latents = torch.randint(33, (3, 4, 4))
    known = draw(pipe, 1.5, 6.0, latents=latents)
    assert torch.equal(known[latents < 32], latents[latents < 32])


def test_the_first_step_follows_the_formula(pipe):
    """With one step and the likeliest codes, those of logits computed apart."""
    found = draw(pipe, -200.0, 2.0, num_inference_steps=1, temperature=0.0)
    given = {"source": pipe.encode_image(PICTURES, "source"), "text": pipe.encode_prompt(PROMPTS)}
    masks = {"image": torch.full((3, 4, 4), 32)}
    with torch.no_grad():
        u, i, t = (
            pipe.transformer(masks, given={name: given[name] for name in names}).sample["image"]
            for names in ((), ("source",), ("source", "text"))
        )
    assert torch.equal(found.flatten(1), (u - 200.0 * (i - u) + 2.0 * (t - i)).argmax(-1))
    assert not torch.equal(found.flatten(1), t.argmax(-1))


def test_each_sample_of_a_prompt_has_its_own_parts(pipe):
    options = {"guidance_scale": {"source": 1.5, "text": 6.0}, "num_inference_steps": 4, "output_type": "latent"}
    given = {"prompt": PROMPTS[:2], "inputs": {"source": PICTURES[:2]}, "output": "image"}
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    every = pipe(**given, num_images_per_prompt=2, generator=generators, **options).images
    given = {"prompt": PROMPTS[1], "inputs": {"source": PICTURES[1]}, "output": "image"}
    alone = pipe(**given, generator=torch.Generator().manual_seed(2), **options).images
    assert torch.equal(every[2], alone[0])


@pytest.mark.parametrize(
    "scales, passes, prefixes",
    [((1.0, 1.0), 1, 1), ((3.0, 3.0), 1, 1), ((1.5, 6.0), 2, 2), ((1.0, 6.0), 2, 2), ((6.0, 1.0), 2, 2)],
)
def test_what_guidance_costs(pipe, monkeypatch, scales, passes, prefixes):
    made = {"forward": 0, "encode_prefix": 0}
    for name in made:
        method = getattr(pipe.transformer, name)

        def counted(*args, name=name, method=method, **options):
            made[name] += 1
            return method(*args, **options)

        monkeypatch.setattr(pipe.transformer, name, counted)
    pipe.scheduler = MaskedDiffusionScheduler(sampler="confidence")
    draw(pipe, *scales, num_inference_steps=5)
    assert made == {"forward": 5 * passes, "encode_prefix": prefixes}
    made["forward"] = 0
    pipe.scheduler = MaskedDiffusionScheduler(sampler="ancestral")
    draw(pipe, *scales, num_inference_steps=1000, rows=slice(0, 1))
    assert made["forward"] <= 16 * passes  # a code is revealed at each call


def test_tasks_that_scales_need(build):
    def refused(tasks, *scales, **options):
        with pytest.raises(ValueError) as error:
            draw(build(tasks), *scales, **options)
        return str(error.value)

    alone = ["source+text->image"]
    assert "needs the task '->image'" in refused(alone, 3.0)
    assert "needs the tasks ['->image', 'source->image'], of which this checkpoint doesn't know ['source->image']" in (
        refused([*alone, "->image"], 1.5, 6.0)
    )
    both = "needs the tasks ['->image', 'source->image'], which this checkpoint doesn't know; it knows ["
    assert both in refused(alone, 6.0, image_guidance_scale=1.5)
    draw(build([*alone, "source->image"]), 1.0, 6.0)  # nothing is taken away whole
    draw(build([*alone, "->image"]), 3.0, 3.0)
    draw(build(alone), 1.0, 1.0)
    for scales in ((1.5, 6.0), (1.0, 6.0), (6.0, 1.0)):
        assert "one scale of all" in refused(TASKS, *scales, negative_prompt="red")
    assert "must have a scale of each given segment" in refused(TASKS, {"source": 2.0})
    assert "must have a scale of each given segment" in refused(TASKS, {"source": 2.0, "text": 1.0, "image": 1.0})
    assert "guidance_scale['text']=nan" in refused(TASKS, 1.0, float("nan"))
    assert "image_guidance_scale='2'" in refused(TASKS, 1.0, image_guidance_scale="2")
    assert "give one of them" in refused(TASKS, 1.0, 2.0, image_guidance_scale=2.0)
    with pytest.raises(ValueError, match="image_guidance_scale=2.0 needs a given picture, and the task 'text->image'"):
        build()("a red apple", image_guidance_scale=2.0)


def test_pictures_alone_are_guided_by_their_scale(pipe):
    options = {"inputs": {"source": PICTURES[0]}, "output": "image", "output_type": "latent", "num_inference_steps": 4}
    one, other = (
        pipe(**options, **{name: 4.0}, generator=torch.Generator().manual_seed(0)).images
        for name in ("guidance_scale", "image_guidance_scale")
    )
    assert torch.equal(one, other)
    for scale in (1.0, 4.0, {"source": 4.0}):
        with pytest.raises(ValueError, match=r"(?s)guidance_scale=.*image_guidance_scale.*give one of the"):
            pipe(**options, guidance_scale=scale, image_guidance_scale=4.0)


def test_a_callback_changes_scales(pipe):
    pipe.scheduler = MaskedDiffusionScheduler(sampler="confidence")
    seen = []

    def cut(pipeline, step, timestep, inputs):
        seen.append(pipeline.guidance_scale)
        pipeline._guidance_scale = 1.0
        return {}

    cut_off = draw(pipe, 1.5, 6.0, callback_on_step_end=cut)
    assert seen == [{"source": 1.5, "text": 6.0}, *[1.0] * 5] and not torch.equal(cut_off, draw(pipe, 1.5, 6.0))

    def other(pipeline, step, timestep, inputs):
        pipeline._guidance_scale = {"text": 2.0, "source": 3.0}
        return {}

    with pytest.raises(ValueError, match=r"guidance_scale needs \['text'\] alone, which it didn't"):
        draw(pipe, 1.5, 6.0, callback_on_step_end=other)
