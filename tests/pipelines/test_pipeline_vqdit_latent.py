"""Gaussian diffusion over latents: the samplers recover a known mixture; what users of diffusers expect holds."""

import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from transformers import BertConfig, BertModel

from diffusers_vqdit import ImageVQModel, VQDiTLatentPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.models.vae_latents import (
    decode_latents,
    encode_latents,
    latent_statistics,
    measure_latents,
    raw_latents,
)
from diffusers_vqdit.pipelines.check_inputs import FiniteChecks


# ---------------------------------------------------------------------------------------------------------------------
# A known distribution

MEANS = torch.tensor([[-1.5, 0.0], [0.5, 1.0], [0.5, -1.5]])
WEIGHTS = torch.tensor([0.5, 0.2, 0.3])
DEVIATION = 0.2


class MixtureDenoiser(VQDiTTransformer2DModel):
    """The exact posterior mean of a Gaussian mixture over latents (B, 2, 1, 1), in every parameterisation.

    Given label k, the mixture has its k-th component only.
    """

    def attach(self, scheduler):
        self.scheduler = scheduler
        return self

    def signal_and_noise(self, times):
        config = self.scheduler.config
        if config.get("use_flow_sigmas") or hasattr(self.scheduler, "scale_noise"):
            noise = times.double() / 1000
            return 1 - noise, noise
        alphas = torch.linspace(config.beta_start, config.beta_end, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
        # Schedulers may ask between the trained timesteps.
        position = times.double().clamp(0, 999)
        ratio = ((1 - alphas) / alphas).log()
        low, high = position.floor().long(), position.ceil().long()
        ratio = (ratio[low] + (position - low) * (ratio[high] - ratio[low])).exp()
        return (1 / (1 + ratio)).sqrt(), (ratio / (1 + ratio)).sqrt()

    def forward(self, hidden_states, timestep, class_labels, **options):
        x = hidden_states[:, :, 0, 0].double()
        signal, noise = (part[:, None] for part in self.signal_and_noise(timestep))  # (B, 1)
        variance = signal**2 * DEVIATION**2 + noise**2
        difference = x[:, None] - signal[..., None] * MEANS  # (B, 3, 2)
        logits = WEIGHTS.double().log() - difference.square().sum(-1) / (2 * variance)
        known = class_labels < 3
        only = torch.nn.functional.one_hot(class_labels.clamp(max=2), 3).bool()
        posterior = logits.masked_fill(known[:, None] & ~only, -torch.inf).softmax(1)
        gain = signal * DEVIATION**2 / variance
        clean = (posterior[..., None] * (MEANS + gain[..., None] * difference)).sum(1)
        eps = (x - signal * clean) / noise
        kind = self.scheduler.config.get("prediction_type", "flow_prediction")
        output = {"epsilon": eps, "v_prediction": signal * eps - noise * clean, "flow_prediction": eps - clean}[kind]
        return type("Output", (), {"sample": output.float()[:, :, None, None]})


def mixture_pipeline(scheduler):
    vae = ImageVQModel(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, num_vq_embeddings=4)
    denoiser = MixtureDenoiser(
        num_attention_heads=1,
        attention_head_dim=4,
        num_layers=1,
        in_channels=2,
        sample_size=1,
        patch_size=1,
        num_embeds_ada_norm=3,
    ).attach(scheduler)
    pipe = VQDiTLatentPipeline(denoiser, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
V = {**LINEAR, "prediction_type": "v_prediction"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    # name: scheduler, steps, tolerance of the components' deviation
    "ddpm": (DDPMScheduler(**LINEAR, clip_sample=False), 250, 0.03),
    "ddim": (DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=True), 100, 0.03),
    "ddim-v": (DDIMScheduler(**V, clip_sample=False, set_alpha_to_one=True), 100, 0.03),
    "dpmsolver++": (DPMSolverMultistepScheduler(**LINEAR), 50, 0.03),
    "dpmsolver++-karras": (DPMSolverMultistepScheduler(**LINEAR, use_karras_sigmas=True), 50, 0.03),
    "dpmsolver++-flow": (DPMSolverMultistepScheduler(**FLOW), 50, 0.03),
    "dpmsolver++-sde-flow": (DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"), 100, 0.03),
    "unipc": (UniPCMultistepScheduler(**LINEAR), 50, 0.03),
    "unipc-v": (UniPCMultistepScheduler(**V), 50, 0.03),
    "euler": (EulerDiscreteScheduler(**LINEAR), 100, 0.03),
    "euler-v-karras": (EulerDiscreteScheduler(**V, use_karras_sigmas=True), 100, 0.03),
    "heun": (HeunDiscreteScheduler(**LINEAR), 50, 0.03),
    "flow-euler": (FlowMatchEulerDiscreteScheduler(), 100, 0.03),
    "flow-euler-shifted": (FlowMatchEulerDiscreteScheduler(shift=3.0), 100, 0.03),
}


def assigned(samples):
    """Which component (B,) each sample (B, 2) is nearest to."""
    return torch.cdist(samples, MEANS).argmin(1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_sampler_recovers_a_known_mixture(name):
    scheduler, steps, tolerance = SCHEDULERS[name]
    size, generator = 4000, torch.Generator().manual_seed(0)
    output = mixture_pipeline(scheduler)(
        num_images_per_prompt=size, num_inference_steps=steps, generator=generator, output_type="latent"
    )
    samples = output.images[:, :, 0, 0]
    components = assigned(samples)
    for index, mean in enumerate(MEANS):
        own = samples[components == index]
        # Four standard errors of a share are 0.03 and of a mean below 0.03; the rest is the solver's.
        assert len(own) / size == pytest.approx(WEIGHTS[index].item(), abs=0.04)
        torch.testing.assert_close(own.mean(0), mean, atol=0.05, rtol=0)
        torch.testing.assert_close(own.std(0), torch.full((2,), DEVIATION), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["ddim", "flow-euler"])
def test_labels_choose_the_component_and_guidance_one_is_none(name):
    pipe = mixture_pipeline(SCHEDULERS[name][0])
    for label in range(3):
        for scale in (1.0, 3.0):
            generator = torch.Generator().manual_seed(label)
            samples = pipe(
                class_labels=[label] * 200,
                guidance_scale=scale,
                num_inference_steps=50,
                generator=generator,
                output_type="latent",
            ).images[:, :, 0, 0]
            assert (assigned(samples) == label).float().mean() > 0.99
            if scale == 1.0:
                torch.testing.assert_close(samples.mean(0), MEANS[label], atol=0.07, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Real components


def make_transformer(**options):
    model = VQDiTTransformer2DModel(
        **{
            **{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4, "patch_size": 1},
            **{"num_embeds_ada_norm": 3, "caption_channels": 4},
            **options,
        }
    ).share_embedder()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def pipe(image_vq, text_vq, tokenizer):
    image_vq.register_to_config(
        latents_mean=[0.1, 0.2, -0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 0.1], scaling_factor=1.0
    )
    names = {0: "fruit, apple", 1: "box", 2: "dot"}
    pipe = VQDiTLatentPipeline(make_transformer(), image_vq, DDIMScheduler(), text_vq, tokenizer, id2label=names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, *args, **options):
    defaults = {"num_inference_steps": 4, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe(*args, **{**defaults, **options}).images


def test_names_of_labels_that_the_transformer_lacks_are_refused(pipe):
    parts = (pipe.transformer, pipe.vae, pipe.scheduler)
    with pytest.raises(ValueError, match=r"id2label=.* names the label 3; the transformer has 3"):
        VQDiTLatentPipeline(*parts, id2label={2: "dot", 3: "line"})


def test_what_is_cut_is_told_by_its_argument(pipe, caplog):
    for options, argument in ((("a " * 40,), "prompt"), (("a", None, None), "negative_prompt")):
        caplog.clear()
        negative = {"negative_prompt": "a " * 40} if argument == "negative_prompt" else {}
        with caplog.at_level("WARNING", "diffusers_vqdit"):
            draw(pipe, options[0], guidance_scale=2.0, num_inference_steps=1, **negative)
        assert f"1 texts of {argument} have" in caplog.text


def test_each_condition_counts(pipe):
    free = draw(pipe, output_type="latent")
    drawn = {
        "label": draw(pipe, class_labels=1, output_type="latent"),
        "prompt": draw(pipe, "a red apple", output_type="latent"),
        "other prompt": draw(pipe, "a blue box", output_type="latent"),
        "both": draw(pipe, "a red apple", 1, output_type="latent"),
    }
    values = [free, *drawn.values()]
    for index, one in enumerate(values):
        for other in values[:index]:
            assert (one - other).abs().max() > 1e-3
    assert torch.equal(draw(pipe, class_labels="box", output_type="latent"), drawn["label"])
    assert torch.equal(draw(pipe, output_type="latent", guidance_scale=9.0), free)  # nothing to guide by


def test_guidance_is_the_combination_of_two_predictions(pipe):
    latents, time, labels = torch.randn(2, 4, 4, 4), torch.tensor(500), torch.tensor([0, 2])
    prefix = pipe.transformer.encode_caption(*pipe.encode_prompt(["a red apple", "green"]))
    with torch.no_grad():
        for given in (None, prefix):
            guided = pipe._predict(latents, time, labels, given, 2.5, FiniteChecks("prediction is"))
            conditional = pipe.transformer(latents, time, labels, prefix=given).sample
            free = pipe.transformer(latents, time).sample
            torch.testing.assert_close(guided, free + 2.5 * (conditional - free), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        HeunDiscreteScheduler(),
    ],
)
def test_samples_of_a_batch_are_those_drawn_alone(pipe, scheduler):
    pipe.scheduler = scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = {"output_type": "latent", "num_images_per_prompt": 2}
    batch = draw(pipe, ["a red apple", "green"], [0, 2], generator=generators, **options)
    alone = draw(pipe, "green", 2, generator=[torch.Generator().manual_seed(seed) for seed in (2, 3)], **options)
    torch.testing.assert_close(batch[2:], alone, atol=1e-4, rtol=1e-4)


def test_output_types_and_sizes(pipe):
    tensor = draw(pipe, class_labels=[0, 1])
    assert tensor.shape == (2, 3, 16, 16) and 0 <= tensor.min() and tensor.max() <= 1
    array = draw(pipe, class_labels=[0, 1], output_type="np")
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1), atol=1e-6)
    picture = draw(pipe, class_labels=[0, 1], output_type="pil")[1]
    assert abs(np.asarray(picture) / 255 - array[1]).max() < 0.01
    assert draw(pipe, height=16, width=24).shape == (1, 3, 16, 24)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(
        pipe(class_labels=[0, 1], num_inference_steps=4, generator=generator, output_type="pt", return_dict=False)[0],
        tensor,
    )
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(pipe, class_labels=[0, 1], latents=noise), tensor)


def test_decoding_passes_through_the_codebook_or_not(pipe):
    latents = draw(pipe, output_type="latent")
    mean, std = (torch.tensor(pipe.vae.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        codes = pipe.vae.quantize.encode((latents * std + mean).permute(0, 2, 3, 1))
        through = pipe.vae.decode_codes(codes).sample
        direct = pipe.vae.post_quant_conv(latents * std + mean)
        direct = pipe.vae.decoder(direct)
    for image, expected in ((draw(pipe), through), (draw(pipe, force_not_quantize=True), direct)):
        torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert (through - direct).abs().max() > 1e-3


def test_latents_normalised_by_measured_statistics_have_none(image_vq):
    pictures = torch.rand(20, 3, 16, 16) * 2 - 1
    mean, std = measure_latents(raw_latents(image_vq, part) for part in pictures.split(8))
    image_vq.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    latents = encode_latents(image_vq, pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.var((0, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)
    with torch.no_grad():
        expected = image_vq(pictures).sample
    torch.testing.assert_close(decode_latents(image_vq, latents), expected, atol=1e-4, rtol=1e-4)


def test_without_statistics_the_scaling_factor_counts_as_in_diffusers(image_vq):
    mean, std = latent_statistics(image_vq)
    assert mean.item() == 0 and std.item() == pytest.approx(1 / 0.18215)
    image_vq.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match="both or neither"):
        latent_statistics(image_vq)


def test_a_learned_variance_is_used_by_schedulers_that_read_it(pipe, monkeypatch):
    pipe.transformer = make_transformer(out_channels=8)
    seen = []
    for kind in (DDPMScheduler, DDIMScheduler):

        def recorded(self, model_output, *args, step=kind.step, **options):
            seen.append(model_output.shape[1])
            return step(self, model_output, *args, **options)

        recorded.__signature__ = inspect.signature(kind.step)
        monkeypatch.setattr(kind, "step", recorded)
    for scheduler in (DDPMScheduler(variance_type="learned_range"), DDPMScheduler(), DDIMScheduler()):
        pipe.scheduler = scheduler
        assert torch.isfinite(draw(pipe, class_labels=1)).all()
    assert seen == [8] * 4 + [4] * 8


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(), EulerDiscreteScheduler(), DPMSolverMultistepScheduler(), FlowMatchEulerDiscreteScheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_images_change_with_strength_and_outside_a_mask_not_at_all(pipe, scheduler):
    pipe.scheduler = scheduler
    picture = torch.rand(1, 3, 20, 24)
    start = encode_latents(pipe.vae, torch.nn.functional.interpolate(picture * 2 - 1, (16, 16)))
    changes = []
    for strength in (0.1, 0.5, 1.0):
        latents = draw(
            pipe, class_labels=1, image=picture, strength=strength, num_inference_steps=10, output_type="latent"
        )
        changes.append((latents - start).square().mean().item())
    assert changes[0] < changes[1] < changes[2]
    mask = torch.zeros(1, 1, 20, 24)
    mask[..., :8, :10] = 1
    drawn = draw(pipe, "a red apple", image=picture, mask_image=mask)
    assert drawn.shape == picture.shape
    assert torch.equal(drawn[..., 8:, :], picture[..., 8:, :]) and torch.equal(drawn[..., 10:], picture[..., 10:])
    assert (drawn[..., :8, :10] - picture[..., :8, :10]).abs().max() > 0.05


def test_a_transformers_encoder_gives_the_captions(image_vq, tokenizer):
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    encoder = BertModel(config, add_pooling_layer=False).eval()
    pipe = VQDiTLatentPipeline(make_transformer(caption_channels=8), image_vq, DDIMScheduler(), encoder, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    states, mask = pipe.encode_prompt(["a red apple", "green"])
    assert states.shape[2] == 8 and mask[1].sum() < mask.shape[1]
    with pytest.raises(ValueError, match="the text '' has no tokens"):
        draw(pipe, "green", negative_prompt="")
    batch = draw(
        pipe,
        ["a red apple", "green"],
        output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
    )
    alone = draw(pipe, "green", output_type="latent", generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(batch[1:], alone, atol=1e-4, rtol=1e-4)


def test_it_saves_and_loads_as_a_diffusers_pipeline(pipe, tmp_path):
    expected = draw(pipe, "a red apple", "dot")
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is VQDiTLatentPipeline
    assert loaded.labels == {"fruit": 0, "apple": 0, "fruit, apple": 0, "box": 1, "dot": 2}
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded, "a red apple", "dot"), expected, atol=1e-4, rtol=1e-4)


def test_a_saved_dit_pipeline_loads_and_draws_the_same(tmp_path):
    stock = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, patch_size=1, out_channels=8
    ).eval()
    vae = AutoencoderKL(
        norm_num_groups=4,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    theirs = DiTPipeline(stock, vae, DDIMScheduler(), id2label={"7": "cat, kitten"})
    theirs.set_progress_bar_config(disable=True)
    expected = theirs([7], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
    theirs.save_pretrained(tmp_path)
    ours = VQDiTLatentPipeline.from_pretrained(tmp_path, id2label={"7": "cat, kitten"})
    ours.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(ours, class_labels="kitten"), expected, atol=1e-4, rtol=1e-4)


def test_callbacks_see_and_change_the_latents_and_stop(pipe):
    seen = []

    def callback(pipe, step, timestep, inputs):
        seen.append((step, int(timestep)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(inputs["latents"])}

    latents = draw(pipe, output_type="latent", callback_on_step_end=callback)
    assert [step for step, _ in seen] == [0, 1] and not latents.any() and pipe.num_timesteps == 4


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (True, "callback_on_step_end returned True"),
        ({"latents": None}, r"floating-point of shape \(1, 4, 4, 4\), got None"),
        ({"latents": torch.zeros(1, 4, 4, 2)}, r"got torch.float32 of shape \(1, 4, 4, 2\)"),
        ({"latents": torch.zeros(1, 4, 4, 4).long()}, "got torch.int64"),
    ],
)
def test_what_a_callback_returns_is_checked(pipe, returned, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, callback_on_step_end=lambda *_: returned)


def test_what_a_callback_returns_stays_its_own(pipe):
    own = {}
    draw(pipe, callback_on_step_end=lambda pipe, step, time, inputs: own.update(inputs) or own)
    assert own.keys() == {"latents"}


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_a_strength_takes_as_many_steps_as_in_diffusers(pipe, strength, steps):
    options = {"num_inference_steps": steps, "strength": strength, "output_type": "latent"}
    draw(pipe, image=torch.rand(1, 3, 16, 16), guidance_scale=1.0, **options)
    assert pipe.num_timesteps == max(1, int(steps * strength))


@pytest.mark.parametrize("offload", ["layers", "model"])
def test_offloaded_tokenizers_get_and_give_what_is_where_they_compute(pipe, offload):
    """Their own device is another one meanwhile."""
    picture, expected = torch.rand(1, 3, 16, 16), []
    for hooked in (False, True):
        if hooked and offload == "layers":
            cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
        elif hooked:  # the weights stay; its device, as the pipeline sees it, is elsewhere
            pipe.vae.__class__ = type("Elsewhere", (type(pipe.vae),), {"device": torch.device("meta")})
        expected.append(draw(pipe, image=picture, strength=0.5, num_inference_steps=2))
        expected.append(draw(pipe, num_inference_steps=2))
    assert torch.equal(expected[0], expected[2]) and torch.equal(expected[1], expected[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": 3}, r"class_labels=3 must be a number in \[0, 3\) or one of \['fruit', 'apple'"),
        ({"class_labels": "car"}, "class_labels='car'"),
        ({"prompt": ""}, "prompt must be a non-empty string"),
        ({"prompt": ["green", "white"], "class_labels": [0, 1, 2]}, "one batch size"),
        ({"prompt": []}, r"prompt=\[\] is an empty list"),
        ({"mask_image": Image.new("L", (16, 16))}, "mask_image needs an image"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 0.0}, r"strength=0.0 must be a finite number in \(0, 1\]"),
        ({"image": []}, r"image=\[\] is an empty list"),
        ({"height": 18}, "height=18 must be a multiple of 4"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"output_type": "jpg"}, "output_type='jpg'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"generator": [torch.Generator()] * 2}, "generator is a list of 2, but 1 samples"),
        ({"latents": torch.ones(1, 4, 5, 4)}, r"latents must have shape \(1, 4, 4, 4\)"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "must be a list from"),
    ],
)
def test_bad_arguments_are_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **options)


def test_what_the_pipeline_lacks_is_named(pipe, transformer, image_vq):
    with pytest.raises(ValueError, match="transformer has segments"):
        VQDiTLatentPipeline(transformer, image_vq, DDIMScheduler())
    bare = VQDiTLatentPipeline(make_transformer(caption_channels=None), image_vq, DDIMScheduler())
    with pytest.raises(ValueError, match="prompt needs a transformer with caption_channels"):
        draw(bare, "a red apple")
    without = VQDiTLatentPipeline(make_transformer(), image_vq, DDIMScheduler())
    with pytest.raises(ValueError, match="needs a text_encoder"):
        draw(without, "a red apple")


def test_a_callback_may_change_the_guidance_of_its_call(pipe):
    """As diffusers' own do (SDCFGCutoffCallback), and of no other thread's."""

    def cut(pipe, index, timestep, inputs):
        assert pipe.guidance_scale == (5.0 if index == 0 else 1.0) and pipe.num_timesteps == 4
        pipe._guidance_scale = 1.0
        return {}

    options = {"num_inference_steps": 4, "output_type": "pt"}
    cut_off, steps = draw(pipe, "a red apple", guidance_scale=5.0, callback_on_step_end=cut, **options), []
    guided = draw(pipe, "a red apple", guidance_scale=5.0, **options)
    assert not torch.equal(cut_off, guided)
    plain = pipe._predict

    def late(latents, timestep, labels, prefix, guidance_scale, checks):
        steps.append(guidance_scale)
        return plain(latents, timestep, labels, prefix, 5.0 if len(steps) == 1 else 1.0, checks)

    pipe._predict = late
    assert torch.equal(draw(pipe, "a red apple", guidance_scale=5.0, **options), cut_off)
