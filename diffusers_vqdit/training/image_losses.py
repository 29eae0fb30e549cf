"""What sharpens an image tokenizer's pictures: perceptual and adversarial losses.

Pictures are (B, 3, H, W) in [-1, 1] throughout. The losses are those of VQGAN (Esser et al. 2021, section 3.1) and of
the recipes that followed it.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..utils.distributed import mean_over_processes, sum_over_processes


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ADVERSARIAL_LOSSES = ("hinge", "non_saturating")


# ---------------------------------------------------------------------------------------------------------------------
# Perceptual loss


class BackboneFeatures(nn.Module):
    """The hidden states of a vision backbone of transformers, frozen.

    Args:
        backbone: a model whose call takes ``pixel_values`` and ``output_hidden_states``, such as `ResNetModel`,
            `ConvNextV2Model`, `EfficientNetModel`, `ViTModel` or `Dinov2Model`.
        image_mean, image_std: of the pixels in [0, 1] that the backbone was trained with.
        image_size: side that pictures are resized to first; by default they keep theirs. Most vision transformers
            need theirs.
    """

    def __init__(
        self,
        backbone: nn.Module,
        image_mean: tuple[float, ...] = IMAGENET_MEAN,
        image_std: tuple[float, ...] = IMAGENET_STD,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(image_mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(image_std).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, image_size: int | None = None, *, cache_dir: str | None = None
    ) -> "BackboneFeatures":
        """A backbone of the Hub or a local folder, with the normalisation of its image processor if it has one.

        Raises:
            ValueError: if the model is not a vision model with hidden states.
        """
        from transformers import AutoModel
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, cache_dir=cache_dir)
        except OSError:
            processor = {}
        backbone = AutoModel.from_pretrained(name_or_path, cache_dir=cache_dir)
        backbone = getattr(backbone, "vision_model", backbone)  # CLIP's and SigLIP's half
        if getattr(backbone, "main_input_name", None) != "pixel_values":
            raise ValueError(f"{name_or_path!r} is a {type(backbone).__name__}; a vision model was expected")
        mean, std = (tuple(processor.get(name) or default) for name, default in _NORMALISATION)
        return cls(backbone, mean, std, image_size)

    def train(self, mode: bool = True) -> "BackboneFeatures":
        return super().train(False)  # batch norms keep their statistics, dropout stays off

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states of each layer: (B, C, h, w) of a convolutional backbone, (B, N, C) of a transformer."""
        if self.image_size is not None:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        pixels = ((pixels + 1) / 2 - self.mean) / self.std
        return list(self.backbone(pixel_values=pixels, output_hidden_states=True).hidden_states)

    @torch.no_grad()
    def check_size(self, size: int) -> None:
        """Raise a ValueError if the backbone doesn't take pictures of this side, after what they are resized to."""
        try:
            self(torch.zeros(1, self.mean.shape[1], size, size, device=self.mean.device))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"features_image_size={self.image_size}: {type(self.backbone).__name__} doesn't take pictures of "
                f"{self.image_size or size} px; give the side that it was trained with ({error})"
            ) from error

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        """One vector (B, C) for each picture: the mean of its last hidden state over all positions."""
        last = self(pixels)[-1].float()
        return last.mean((2, 3)) if last.ndim == 4 else last.mean(1)


_NORMALISATION = (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD))


