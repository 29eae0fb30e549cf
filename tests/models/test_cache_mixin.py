"""``enable_cache`` as pipelines meet it: off it is not there; on, a row is as alone, and a call has its own."""

import threading

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import MagCacheConfig

from diffusers_vqdit import GenerationCacheConfig, MaskedDiffusionScheduler, VQDiTTransformer2DModel


SAMPLERS = [
    {"sampler": "ancestral"},
    {"sampler": "ancestral", "remask": 0.3},
    {"sampler": "confidence"},
    {"sampler": "entropy_bound", "entropy_bound": 2.0},
    {"sampler": "threshold", "threshold": 0.1},
]
PROMPTS = ["a red apple", "a blue box", "红苹果"]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipeline, rows=(0, 1, 2), **options):
    latents = torch.full((3, 4, 4), 32)
    latents[1, 1:] = 7
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 8, **options}
    return pipeline(
        [PROMPTS[row] for row in rows],
        latents=latents[list(rows)],
        generator=generators(*rows),
        output_type="latent",
        **arguments,
    ).images


@pytest.fixture
def passes(pipeline, monkeypatch):
    """The cache that each call of the transformer had."""
    seen, forward = [], pipeline.transformer.forward
    monkeypatch.setattr(
        pipeline.transformer, "forward", lambda *a, **k: seen.append(k.get("cache")) or forward(*a, **k)
    )
    return seen


@pytest.mark.parametrize("options", SAMPLERS)
def test_a_cache_of_one_call_is_none_bit_for_bit(pipeline, passes, options):
    pipeline.scheduler = MaskedDiffusionScheduler(**options)
    plain = draw(pipeline)
    assert not any(passes)
    pipeline.transformer.enable_cache(GenerationCacheConfig(refresh_interval=1))
    passes.clear()
    assert torch.equal(draw(pipeline), plain)
    assert passes and all(passes) and len(set(map(id, passes))) == 1
    pipeline.transformer.disable_cache()
    passes.clear()
    assert torch.equal(draw(pipeline), plain) and not any(passes)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("options", SAMPLERS)
def test_with_a_cache_a_row_is_as_alone_and_known_codes_stay(pipeline, options, ratio):
    pipeline.scheduler = MaskedDiffusionScheduler(**options)
    pipeline.transformer.enable_cache(GenerationCacheConfig(refresh_interval=3, cache_ratio=ratio))
    batch = draw(pipeline)
    assert batch.max() < 32 and (batch[1, 1:] == 7).all()
    for row in range(3):
        assert torch.equal(draw(pipeline, [row])[0], batch[row])
    both = pipeline(output="image+text", num_inference_steps=6, output_type="latent")
    assert both.images.max() < 32 and both.texts.max() < 64
    assert (draw(pipeline, guidance_scale=1.0) < 32).all()
    seen = []  # a callback that changes codes
    pipeline(
        PROMPTS,
        num_inference_steps=6,
        callback_on_step_end=lambda pipe, i, t, inputs: seen.append(i) or {"latents": inputs["latents"].roll(1, 1)},
    )
    assert seen == list(range(6))


def test_with_a_cache_guidance_that_rises_is_each_rows_own(make_pipeline):
    """A row that is wholly masked has no guidance yet, whatever the others of its batch have."""
    for seed in range(3):
        pipeline = make_pipeline(seed)
        for parameter in pipeline.transformer.parameters():
            parameter.data *= 3.0
        pipeline.scheduler = MaskedDiffusionScheduler(guidance_schedule="linear")
        plain = draw(pipeline, guidance_scale=4.0)
        pipeline.transformer.enable_cache(GenerationCacheConfig(refresh_interval=1))
        assert torch.equal(draw(pipeline, guidance_scale=4.0), plain)
        pipeline.transformer.disable_cache()
        pipeline.transformer.enable_cache(GenerationCacheConfig(refresh_interval=3, cache_ratio=0.5))
        batch = draw(pipeline, guidance_scale=4.0)
        for row in range(3):
            assert torch.equal(draw(pipeline, [row], guidance_scale=4.0)[0], batch[row])


def test_calls_of_several_threads_have_caches_of_their_own(pipeline):
    pipeline.transformer.enable_cache(GenerationCacheConfig(refresh_interval=3, cache_ratio=0.5))
    alone, found = [draw(pipeline, [row]) for row in range(3)], {}
    threads = [
        threading.Thread(target=lambda r=row: found.update({r: [draw(pipeline, [r]) for _ in range(3)]}))
        for row in range(3)
    ]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(torch.equal(one, alone[row]) for row in range(3) for one in found[row])


