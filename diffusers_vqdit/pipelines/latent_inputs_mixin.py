"""What a call of the pipeline over latents is passed: checked and read."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from diffusers.utils import deprecate

from ..models.vae_latents import downsample_factor
from ..utils.checks import check_flag, check_integer, check_number
from ..utils.fitting import fitting_mode
from ..utils.images import own_size, read_images, read_mask
from .check_inputs import MAX_SIDE, check_batch, check_call, check_gaussian, check_labels, check_latents, either
from .padded_states import PaddedStates


class LatentInputsMixin:
    """The part of [`VQDiTLatentPipeline`] that checks what is passed, before any work."""

    # The pipeline's
    transformer: Any
    vae: Any
    scheduler: Any
    config: Any
    labels: dict[str, int]
    _callback_tensor_inputs: list[str]

    def check_inputs(
        self,
        texts: list[str] | PaddedStates | None,
        class_labels: Any,
        image: Any,
        mask_image: Any,
        *,
        strength: float | None,
        size: tuple[int, int],
        eta: float,
        latents: Any,
        force_not_quantize: bool,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        **options: Any,
    ) -> tuple[list[int] | None, torch.Tensor | None, list[str], torch.Tensor | None, int]:
        """Check a call's arguments; `options` are those that [`~check_inputs.check_call`] has besides, and `texts` the
        prompt as [`~latent_prompts_mixin.LatentPromptsMixin._read_prompts`] reads it.

        Returns:
            the label numbers, the pictures (B, C, H, W) in [0, 1] at their own size, how each is fitted, and their
            masks (B, 1, H, W), None or none where not passed, and the number of samples.

        Raises:
            ValueError: for an argument that doesn't fit.
        """
        check_call(
            num_images_per_prompt=num_images_per_prompt,
            strength=strength,
            generator=generator,
            known_tensors=self._callback_tensor_inputs,
            **options,
        )
        check_integer("num_inference_steps", options["num_inference_steps"], 1)  # here None is no default
        check_number("guidance_scale", options["guidance_scale"])
        check_number("eta", eta, 0, 1)
        check_flag("force_not_quantize", force_not_quantize)
        check_gaussian(self.scheduler)
        factor = downsample_factor(self.vae)
        multiple = factor * self.transformer.config.patch_size
        for name, value in zip(("height", "width"), size, strict=True):
            if check_integer(name, value, 1, MAX_SIDE) % multiple:
                raise ValueError(f"{name}={value} must be a multiple of {multiple}")
        if image is None and (mask_image is not None or strength is not None):
            given = "mask_image" if mask_image is not None else f"strength={strength}"
            raise ValueError(f"{given} needs an image")
        labels = None
        pixels: Any = None
        modes: list[str] = []
        if class_labels is not None:
            num_labels = self.transformer.config.num_embeds_ada_norm
            labels = check_labels("class_labels", class_labels, self.labels, num_labels)
        if image is not None:
            images = read_images(image, self.vae.config.in_channels)
            pixels, modes = own_size(images), [fitting_mode(one, self.config.resize_mode) for one in images]
        if mask_image is not None:
            mask_image = read_mask(mask_image, tuple(pixels.shape[-2:]), len(pixels))
        passed = {"prompt": texts, "class_labels": labels, "image": pixels}
        sizes = {name: len(value) for name, value in passed.items() if value is not None}
        total = check_batch(sizes, num_images_per_prompt, generator, broadcast=True)
        if latents is not None:
            channels = self.transformer.config.in_channels
            check_latents(latents, (total, channels, size[0] // factor, size[1] // factor))
        return labels, pixels, modes, mask_image, total


def labels_before_pictures(image: Any, class_labels: Any, names: Mapping[str, int]) -> tuple[Any, Any]:
    """The second and third argument of a call; labels, by number or one of the `names`, came second once."""
    values = image if isinstance(image, list | tuple) and image else [image]
    known = {*names, *names.values()}
    if not all(isinstance(one, str | Integral) and one in known for one in values):
        return image, class_labels
    deprecate("class_labels as the second argument", "1.0.0", "Pass them by name.")
    return None, either("class_labels", class_labels, "the second argument", image)
