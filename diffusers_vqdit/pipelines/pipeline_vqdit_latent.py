"""Gaussian diffusion and flow matching over the latents of a VQ model, with diffusers' schedulers."""

import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import PIL.Image
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..image_utils import check_pixels, fill_with_surroundings, on_white, resize, touched_patches
from ..latents import decode_latents, downsample_factor, encode_latents
from ..models.image_vq import ImageVQModel
from ..models.layers import VQDiTPrefix
from ..models.text_vq import TextVQModel
from ..utils.checks import shown
from ..utils.texts import check_texts, tokenize_to_length
from .pipeline_utils import PluginPipelineMixin


logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
        Examples:
            ```py
            >>> from diffusers import DPMSolverMultistepScheduler
            >>> from diffusers_vqdit import VQDiTLatentPipeline

            >>> pipe = VQDiTLatentPipeline.from_pretrained("facebook/DiT-XL-2-256")
            >>> pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
            >>> image = pipe(class_labels="white shark", num_inference_steps=25).images[0]
            ```
"""


class VQDiTLatentPipeline(PluginPipelineMixin, DiffusionPipeline):
    """Generate pictures by diffusion over the continuous latents of a VQ model, or of another VAE.

    Components have the names that they have in `DiTPipeline`, so that its checkpoints load.

    Args:
        transformer: the denoiser: ours with ``segments=None``, or diffusers' `DiTTransformer2DModel`.
        vae: pictures to latents and back; its config holds the latents' statistics.
        scheduler: any of diffusers' for epsilon, sample, v or flow prediction.
        text_encoder, tokenizer: a frozen transformers text encoder or a `TextVQModel`, for a transformer with
            ``caption_channels``.
        id2label: label number -> name; several names are separated by commas.
        max_sequence_length: tokens of a prompt for a transformers encoder; the rest is cut off, with a warning.

    Raises:
        ValueError: if the transformer has segments.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: ImageVQModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | TextVQModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        max_sequence_length: int = 77,
    ) -> None:
        super().__init__()
        if transformer.config.get("segments") is not None:
            raise ValueError(
                "transformer has segments; VQDiTPipeline is for those, this pipeline is for segments=None"
            )
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        names = {str(number): name for number, name in (id2label or {}).items()}
        self.register_to_config(id2label=names, max_sequence_length=max_sequence_length)
        self.labels = {part.strip(): int(number) for number, name in names.items() for part in name.split(",")}
        self.labels |= {name: int(number) for number, name in names.items()}  # "cat, dog" may be one name
        self.image_processor = VaeImageProcessor(vae_scale_factor=downsample_factor(vae))
        # Pictures as they are, for pasting: in [0, 1], at their own size.
        self.pixel_processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # -----------------------------------------------------------------------------------------------------------------
    # What is given

    def encode_label(self, class_labels: list[int | str]) -> torch.LongTensor:
        """Label numbers (B,) of labels, given by number or by name."""
        size = self.transformer.config.num_embeds_ada_norm
        numbers = []
        for label in class_labels:
            if isinstance(label, str) and label in self.labels:
                numbers.append(self.labels[label])
            elif isinstance(label, Integral) and not isinstance(label, bool) and 0 <= label < size:
                numbers.append(int(label))
            else:
                raise ValueError(
                    f"class_labels={label!r} must be a number in [0, {size}) or one of {list(self.labels)}, or a list "
                    "of them"
                )
        return torch.tensor(numbers, device=self._execution_device)

    @torch.no_grad()
    def encode_prompt(self, prompt: list[str]) -> tuple[torch.Tensor, torch.BoolTensor]:
        """States (B, S, caption_channels) of texts and which of them count (B, S).

        Raises:
            ValueError: if a text is empty, or the pipeline has no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("prompt needs a text_encoder and a tokenizer, which this pipeline doesn't have")
        prompt, ours = check_texts("prompt", prompt), isinstance(self.text_encoder, TextVQModel)
        length = self.text_encoder.config.max_length if ours else self.config.max_sequence_length
        ids, mask, counts = tokenize_to_length(self.tokenizer, prompt, length, "max_length" if ours else "longest")
        for text, count in zip(prompt, counts, strict=True):
            if not count:
                raise ValueError(f"prompt {shown(text)} has nothing to read")
            if count > length:
                logger.warning(f"prompt {text!r} has {count} tokens; only the first {length} are used")
        ids, mask = ids.to(self._execution_device), mask.to(self._execution_device)
        if ours:
            return self.text_encoder.encode_states(ids, mask)
        return self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool()

    def _own_size(self, image: PipelineImageInput) -> torch.Tensor:
        """Pictures at their own size, (B, C, H, W) in [0, 1]; all must have one size."""
        images = image if isinstance(image, list) else [image]
        if not images:
            raise ValueError("image=[] is an empty list; give at least one, or None")
        if all(isinstance(one, PIL.Image.Image) for one in images):
            images = [on_white(one) for one in images]
            if len({one.size for one in images}) > 1:
                raise ValueError(
                    f"the pictures of one call must have one size, got {sorted({o.size for o in images})}"
                )
            return self.pixel_processor.preprocess(images, height=images[0].height, width=images[0].width).to(
                self._execution_device
            )
        check_pixels(images, self.vae.config.in_channels)
        height, width = images[0].shape[-2:] if isinstance(images[0], torch.Tensor) else images[0].shape[-3:-1]
        return self.pixel_processor.preprocess(image, height=height, width=width).to(self._execution_device)

    # -----------------------------------------------------------------------------------------------------------------
    # Parts of the sampling

    def _noised(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The forward process of the scheduler at one timestep."""
        times = timestep.reshape(1).expand(len(latents)).to(latents.device)
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(latents, times, noise)
        return self.scheduler.add_noise(latents, noise, times)

    def _predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, labels: torch.LongTensor, prefix: VQDiTPrefix | None
    ) -> torch.Tensor:
        """The transformer's prediction (B, out_channels, h, w) with classifier-free guidance."""
        times = timestep.reshape(1).expand(len(latents)).to(latents.device)
        latents = latents.to(self.transformer.dtype)
        given = {} if prefix is None else {"prefix": prefix}
        if self.guidance_scale == 1.0:
            return self.transformer(latents, times, labels, **given).sample.float()
        free = torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)
        if prefix is None:
            both = self.transformer(
                torch.cat([latents, latents]), torch.cat([times, times]), torch.cat([labels, free])
            ).sample
            conditional, unconditional = both.float().chunk(2)
        else:
            # The half without a caption has no prefix to attend to.
            conditional = self.transformer(latents, times, labels, **given).sample.float()
            unconditional = self.transformer(latents, times, free).sample.float()
        channels = latents.shape[1]
        guided = unconditional[:, :channels] + self.guidance_scale * (conditional - unconditional)[:, :channels]
        # A learned variance is not guided.
        return torch.cat([guided, conditional[:, channels:]], dim=1)

    def _for_scheduler(self, prediction: torch.Tensor, channels: int) -> torch.Tensor:
        """The prediction with its learned variance where the scheduler reads one, else without."""
        if self.scheduler.config.get("variance_type") in ("learned", "learned_range"):
            return prediction
        return prediction[:, :channels]

    def _check(
        self,
        prompt: list[str] | None,
        class_labels: list[int | str] | None,
        image: torch.Tensor | None,
        mask_image: Any,
        strength: float | None,
        size: tuple[int, int],
        output_type: str,
        num_images_per_prompt: int,
        tensor_inputs: list[str],
    ) -> int:
        """The number of samples before ``num_images_per_prompt``, after checks of what goes together."""
        sizes = {"prompt": prompt, "class_labels": class_labels, "image": image}
        sizes = {name: len(value) for name, value in sizes.items() if value is not None}
        if 0 in sizes.values():
            raise ValueError(f"prompt and class_labels must not be empty lists, got lengths {sizes}")
        if len(set(sizes.values()) - {1}) > 1:
            raise ValueError(f"what is given must have one batch size, or one that stands for all, got {sizes}")
        if image is None and (mask_image is not None or strength is not None):
            raise ValueError("mask_image and strength need an image")
        if strength is not None and (not isinstance(strength, Real) or not 0 < strength <= 1):
            raise ValueError(f"strength={strength!r} must be in (0, 1]")
        multiple = downsample_factor(self.vae) * self.transformer.config.patch_size
        if any(not isinstance(n, int) or n < 1 or n % multiple for n in size):
            raise ValueError(f"height={size[0]} and width={size[1]} must be positive multiples of {multiple}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be 'pil', 'np', 'pt' or 'latent'")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt!r} must be an integer of at least 1")
        if not isinstance(tensor_inputs, list) or any(n not in self._callback_tensor_inputs for n in tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={tensor_inputs!r} must be a list from "
                f"{self._callback_tensor_inputs}"
            )
        return max(sizes.values(), default=1)

    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | None = None,
        *,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        force_not_quantize: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["VQDiTLatentPipeline", int, float, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate pictures.

        Args:
            prompt: text or texts to draw.
            class_labels: label or labels to draw, by number or name. Without prompt and labels, pictures are drawn
                unconditionally.
            image: pictures to begin from: PIL, arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1].
            mask_image: one mask or one a picture, white where to repaint. Black pixels come out as they went in.
            strength: share of the noising that `image` goes through, in (0, 1]; by default 0.8, or 1 with a mask.
            height, width: of the pictures in pixels; by default the trained size. With a mask the result has the
                size of `image`.
            guidance_scale: g of classifier-free guidance e_u + g (e_c - e_u) (Ho & Salimans 2022); 1 is none. Not
                used where nothing is given.
            num_inference_steps: steps of the scheduler.
            num_images_per_prompt: samples for each given one, next to one another.
            eta: eta of DDIM (Song et al. 2021, eq. 16); read by schedulers that have it.
            generator: one for the batch, or one a sample.
            latents: noise (B, C, h, w) of unit variance to begin from.
            force_not_quantize: whether to decode the latents as they are. By default those of a VQ model pass through
                the codebook, as in LDM-VQ.
            output_type: ``"pil"``, ``"np"``, ``"pt"``, or ``"latent"`` for normalised latents (B, C, h, w).
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": latents})`` after each
                step; may return other latents. Setting ``pipeline._interrupt`` ends the sampling.
            callback_on_step_end_tensor_inputs: what it gets: ``["latents"]``, the default, or ``[]``.

        Raises:
            ValueError: for an argument that doesn't fit.

        Examples:
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]

        # 1. Check the arguments
        factor = downsample_factor(self.vae)
        trained = self.transformer.config.sample_size * factor
        height, width = height or trained, width or trained
        prompt = [prompt] if isinstance(prompt, str) else prompt
        class_labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        pixels = self._own_size(image) if image is not None else None  # (B, C, H, W) in [0, 1]
        batch_size = self._check(
            prompt,
            class_labels,
            pixels,
            mask_image,
            strength,
            (height, width),
            output_type,
            num_images_per_prompt,
            callback_on_step_end_tensor_inputs,
        )
        if not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale!r} must be a finite number")
        self._guidance_scale = guidance_scale if prompt is not None or class_labels is not None else 1.0
        self._interrupt = False
        device, total = self._execution_device, batch_size * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != total:
            raise ValueError(f"generator is a list of {len(generator)}, but {total} samples are generated")

        # 2. Encode what is given, each sample `num_images_per_prompt` times
        def repeated(value: torch.Tensor) -> torch.Tensor:
            value = value.expand(batch_size, *value.shape[1:]) if len(value) == 1 else value
            return value.repeat_interleave(num_images_per_prompt, dim=0)

        if class_labels is not None:
            labels = repeated(self.encode_label(class_labels))
        else:
            labels = torch.full((total,), self.transformer.config.num_embeds_ada_norm, device=device)
        prefix = None
        if prompt is not None:
            prefix = self.transformer.encode_caption(*(repeated(value) for value in self.encode_prompt(prompt)))

        # 3. Noise, the scheduler's times, and the picture to begin from
        shape = (total, self.transformer.config.in_channels, height // factor, width // factor)
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        else:
            noise = latents.to(device, torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        latents = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        source, hole = None, None
        if pixels is not None:
            inputs = 2.0 * pixels - 1.0
            if mask_image is not None:
                mask = self.mask_processor.preprocess(mask_image, height=pixels.shape[2], width=pixels.shape[3])
                if len(mask) not in (1, len(pixels)):
                    raise ValueError(
                        f"mask_image has {len(mask)} masks for {len(pixels)} pictures; give one, or one each"
                    )
                mask = mask.to(pixels).expand(len(pixels), -1, -1, -1)
                inputs = fill_with_surroundings(inputs, mask)
                hole = repeated(touched_patches(mask, (height, width), shape[2:])[:, None])  # (B, 1, h, w)
            source = repeated(encode_latents(self.vae, resize(inputs, (height, width))))
            strength = strength if strength is not None else (0.8 if mask_image is None else 1.0)
            if mask_image is None or strength < 1:
                skipped = (
                    min(int(num_inference_steps * (1 - strength)), num_inference_steps - 1) * self.scheduler.order
                )
                timesteps = timesteps[skipped:]
                if hasattr(self.scheduler, "set_begin_index"):
                    self.scheduler.set_begin_index(skipped)
                latents = self._noised(source, noise, timesteps[0])
        self._num_timesteps = len(timesteps)
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {n: v for n, v in {"eta": eta, "generator": generator}.items() if n in accepted}

        # 4. Denoise
        scale_model_input = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                prediction = self._predict(scale_model_input(latents, timestep), timestep, labels, prefix)
                prediction = self._for_scheduler(prediction, shape[1])
                latents = self.scheduler.step(prediction, timestep, latents, **options).prev_sample
                if hole is not None:
                    # What is known goes through the forward process alone (Lugmayr et al. 2022, eq. 8).
                    last = index == len(timesteps) - 1
                    known = source if last else self._noised(source, noise, timesteps[index + 1])
                    latents = torch.where(hole, latents, known)
                if callback_on_step_end is not None:
                    inputs = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    outputs = callback_on_step_end(self, index, timestep, inputs) or {}
                    latents = outputs.pop("latents", latents)
                progress_bar.update()

        # 5. Decode
        if output_type == "latent":
            images = latents
        else:
            drawn = decode_latents(self.vae, latents, force_not_quantize).float()
            if hole is None:
                images = self.image_processor.postprocess(drawn, output_type=output_type)
            else:
                pixels = repeated(pixels)
                repainted = resize(drawn, tuple(pixels.shape[2:])) / 2 + 0.5
                pasted = torch.where(repeated(mask) > 0, repainted, pixels)
                images = self.pixel_processor.postprocess(pasted, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)
