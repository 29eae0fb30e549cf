"""What each sampler of the scheduler means for a pipeline: calls of the model, known codes, rows, guidance."""

import pytest
import torch

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel


SAMPLERS = [
    {"sampler": "ancestral"},
    {"sampler": "ancestral", "remask": 0.3},
    {"sampler": "confidence"},
    {"sampler": "halton"},
    {"sampler": "entropy_bound", "entropy_bound": 2.0},
    {"sampler": "threshold", "threshold": 0.1},
]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def calls(pipeline, monkeypatch):
    """The keyword arguments of each call of the transformer."""
    made = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *a, **k: made.append(k) or forward(*a, **k))
    return made


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("options", SAMPLERS)
def test_every_sampler_draws_a_row_as_alone_and_keeps_known_codes(pipeline, options, schedule):
    pipeline.scheduler = MaskedDiffusionScheduler(guidance_schedule=schedule, **options)
    prompts = ["a red apple", "a blue box", "红苹果"]
    latents = torch.randint(32, (3, 4, 4))
    latents[0], latents[1, 1:3] = 32, 32  # nothing is known, half is, all is
    arguments = {"output_type": "latent", "num_inference_steps": 6, "guidance_scale": 2.0}
    batch = pipeline(prompts, latents=latents, generator=generators(1, 2, 3), **arguments).images
    assert batch.max() < 32 and torch.equal(batch[latents < 32], latents[latents < 32])
    for row, prompt in enumerate(prompts):
        alone = pipeline(prompt, latents=latents[row : row + 1], generator=generators(row + 1), **arguments).images
        assert torch.equal(alone[0], batch[row])


@pytest.mark.parametrize("options", SAMPLERS)
def test_every_sampler_generates_several_segments_at_once(pipeline, options):
    pipeline.scheduler = MaskedDiffusionScheduler(**options)
    arguments = {"output": "image+text", "output_type": "latent", "num_inference_steps": 5}
    batch = pipeline(num_images_per_prompt=2, generator=generators(1, 2), **arguments)
    alone = pipeline(generator=generators(2), **arguments)
    assert batch.images.max() < 32 and batch.texts.max() < 64
    assert torch.equal(batch.images[1], alone.images[0]) and torch.equal(batch.texts[1], alone.texts[0])


def test_event_driven_sampling_of_a_thousand_steps_calls_the_model_once_a_code_at_most(pipeline, calls):
    pipeline.scheduler = MaskedDiffusionScheduler(sampler="ancestral")
    steps = []
    codes = pipeline(
        ["a red apple", "a blue box", "红苹果"],
        guidance_scale=1.0,
        num_inference_steps=1000,
        generator=generators(1, 2, 3),
        output_type="latent",
        callback_on_step_end=lambda pipe, index, timestep, inputs: steps.append(index),
    ).images
    assert codes.max() < 32
    assert 13 <= len(calls) <= 16  # of 16 codes, some may share a step
    assert steps == list(range(1000))
    calls.clear()
    pipeline(output="image+text", num_inference_steps=1000)
    assert 24 <= len(calls) <= 28


@pytest.mark.parametrize("options", SAMPLERS)
def test_the_model_is_called_for_rows_that_have_masks(pipeline, options, monkeypatch):
    pipeline.scheduler = MaskedDiffusionScheduler(**options)
    latents = torch.full((3, 4, 4), 32)
    latents[1, 1:], latents[2] = 7, 7  # sixteen to draw, four, none
    rows, forward = [], pipeline.transformer.forward

    def counted(codes, **options):
        left = (codes["image"] == 32).flatten(1).any(1)
        rows.append((len(left), int(left.sum())))
        return forward(codes, **options)

    monkeypatch.setattr(pipeline.transformer, "forward", counted)
    prompts = ["a red apple", "a blue box", "红苹果"]
    pipeline(prompts, latents=latents, num_inference_steps=12, generator=generators(1, 2, 3))
    if options.get("remask"):
        assert {size for size, _ in rows} == {3}  # any row may get masks again
    else:
        assert all(size == left for size, left in rows) and rows[0] == (2, 2)
        assert len(rows) == 1 or rows[-1] == (1, 1)  # the second is done before the first


@pytest.mark.parametrize("options", SAMPLERS[-2:])
def test_auto_draws_a_row_as_alone_and_ends_when_all_are_done(pipeline, options, calls):
    pipeline.scheduler = MaskedDiffusionScheduler(**options)
    latents = torch.full((3, 4, 4), 32)
    latents[1, 1:], latents[2] = 7, 7  # sixteen to draw, four, none
    prompts, steps = ["a red apple", "a blue box", "红苹果"], []
    arguments = {"output_type": "latent", "num_inference_steps": "auto", "guidance_scale": 2.0}

    def note(pipe, index, timestep, inputs):
        steps.append((index, pipe.num_timesteps))

    batch = pipeline(prompts, latents=latents, generator=generators(1, 2, 3), **arguments, callback_on_step_end=note)
    assert batch.images.max() < 32 and torch.equal(batch.images[latents < 32], latents[latents < 32])
    assert steps == [(index, 16) for index in range(len(calls))] and 1 <= len(calls) <= 16
    for row, prompt in enumerate(prompts):
        calls.clear()
        alone = pipeline(prompt, latents=latents[row : row + 1], generator=generators(row + 1), **arguments).images
        assert torch.equal(alone[0], batch.images[row]) and len(calls) <= (16, 4, 0)[row]
    calls.clear()
    both = pipeline(output="image+text", num_inference_steps="auto", output_type="latent")
    assert both.images.max() < 32 and both.texts.max() < 64 and len(calls) <= 16


