"""Losses over latents against closed forms."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch.distributions import Normal, kl_divergence
from transformers import BitImageProcessor

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.training.alignment import encoder_inputs
from diffusers_vqdit.training.draws import row_generators
from diffusers_vqdit.training.latent_loss import (
    alignment_loss,
    at_timesteps,
    diffusion_target,
    draw_sigmas,
    drawn_to_drop,
    flow_matching_pair,
    latent_diffusion_loss,
    min_snr_weights,
    patch_features,
    variance_bound,
)


@pytest.fixture
def pair():
    return torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)


class Oracle(torch.nn.Module):
    """Knows x_0, and so predicts exactly; records what it was asked."""

    def __init__(self, clean, scheduler, offset=0.0):
        super().__init__()
        self.clean, self.scheduler, self.offset = clean, scheduler, offset
        self.config = VQDiTTransformer2DModel(
            num_attention_heads=1, attention_head_dim=4, num_layers=1, in_channels=2, sample_size=2
        ).config

    def forward(self, noised, times, labels, **captions):
        self.noised, self.times, self.labels = noised, times, labels
        if hasattr(self.scheduler, "scale_noise"):
            exact = (noised - self.clean) / (times / 1000).view(-1, 1, 1, 1)
        else:
            alphas = at_timesteps(self.scheduler.alphas_cumprod, times)
            noise = (noised - alphas.sqrt() * self.clean) / (1 - alphas).sqrt()
            exact = diffusion_target(self.scheduler, self.clean, noise, times)
        return type("Output", (), {"sample": exact + self.offset})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_loss_of_exact_predictions_is_zero_and_of_an_offset_its_square(pair, prediction_type):
    flow = prediction_type == "flow"
    scheduler = (
        FlowMatchEulerDiscreteScheduler() if flow else DDPMScheduler(prediction_type=prediction_type, beta_end=0.02)
    )
    labels = torch.arange(4)
    for offset in (0.0, 0.5):
        oracle = Oracle(pair[0], scheduler, offset)
        loss = latent_diffusion_loss(oracle, scheduler, pair[0], labels)
        assert loss.item() == pytest.approx(offset**2, abs=1e-4)
        assert torch.equal(oracle.labels, labels)
    if not flow:
        # Each sample's weight, and nothing else, is min-SNR's.
        loss = latent_diffusion_loss(oracle, scheduler, pair[0], labels, snr_gamma=5.0)
        expected = min_snr_weights(compute_snr(scheduler, oracle.times), 5.0, prediction_type).mean() * 0.25
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_forward_process_is_the_schedulers(pair):
    clean, noise = pair
    ddpm, times = DDPMScheduler(), torch.tensor([0, 10, 500, 999])
    alphas = at_timesteps(ddpm.alphas_cumprod, times)
    # beta_t is linear, and alpha-bar the product of 1 - beta.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(ddpm.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-6, rtol=1e-4)
    # Bit for bit, as runs before the library's calls had it
    assert torch.equal(ddpm.add_noise(clean, noise, times), alphas.sqrt() * clean + (1 - alphas).sqrt() * noise)
    velocity = alphas.sqrt() * noise - (1 - alphas).sqrt() * clean
    predicting = {kind: DDPMScheduler(prediction_type=kind) for kind in ("epsilon", "v_prediction", "sample")}
    for kind, expected in (("epsilon", noise), ("v_prediction", velocity), ("sample", clean)):
        assert torch.equal(diffusion_target(predicting[kind], clean, noise, times), expected)
    flow = FlowMatchEulerDiscreteScheduler()
    sigmas = torch.tensor([0.001, 0.3, 0.7, 1.0])
    expected = flow.scale_noise(clean, flow.timesteps[[999, 700, 300, 0]], noise)
    noised, velocity = flow_matching_pair(clean, noise, sigmas.view(-1, 1, 1, 1))
    torch.testing.assert_close(noised, expected)
    # The velocity is the path's derivative: from any point, following it back to s = 0 gives x_0.
    torch.testing.assert_close(noised - sigmas.view(-1, 1, 1, 1) * velocity, clean)


def test_min_snr_weighs_the_error_of_x0_alike_in_every_parameterisation(pair):
    clean, noise = pair
    times = torch.tensor([20, 200, 500, 900])
    alphas = at_timesteps(DDPMScheduler().alphas_cumprod, times)
    guess, snr = torch.randn_like(clean), alphas / (1 - alphas)
    noised = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    guessed_noise = (noised - alphas.sqrt() * guess) / (1 - alphas).sqrt()
    losses = []
    for kind in ("epsilon", "v_prediction", "sample"):
        target = functools.partial(diffusion_target, DDPMScheduler(prediction_type=kind), timesteps=times)
        error = target(guess, guessed_noise) - target(clean, noise)
        losses.append(error.square() * min_snr_weights(snr, 5.0, kind))
    expected = (guess - clean).square() * snr.clamp(max=5.0)
    for loss in losses:
        torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)


def test_the_variance_bound_is_the_divergence_of_two_gaussians(pair):
    clean, noise = pair
    scheduler = DDPMScheduler()
    times = torch.tensor([1, 40, 500, 999])
    alphas = at_timesteps(scheduler.alphas_cumprod, times)
    noised = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    before = at_timesteps(scheduler.alphas_cumprod, times - 1)
    beta = 1 - alphas / before
    posterior = beta * (1 - before) / (1 - alphas)  # Ho et al. 2020, eq. 7

    def mean(x0):
        return (
            before.sqrt() * beta / (1 - alphas) * x0 + (alphas / before).sqrt() * (1 - before) / (1 - alphas) * noised
        )

    prediction, v = noise + 0.1 * torch.randn_like(noise), 2 * torch.rand_like(noise) - 1
    variance = beta ** ((v + 1) / 2) * posterior ** ((1 - v) / 2)
    guess = (noised - (1 - alphas).sqrt() * prediction) / alphas.sqrt()
    divergence = kl_divergence(Normal(mean(clean), posterior.sqrt()), Normal(mean(guess), variance.sqrt()))
    bound = variance_bound(clean, noised, prediction, v, times, scheduler.alphas_cumprod)
    torch.testing.assert_close(bound, divergence.flatten(1).mean(1) / math.log(2), atol=1e-3, rtol=2e-2)
    exact = variance_bound(clean, noised, noise, -torch.ones_like(v), times, scheduler.alphas_cumprod)
    torch.testing.assert_close(exact, torch.zeros(4), atol=1e-4, rtol=0)
    # The mean learns from the squared error alone.
    prediction.requires_grad_(), v.requires_grad_()
    variance_bound(clean, noised, prediction, v, times, scheduler.alphas_cumprod).sum().backward()
    assert prediction.grad is None and v.grad.abs().sum() > 0


def test_noise_levels_are_uniform_or_logit_normal_and_shifted():
    generator = torch.Generator().manual_seed(0)
    uniform = draw_sigmas(20_000, 1.0, False, generator)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01) and uniform.var().item() == pytest.approx(
        1 / 12, abs=2e-3
    )
    logits = draw_sigmas(20_000, 1.0, True, generator).logit()
    assert logits.mean().item() == pytest.approx(0, abs=0.03) and logits.std().item() == pytest.approx(1, abs=0.03)
    # A shift of s multiplies the odds by s.
    shifted = draw_sigmas(20_000, 3.0, True, generator).logit()
    assert shifted.mean().item() == pytest.approx(math.log(3), abs=0.03)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.9, 1.0])
def test_the_share_of_dropped_conditions_is_the_one_asked_for(probability):
    dropped = drawn_to_drop(20_000, probability, torch.Generator().manual_seed(0))
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.01)  # not one minus it
    with pytest.raises(ValueError, match="probability=1.5"):
        drawn_to_drop(4, 1.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_a_row_is_noised_by_its_own_generator(pair, prediction_type):
    scheduler = FlowMatchEulerDiscreteScheduler() if prediction_type == "flow" else DDPMScheduler()
    clean, labels = pair[0], torch.arange(4)

    def loss(rows):
        oracle = Oracle(torch.zeros_like(clean[rows]), scheduler)  # wrong by an amount that depends on the noise
        generators = row_generators(3, 5, 4)[rows]
        return latent_diffusion_loss(oracle, scheduler, clean[rows], labels[rows], generator=generators)

    halves = [loss(slice(0, 1)), loss(slice(1, 4))]
    torch.testing.assert_close((halves[0] + 3 * halves[1]) / 4, loss(slice(0, 4)))
    assert halves[0] != halves[1]
    dropped = drawn_to_drop(4, 0.5, row_generators(3, 5, 4))
    assert torch.equal(dropped[2:], drawn_to_drop(2, 0.5, row_generators(3, 5, 2, rank=1)))


def test_flow_matching_refuses_what_it_does_not_have(pair):
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="no snr_gamma"):
        latent_diffusion_loss(Oracle(pair[0], scheduler), scheduler, *pair[:1], torch.arange(4), snr_gamma=5.0)


def test_alignment_is_minus_the_cosine():
    features = torch.randn(2, 9, 5)
    assert alignment_loss(3 * features, features).item() == pytest.approx(-1)
    assert alignment_loss(-features, features).item() == pytest.approx(1)


def test_features_of_a_vit_are_its_patches_in_their_places():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, num_register_tokens=2
    )
    encoder = Dinov2WithRegistersModel(config).eval()
    with torch.no_grad():
        pixels = torch.randn(2, 3, 16, 16)
        states = encoder(pixel_values=pixels).last_hidden_state
        assert torch.equal(patch_features(encoder, pixels, (4, 4)), states[:, 3:])  # class token and two registers


def test_features_on_another_grid_are_interpolated():
    ramp = torch.arange(4.0).expand(1, 3, 4, 4)  # rises along the rows

    def encoder(pixel_values):
        return type("Output", (), {"last_hidden_state": ramp})

    left, right = patch_features(encoder, torch.randn(1, 3, 16, 16), (2, 2))[0, :2, 0].tolist()
    assert left + right == pytest.approx(3) and 0 < left < 1 < 2 < right < 3


def test_features_are_of_the_whole_picture():
    """Not of the middle alone, which DINOv2's processor cuts out."""
    processor = BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, do_center_crop=True
    )
    encoder = SimpleNamespace(config=SimpleNamespace(image_size=28))
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    pictures[:, :, :3], pictures[:, :, :, -3:] = 255, 255
    found = encoder_inputs(encoder, processor, pictures)
    assert found.shape == (2, 3, 28, 28)
    assert (found[:, :, 0] > found.mean()).all() and (found[:, :, :, -1] > found.mean()).all()
    assert (found[:, :, 14, 14] < found.mean()).all()