def test_only_caches_that_the_model_takes_are_enabled(pipeline, tmp_path):
    model = pipeline.transformer
    for config in (FirstBlockCacheConfig(), TaylorSeerCacheConfig(), {"refresh_interval": 2}, None, "yes"):
        with pytest.raises(ValueError, match="must be one of .'GenerationCacheConfig'. for a model with segments"):
            model.enable_cache(config)
    assert not model.is_cache_enabled and model.new_cache() is None
    model.enable_cache(GenerationCacheConfig())
    with pytest.raises(ValueError, match="enabled already; call disable_cache"):
        model.enable_cache(GenerationCacheConfig())
    model.save_pretrained(tmp_path)
    assert not VQDiTTransformer2DModel.from_pretrained(tmp_path).is_cache_enabled
    model.disable_cache()
    assert not model.is_cache_enabled


# ---------------------------------------------------------------------------------------------------------------------
# Diffusers' own, for the denoiser of latents


def draw_latents(pipeline, seed=0, **options):
    arguments = {"num_inference_steps": 12, "guidance_scale": 3.0, "output_type": "latent", **options}
    return pipeline(["a red apple", "a blue box"], generator=generators(seed, seed + 1), **arguments).images


CALLS = [{}, {"guidance_scale": 1.0}, {"prompt": None, "class_labels": [0, 2]}]
CACHES = [
    FirstBlockCacheConfig(threshold=0.3),
    TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, max_order=1),
    TaylorSeerCacheConfig(cache_interval=3, cache_identifiers=[r"transformer_blocks\.\d+"]),
]


def latents_of(pipeline, call, seed=0):
    if "class_labels" not in call:
        return draw_latents(pipeline, seed, **call)
    arguments = {"num_inference_steps": 12, "guidance_scale": 3.0, "output_type": "latent"}
    return pipeline(class_labels=call["class_labels"], generator=generators(seed, seed + 1), **arguments).images


@pytest.fixture
def blocks(latent_pipeline, monkeypatch):
    """How often the second block's feed-forward is computed."""
    latent_pipeline.transformer.register_to_config(num_layers=2)
    seen, layer = [], latent_pipeline.transformer.transformer_blocks[1].ff.net[2]
    layer.register_forward_hook(lambda *a: seen.append(1))
    return seen


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("config", CACHES, ids=["first block", "TaylorSeer", "TaylorSeer blocks"])
def test_diffusers_caches_skip_blocks_and_leave_nothing_behind(latent_pipeline, blocks, config, call):
    model = latent_pipeline.transformer
    plain, all_blocks = latents_of(latent_pipeline, call), len(blocks)
    model.enable_cache(config)
    assert model.is_cache_enabled
    blocks.clear()
    cached = latents_of(latent_pipeline, call)
    assert 0 < len(blocks) < all_blocks
    assert cached.isfinite().all() and not torch.equal(cached, plain)
    assert torch.equal(latents_of(latent_pipeline, call), cached)  # nothing of the call before
    other = latents_of(latent_pipeline, call, seed=7)
    found = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: latents_of(latent_pipeline, call, seed=s)}))
        for seed in (0, 7)
    ]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert torch.equal(found[0], cached) and torch.equal(found[7], other)
    nested = []
    latent_pipeline(
        "a red apple",
        num_inference_steps=2,
        callback_on_step_end=lambda *a: nested.append(latents_of(latent_pipeline, call)) or {},
    )
    assert all(torch.equal(one, cached) for one in nested) and len(nested) == 2
    model.disable_cache()
    blocks.clear()
    assert torch.equal(latents_of(latent_pipeline, call), plain) and len(blocks) == all_blocks


def test_a_first_block_cache_that_reuses_nothing_changes_nothing(latent_pipeline):
    plain = draw_latents(latent_pipeline)
    latent_pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(draw_latents(latent_pipeline), plain)


def test_a_call_that_fails_leaves_no_state(latent_pipeline):
    latent_pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    cached = draw_latents(latent_pipeline)

    def fail(*args):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        draw_latents(latent_pipeline, 5, callback_on_step_end=fail)
    assert torch.equal(draw_latents(latent_pipeline), cached)


def test_caches_that_the_denoiser_of_latents_does_not_take_are_refused(latent_pipeline):
    model = latent_pipeline.transformer
    for config in (PyramidAttentionBroadcastConfig(), MagCacheConfig(calibrate=True), GenerationCacheConfig(), None):
        with pytest.raises(ValueError, match="'FirstBlockCacheConfig', 'TaylorSeerCacheConfig'. .* segments=None"):
            model.enable_cache(config)
    with pytest.raises(ValueError, match="use_lite_mode=True needs"):
        model.enable_cache(TaylorSeerCacheConfig(use_lite_mode=True))
    assert not model.is_cache_enabled