@pytest.mark.parametrize("value", ["fast", "AUTO", "", "4"])
def test_no_other_word_is_a_number_of_steps(pipeline, value):
    pipeline.scheduler = MaskedDiffusionScheduler(sampler="threshold")
    with pytest.raises(ValueError, match=f"num_inference_steps='{value}' must be one of .'auto'"):
        pipeline("a red apple", num_inference_steps=value)
    pipeline.scheduler = MaskedDiffusionScheduler()
    with pytest.raises(ValueError, match="'auto' needs one of the samplers"):
        pipeline("a red apple", num_inference_steps="auto")


def test_an_interrupted_run_has_a_prediction_for_rows_that_left(pipeline):
    latents = torch.full((2, 4, 4), 32)
    latents[1, 1:] = 7

    def stop(pipe, index, timestep, inputs):
        pipe._interrupt = index == 8
        return {}

    options = {"num_inference_steps": 12, "output_type": "latent"}
    stopped = {"callback_on_step_end": stop, "generator": generators(1, 2), **options}
    both = pipeline(["a red apple", "a blue box"], latents=latents, **stopped).images
    alone = pipeline("a blue box", latents=latents[1:], generator=generators(2), **options).images
    assert torch.equal(both[1], alone[0])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("options", SAMPLERS)
def test_guidance_one_is_none_exactly_and_one_call_a_step(pipeline, calls, options, schedule):
    arguments = {"generator": generators(4), "output_type": "latent", "num_inference_steps": 5}
    pipeline.scheduler = MaskedDiffusionScheduler(guidance_schedule=schedule, **options)
    one = pipeline("a red apple", guidance_scale=1.0, **arguments).images
    assert len(calls) <= 5 and not any(call["with_unconditional"] for call in calls)
    # A checkpoint that doesn't know the unconditional task can't be guided at all.
    pipeline.transformer.register_to_config(tasks=["text->image"])
    arguments["generator"] = generators(4)
    assert torch.equal(pipeline("a red apple", **arguments).images, one)


def test_the_guidance_schedule_goes_by_the_share_of_masks_of_each_row(pipeline, calls, monkeypatch):
    pipeline.scheduler = MaskedDiffusionScheduler(guidance_schedule="linear", masking="linear")
    seen = []
    step = MaskedDiffusionScheduler.step
    monkeypatch.setattr(
        MaskedDiffusionScheduler, "step", lambda *a, **k: seen.append((a[1], a[3])) or step(*a, **k), raising=True
    )
    latents = torch.full((2, 4, 4), 32)
    latents[1, :2] = 7
    prompts = ["a red apple", "a blue box"]
    pipeline(prompts, guidance_scale=3.0, num_inference_steps=4, latents=latents)
    assert len(calls) == 4 and all(call["with_unconditional"] for call in calls)
    given = {"text": pipeline.encode_prompt(prompts)}
    for index, (logits, sample) in enumerate(seen):
        codes = {"image": sample.view(2, 4, 4)}
        with torch.no_grad():
            conditional = pipeline.transformer(codes, given=given).sample["image"]
            free = pipeline.transformer(codes).sample["image"]
        # 3 at no masks, 1 at all
        scale = torch.tensor([1 + 2 * index / 4, 1 + 2 * (0.5 + index / 8)])[:, None, None]
        torch.testing.assert_close(logits, free + scale * (conditional - free), rtol=1e-4, atol=1e-4)
    calls.clear()
    pipeline("a red apple", guidance_scale=3.0, num_inference_steps=4)
    # All masked, the scale is 1: the first step needs no unconditional half.
    assert [call["with_unconditional"] for call in calls] == [False, True, True, True]


@pytest.mark.parametrize("sampler", ["ancestral", "entropy_bound", "threshold", "halton"])
def test_a_time_conditioned_model_gets_each_rows_time(pipeline, sampler, monkeypatch):
    model = VQDiTTransformer2DModel.from_config(pipeline.transformer.config, time_conditioned=True).eval()
    scheduler = MaskedDiffusionScheduler(sampler=sampler)
    timed = VQDiTPipeline(model, scheduler, pipeline.image_vq, pipeline.text_vq, pipeline.tokenizer)
    timed.set_progress_bar_config(disable=True)
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda codes, timestep, **k: seen.append((codes["image"], timestep)) or forward(codes, timestep=timestep, **k),
    )
    timed(["a red apple", "a blue box"], guidance_scale=1.0, num_inference_steps=64, generator=generators(1, 2))
    seen = [(codes, timestep) for codes, timestep in seen if len(timestep) == 2]  # before a row has left
    times = torch.stack([timestep for _, timestep in seen])  # (calls, B)
    assert scheduler.timesteps is None  # the call had its own
    scheduler.set_timesteps(64)
    if sampler == "halton":
        assert torch.equal(times, scheduler.timesteps[: len(times), None].expand(-1, 2))
    elif sampler == "ancestral":
        assert not torch.equal(times[:, 0], times[:, 1])  # each row is at its own
        assert torch.isin(times, scheduler.timesteps).all()
    else:
        shares = torch.stack([(codes == 32).float().mean((1, 2)) for codes, _ in seen])
        torch.testing.assert_close(scheduler.mask_ratio(times), shares)
