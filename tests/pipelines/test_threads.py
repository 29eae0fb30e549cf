"""One pipeline in several threads: each call has its own state, and gives what it gives alone."""

import copy
import threading

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_vqdit import MaskedDiffusionScheduler


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
MASK = Image.fromarray(np.repeat(np.repeat(np.eye(2, dtype=np.uint8) * 255, 8, 0), 8, 1))


def in_threads(calls):
    """The results of calls made at the same time, three times over."""
    results = [None] * 3 * len(calls)
    ready = threading.Barrier(len(results))

    def run(index):
        ready.wait()
        try:
            results[index] = calls[index % len(calls)]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return one == other


def check(calls, scheduler):
    before = copy.deepcopy(scheduler.__dict__)
    alone = [call() for call in calls]
    for index, result in enumerate(in_threads(calls)):
        assert equal(result, alone[index % len(calls)]), (index % len(calls), result)
    assert set(scheduler.__dict__) == set(before)
    assert all(equal(value, before[name]) for name, value in scheduler.__dict__.items() if name != "_internal_dict")


def seed(index):
    return torch.Generator().manual_seed(index)


@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ancestral"}, {"sampler": "halton", "guidance_schedule": "linear"}]
)
def test_calls_over_codes(pipeline, options):
    pipeline.scheduler = MaskedDiffusionScheduler(**options)
    pt = {"output_type": "pt"}
    calls = [
        lambda: pipeline(class_label=1, num_inference_steps=3, guidance_scale=2.0, generator=seed(0), **pt).images,
        lambda: pipeline(class_label=2, num_inference_steps=11, guidance_scale=1.0, generator=seed(1), **pt).images,
        lambda: pipeline(class_label=0, num_inference_steps=7, guidance_scale=9.0, generator=seed(2), **pt).images,
        lambda: pipeline(output="image+text", num_inference_steps=5, generator=seed(3), output_type="latent").texts,
        lambda: pipeline(image=PICTURE, mask_image=MASK, num_inference_steps=4, generator=seed(4), **pt).images,
        lambda: pipeline(image=PICTURE, output_type="latent", generator=seed(5)).texts,
        lambda: pipeline.classify(image=PICTURE).probabilities,
        lambda: pipeline.score("->image", image=PICTURE, num_samples=4, generator=seed(6)).nll,
    ]
    check(calls, pipeline.scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(), DDPMScheduler(), DPMSolverMultistepScheduler(), FlowMatchEulerDiscreteScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_calls_over_latents(latent_pipeline, scheduler):
    pipe = latent_pipeline
    pipe.scheduler = scheduler
    pt = {"output_type": "pt"}
    calls = [
        lambda: pipe(class_labels=0, num_inference_steps=3, guidance_scale=2.0, generator=seed(0), **pt).images,
        lambda: pipe(class_labels=1, num_inference_steps=9, guidance_scale=1.0, generator=seed(1), **pt).images,
        lambda: pipe(class_labels=2, num_inference_steps=6, guidance_scale=7.0, generator=seed(2), **pt).images,
        lambda: pipe(num_inference_steps=4, generator=seed(3), output_type="latent").images,
        lambda: pipe(class_labels=0, image=PICTURE, strength=0.5, generator=seed(4), **pt).images,
        lambda: pipe(class_labels=[0, 1], num_inference_steps=8, height=24, generator=seed(5), **pt).images,
        lambda: pipe(image=PICTURE, mask_image=MASK, num_inference_steps=5, generator=seed(6), **pt).images,
        lambda: np.asarray(pipe(num_inference_steps=2, generator=seed(7)).images[0]).tolist(),
    ]
    check(calls, scheduler)


# ---------------------------------------------------------------------------------------------------------------------
# Calls in the callback of another


def nested_calls(pipe, given, interrupted, depth):
    """The samples of a call in whose callback others run, and of a call without; and what it told of itself."""
    inner, told = [], []

    def call(level, **more):
        return pipe(
            **given,
            **more,
            num_inference_steps=4 + level,
            guidance_scale=2.0 + level,
            generator=seed(level),
            output_type="latent",
        ).images

    def watch(level):
        def callback(pipe, index, timestep, inputs):
            if index == 1 and level < depth:
                inner.append(call(level + 1, callback_on_step_end=watch(level + 1)))
                with pytest.raises(ValueError, match="num_inference_steps"):
                    pipe(**given, num_inference_steps=0)
            told.append((level, pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt))
            if (level, index) in interrupted:
                pipe._interrupt = True
            return inputs

        return callback

    outer = call(0, callback_on_step_end=watch(0))
    alone = [call(level) for level in range(depth + 1)]
    return [outer, *reversed(inner)], alone, told


@pytest.mark.parametrize("kind", ["codes", "latents"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_call_in_the_callback_of_another_is_a_call_of_its_own(pipeline, latent_pipeline, kind, depth):
    pipe, given = (pipeline, {"class_label": 1}) if kind == "codes" else (latent_pipeline, {"class_labels": 1})
    made, alone, told = nested_calls(pipe, given, (), depth)
    assert all(torch.equal(one, other) for one, other in zip(made, alone, strict=True))
    assert {one for one in told} == {(level, 2.0 + level, 4 + level, False) for level in range(depth + 1)}
    assert len(told) == sum(4 + level for level in range(depth + 1))
    # After the last call, which is the outermost.
    assert pipe.guidance_scale == 2.0 + depth and pipe.num_timesteps == 4 + depth


@pytest.mark.parametrize("kind", ["codes", "latents"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_interrupt_ends_the_call_in_whose_callback_it_is_said(pipeline, latent_pipeline, kind, level):
    pipe, given = (pipeline, {"class_label": 1}) if kind == "codes" else (latent_pipeline, {"class_labels": 1})
    made, alone, told = nested_calls(pipe, given, [(level, 1)], 2)
    for other in range(3):
        assert torch.equal(made[other], alone[other]) is (other != level)
        assert sum(one[0] == other for one in told) == (2 if other == level else 4 + other)


@pytest.mark.parametrize("kind", ["codes", "latents"])
def test_an_interrupt_before_or_by_another_thread_ends_the_outer_call_too(pipeline, latent_pipeline, kind):
    pipe, given = (pipeline, {"class_label": 1}) if kind == "codes" else (latent_pipeline, {"class_labels": 1})
    for elsewhere in (False, True):
        steps = []

        def say(pipe=pipe):
            pipe._interrupt = True

        def inner(pipe, index, timestep, inputs, elsewhere=elsewhere, steps=steps):
            if elsewhere and index == 0:
                thread = threading.Thread(target=say)
                thread.start()
                thread.join()
            steps.append(("inner", index))
            return inputs

        def outer(pipe, index, timestep, inputs, elsewhere=elsewhere, inner=inner, steps=steps):
            if not elsewhere:
                pipe._interrupt = True
            pipe(**given, num_inference_steps=3, callback_on_step_end=inner, output_type="latent")
            steps.append(("outer", index))
            return inputs

        pipe(**given, num_inference_steps=3, callback_on_step_end=outer, output_type="latent")
        assert steps == [("inner", index) for index in range(1 if elsewhere else 3)] + [("outer", 0)]
