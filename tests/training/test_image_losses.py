import math

import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from diffusers_vqdit.training.image_losses import (
    BackboneFeatures,
    LeCam,
    PatchDiscriminator,
    PerceptualLoss,
    VGG16Features,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)


def resnet():
    torch.manual_seed(0)
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    return ViTModel(config)


@pytest.mark.parametrize("make", [resnet, vit])
def test_a_picture_has_no_distance_from_itself_and_more_noise_more(make):
    loss = PerceptualLoss(BackboneFeatures(make(), image_size=16)).train()
    pixels, noise = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, 3, 32, 32)
    distances = [float(loss(pixels + scale * noise, pixels)) for scale in (0.0, 0.1, 0.5)]
    assert abs(distances[0]) < 1e-10 < distances[1] < distances[2] < 4


def test_perceptual_loss_is_the_formula():
    features = BackboneFeatures(resnet())
    a, b = torch.rand(2, 2, 3, 32, 32).unbind()
    expected = 0.0
    layers = list(zip(features(a), features(b), strict=True))
    weights = [torch.rand(f.shape[1]) for f, _ in layers]
    for (f, g), weight in zip(layers, weights, strict=True):
        difference = F.normalize(f, dim=1) - F.normalize(g, dim=1)
        expected += (difference.square() * weight.view(1, -1, 1, 1)).sum(1).mean()
    torch.testing.assert_close(PerceptualLoss(features, weights)(a, b), expected)
    with pytest.raises(ValueError, match="weights are given for 1 layers"):
        PerceptualLoss(features, weights[:1])(a, b)


def test_the_gradient_reaches_the_picture_only():
    loss = PerceptualLoss(BackboneFeatures(resnet())).train()
    statistics = {name: value.clone() for name, value in loss.state_dict().items()}
    prediction = torch.rand(2, 3, 32, 32, requires_grad=True)
    loss(prediction, torch.rand(2, 3, 32, 32)).backward()
    assert prediction.grad.isfinite().all() and prediction.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in loss.parameters())
    for name, value in loss.state_dict().items():
        assert torch.equal(value, statistics[name]), name


def test_a_backbone_is_read_from_a_folder_with_its_normalisation(tmp_path):
    model = resnet()
    model.save_pretrained(tmp_path)
    assert BackboneFeatures.from_pretrained(str(tmp_path)).mean.flatten()[0] == pytest.approx(0.485)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    features = BackboneFeatures.from_pretrained(str(tmp_path))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = model.eval()(pixels, output_hidden_states=True).hidden_states  # mean and deviation 1/2 are [-1, 1]
    for actual, wanted in zip(features(pixels), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(features.pooled(pixels), expected[-1].mean((2, 3)))


def vgg16():
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    indices = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    state = {}
    for index, (a, b) in zip(indices, zip(widths[:-1], widths[1:], strict=True), strict=True):
        state[f"features.{index}.weight"] = torch.randn(b, a, 3, 3) / math.sqrt(4.5 * a)
        state[f"features.{index}.bias"] = torch.zeros(b)
    return state


def test_lpips_has_five_levels_and_its_own_weights(tmp_path):
    torch.manual_seed(0)
    network = vgg16()
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(network, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "vgg.pth")
    loss = PerceptualLoss.from_lpips(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    shapes = [tuple(f.shape[1:]) for f in loss.features(torch.rand(1, 3, 32, 32))]
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    torch.testing.assert_close(loss.weight_1, linear["lin1.model.1.weight"].flatten())
    a, b = torch.rand(2, 1, 3, 32, 32).unbind()
    assert loss(a, a) == 0 < loss(a, b)
    del network["features.28.bias"]
    with pytest.raises(ValueError, match="'features.28.bias' of shape"):
        VGG16Features(network)


def test_adversarial_losses_are_the_formulas():
    real, made = torch.randn(2, 50).unbind()
    hinge = (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + made, min=0).mean()) / 2
    torch.testing.assert_close(discriminator_loss(real, made, "hinge"), hinge)
    cross_entropy = F.binary_cross_entropy_with_logits(
        torch.cat([real, made]), torch.cat([torch.ones(50), torch.zeros(50)])
    )
    torch.testing.assert_close(discriminator_loss(real, made, "non_saturating"), cross_entropy)
    torch.testing.assert_close(generator_loss(made, "hinge"), -made.mean())
    torch.testing.assert_close(generator_loss(made, "non_saturating"), -torch.sigmoid(made).log().mean())
    with pytest.raises(ValueError, match="kind='other'"):
        generator_loss(made, "other")


def test_adaptive_weight_makes_both_gradients_alike():
    layer = torch.randn(5, requires_grad=True)
    reconstruction, adversarial = (3 * layer).square().sum(), 0.5 * layer.sum()
    weight = adaptive_weight(reconstruction, adversarial, layer)
    torch.testing.assert_close(weight, (18 * layer).norm().detach() / (0.5 * 5**0.5 + 1e-4))
    assert not weight.requires_grad
    torch.testing.assert_close(adaptive_weight(reconstruction, adversarial, layer, scale=2.0**16), weight)


def test_adaptive_weight_is_that_of_float32_where_gradients_are_small():
    """As those of a mean over many pixels, which float16 rounds to 0."""
    torch.manual_seed(0)
    layer, states, direction = torch.randn(4, 4), torch.randn(64, 4), torch.randn(4)

    def weight(dtype, **options):
        own = layer.to(dtype).requires_grad_()
        made = (states.to(dtype) @ own).float()
        return adaptive_weight(1e-9 * made.square().sum(), 1e-9 * (made @ direction).sum(), own, **options)

    right = weight(torch.float32, scale=2.0**16)
    assert weight(torch.float16) == 0  # the gradients are gone
    assert weight(torch.float16, scale=2.0**30) == pytest.approx(float(right), rel=0.01)
    assert weight(torch.float16, scale=2.0**60) == 0  # they overflow


def test_lecam_is_zero_where_the_logits_do_not_part():
    regulariser = LeCam(decay=0.0)
    assert regulariser(torch.zeros(4), torch.zeros(4)) == 0
    torch.testing.assert_close(regulariser(torch.full((4,), 2.0), torch.full((4,), -1.0)), torch.tensor(9.0 + 9.0))
    slow = LeCam(decay=0.9)
    slow(torch.full((4,), 2.0), torch.full((4,), -1.0))
    torch.testing.assert_close(slow.real_mean, torch.tensor(0.2))
    torch.testing.assert_close(slow.made_mean, torch.tensor(-0.1))


def test_a_discriminator_learns_to_tell_noise_from_pictures():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8, num_layers=2)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    real = torch.rand(16, 3, 1, 1).expand(-1, -1, 32, 32) * 2 - 1
    made = torch.rand(16, 3, 32, 32) * 2 - 1
    for _ in range(30):
        loss = discriminator_loss(discriminator(real), discriminator(made))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    assert discriminator(real).shape == (16, 1, 6, 6)
    torch.testing.assert_close(discriminator(real)[:1], discriminator(real[:1]))  # no picture depends on the others


def test_a_patch_sees_34_or_70_pixels():
    for num_layers, size in ((2, 34), (3, 70)):
        pixels = torch.rand(1, 3, 128, 128, requires_grad=True)
        discriminator = PatchDiscriminator(channels=4, num_layers=num_layers)
        for module in discriminator.layers:  # the norms would see the whole picture
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda x: x
        logits = discriminator(pixels)
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
        assert (pixels.grad[0].abs().sum((0, 1)) > 0).sum() == size