class VGG16Features(nn.Module):
    """The five levels of VGG16 (Simonyan & Zisserman 2014) that LPIPS compares, from torchvision's state dict.

    Args:
        state_dict: with ``features.0.weight`` and so on, as torchvision's ``vgg16-397923af.pth`` has it.

    Raises:
        ValueError: if a weight is missing or has another shape.
    """

    def __init__(self, state_dict: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        index, width = 0, 3
        for level, (layers, channels) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
            modules: list[nn.Module] = [nn.MaxPool2d(2)] if level else []
            index += bool(level)
            for _ in range(layers):
                convolution = nn.Conv2d(width, channels, 3, padding=1)
                for name, parameter in convolution.named_parameters():
                    value = state_dict.get(f"features.{index}.{name}")
                    if value is None or value.shape != parameter.shape:
                        raise ValueError(
                            f"the state dict must have torchvision's VGG16: 'features.{index}.{name}' of shape "
                            f"{tuple(parameter.shape)}, got {None if value is None else tuple(value.shape)}"
                        )
                    parameter.data.copy_(value)
                modules += [convolution, nn.ReLU()]
                index, width = index + 2, channels
            self.levels.append(nn.Sequential(*modules))
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        hidden, features = ((pixels + 1) / 2 - self.mean) / self.std, []
        for level in self.levels:
            hidden = level(hidden)
            features.append(hidden)
        return features


class PerceptualLoss(nn.Module):
    """Distance of two pictures in the features of a network (Zhang et al. 2018, LPIPS, eq. 1).

    d = sum_l mean_positions sum_c w_lc (f_lc - g_lc)^2, where f and g are the features, each position's brought to
    unit length. Without given weights all of a layer are 1 / number of layers, so that d is in [0, 4].

    Args:
        features: pictures to a list of features, (B, C, h, w) or (B, N, C) each: [`BackboneFeatures`],
            [`VGG16Features`] or another module.
        weights: (C,) for each layer.
    """

    def __init__(self, features: nn.Module, weights: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.features = features
        self.num_layers = None if weights is None else len(weights)
        for index, weight in enumerate(weights or []):
            self.register_buffer(f"weight_{index}", weight.flatten(), persistent=False)

    @classmethod
    def from_lpips(cls, vgg16_path: str | Path, lpips_path: str | Path) -> "PerceptualLoss":
        """LPIPS itself: torchvision's VGG16 weights and LPIPS' linear layers (``lin0.model.1.weight`` and so on, as in
        ``lpips/weights/v0.1/vgg.pth`` and in taming-transformers' ``vgg.pth``)."""
        network = torch.load(vgg16_path, map_location="cpu", weights_only=True)
        linear = torch.load(lpips_path, map_location="cpu", weights_only=True)
        names = [f"lin{index}.model.1.weight" for index in range(5)]
        if missing := [name for name in names if name not in linear]:
            raise ValueError(f"{lpips_path} must hold LPIPS' linear layers; {missing} are missing")
        return cls(VGG16Features(network), [linear[name] for name in names])

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean distance, a scalar, with gradients to `prediction` (B, 3, H, W)."""
        with torch.no_grad():
            wanted = self.features(target)
        drawn = self.features(prediction)
        if self.num_layers is not None and self.num_layers != len(drawn):
            raise ValueError(f"weights are given for {self.num_layers} layers, but the features have {len(drawn)}")
        total = prediction.new_zeros((), dtype=torch.float32)
        for index, (f, g) in enumerate(zip(drawn, wanted, strict=True)):
            channels = 1 if f.ndim == 4 else 2
            f, g = f.float().movedim(channels, -1), g.float().movedim(channels, -1)
            difference = (_unit(f) - _unit(g)).square()
            weight = getattr(self, f"weight_{index}") if self.num_layers else 1.0 / len(drawn)
            total = total + (difference * weight).sum(-1).mean()
        return total


def _unit(features: torch.Tensor) -> torch.Tensor:
    # A norm of zero has no gradient; 1e-10 is LPIPS' own.
    return features / (features.square().sum(-1, keepdim=True) + 1e-20).sqrt().add(1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Adversarial loss


class PatchDiscriminator(nn.Module):
    """Real or made, told for each patch of a picture (Isola et al. 2017, PatchGAN, section 3.2).

    Its norms are over groups of channels where the original's are over the batch: a picture's logits don't depend on
    the pictures beside it, and there are no statistics to keep equal between processes.

    Args:
        in_channels: channels of the pictures.
        channels: width of the first layer; it doubles with each, up to eightfold.
        num_layers: strided layers; a patch is 70 pixels wide with 3 and 34 with 2.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index in range(1, num_layers + 1):
            wider = channels * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers.append(nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False))
            layers += [nn.GroupNorm(min(32, wider // 2), wider), nn.LeakyReLU(0.2)]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, h, w), positive for real."""
        return self.layers(pixels)


def discriminator_loss(real: torch.Tensor, made: torch.Tensor, kind: str = "hinge") -> torch.Tensor:
    """The discriminator's loss for its logits of real and of made pictures, a scalar.

    ``"hinge"``: (E max(0, 1 - real) + E max(0, 1 + made)) / 2 (Lim & Ye 2017); ``"non_saturating"``:
    -(E log sigmoid(real) + E log sigmoid(-made)) / 2 (Goodfellow et al. 2014, eq. 1).
    """
    real, made = real.float(), made.float()
    if _check_kind(kind) == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(made).mean()) / 2


def generator_loss(made: torch.Tensor, kind: str = "hinge") -> torch.Tensor:
    """The tokenizer's loss for the logits of its pictures: -E made (``"hinge"``) or -E log sigmoid(made)
    (``"non_saturating"``)."""
    return -made.float().mean() if _check_kind(kind) == "hinge" else F.softplus(-made.float()).mean()


def _check_kind(kind: str) -> str:
    if kind not in ADVERSARIAL_LOSSES:
        raise ValueError(f"kind={kind!r} must be one of {ADVERSARIAL_LOSSES}")
    return kind


def adaptive_weight(
    reconstruction: torch.Tensor,
    adversarial: torch.Tensor,
    last_layer: torch.Tensor,
    maximum: float = 1e4,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """|d reconstruction / d L| / (|d adversarial / d L| + 1e-4) for the decoder's last layer L, without a gradient
    (Esser et al. 2021, eq. 7): with it both losses pull that layer alike. The gradients are means over the processes,
    so that all have the same weight.

    Args:
        scale: of the losses while their gradients are taken, which in float16 would be rounded to 0 without. Where
            they overflow, the weight is 0.
    """
    (wanted,) = torch.autograd.grad(reconstruction * scale, last_layer, retain_graph=True)
    (given,) = torch.autograd.grad(adversarial * scale, last_layer, retain_graph=True)
    wanted, given = mean_over_processes(torch.stack([wanted.float(), given.float()]) / scale).unbind()
    weight = wanted.norm() / (given.norm() + 1e-4)
    return torch.where(torch.isfinite(wanted.norm() + given.norm()), weight, 0.0).clamp(0, maximum).detach()


class LeCam(nn.Module):
    """Regulariser of a discriminator that sees few pictures (Tseng et al. 2021, eq. 4).

    E max(0, real - made_mean)^2 + E max(0, real_mean - made)^2, where the means are moving averages of the logits over
    all processes; the differences are cut at zero as in the authors' code.

    Args:
        decay: of the moving averages.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("made_mean", torch.zeros(()))

    def forward(self, real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """The loss for logits of real and made pictures, whose averages are updated first."""
        real, made = real.float(), made.float()
        for average, logits in ((self.real_mean, real), (self.made_mean, made)):
            total = sum_over_processes(torch.stack([logits.detach().sum(), logits.new_tensor(logits.numel())]))
            mean = total[0] / total[1]
            # A step that is not finite is skipped, and must leave nothing behind.
            average.lerp_(torch.where(torch.isfinite(mean), mean, average), 1 - self.decay)
        return F.relu(real - self.made_mean).square().mean() + F.relu(self.real_mean - made).square().mean()
