"""Gaussian diffusion and flow matching over the latents of a VQ model, with diffusers' schedulers."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, VQModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.image_vq import ImageVQModel
from ..models.layers import VQDiTPrefix
from ..models.text_vq import TextVQModel
from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..models.vae_latents import decode_latents, downsample_factor, encode_latents
from ..utils.checks import check_choice, check_integer, shown
from ..utils.fitting import RESIZE_MODES
from ..utils.images import cut_out, fill_with_surroundings, resize_pixels, touched_patches
from .check_inputs import FiniteChecks, callback_inputs, check_labels, latents_of_callback
from .guided_prefix import GuidedPrefix
from .latent_inputs_mixin import LatentInputsMixin, labels_before_pictures
from .latent_prompts_mixin import LatentPromptsMixin
from .padded_states import PaddedStates
from .pipeline_utils import PluginPipelineMixin, check_components, in_cache, with_own_state


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


class VQDiTLatentPipeline(LatentPromptsMixin, LatentInputsMixin, PluginPipelineMixin, DiffusionPipeline):
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
        resize_mode: how the training read pictures of another aspect ratio: ``"crop"`` cut their middle out, ``"pad"``
            fitted them whole on white, ``"pad_border"`` on their border's colour; ``"auto"`` did so where they stand
            on transparent or plain ground, else it cropped. Pictures to repaint are always fitted whole.

    A pipeline may be used by several threads at once, each call with arguments of its own. ``pipe._interrupt = True``
    ends all the calls that run.

    Raises:
        ValueError: if the transformer has segments, or `resize_mode` is another.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: DiTTransformer2DModel | VQDiTTransformer2DModel,
        vae: ImageVQModel | VQModel | AutoencoderKL,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | TextVQModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        id2label: dict[int, str] | dict[str, str] | None = None,
        max_sequence_length: int = 77,
        resize_mode: str = "crop",
    ) -> None:
        super().__init__()
        check_components(transformer=transformer, vae=vae, scheduler=scheduler)
        check_choice("resize_mode", resize_mode, RESIZE_MODES)
        max_sequence_length = check_integer("max_sequence_length", max_sequence_length, 1)
        if transformer.config.get("segments") is not None:
            raise ValueError(
                "transformer has segments; VQDiTPipeline is for those, this pipeline is for segments=None"
            )
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        named = id2label or {}
        if not isinstance(named, dict) or not all(
            str(number).isdecimal() and isinstance(name, str) for number, name in named.items()
        ):
            raise ValueError(f"id2label={shown(id2label)} must be a dict of names by number, such as {{0: 'cat'}}")
        names = {str(number): name for number, name in named.items()}
        size = transformer.config.num_embeds_ada_norm
        if beyond := [number for number in names if size is not None and int(number) >= size]:
            raise ValueError(f"id2label={shown(id2label)} names the label {beyond[0]}; the transformer has {size}")
        self.register_to_config(id2label=names, max_sequence_length=max_sequence_length, resize_mode=resize_mode)
        self.labels = {part.strip(): int(number) for number, name in names.items() for part in name.split(",")}
        self.labels |= {name: int(number) for number, name in names.items()}  # "cat, dog" may be one name
        self.image_processor = VaeImageProcessor(vae_scale_factor=downsample_factor(vae))
        # Pictures as they are, for pasting: in [0, 1], at their own size.
        self.pixel_processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False)

    # -----------------------------------------------------------------------------------------------------------------
    # What is given

    def encode_label(self, class_labels: list[int | str]) -> torch.LongTensor:
        """Label numbers (B,) of labels, given by number or by name."""
        size = self.transformer.config.num_embeds_ada_norm
        numbers = check_labels("class_labels", class_labels, self.labels, size)
        return torch.tensor(numbers, device=self._execution_device)

    # -----------------------------------------------------------------------------------------------------------------
    # Parts of the sampling

    @staticmethod
    def _noised(
        scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """The forward process of a scheduler at one timestep."""
        times = timestep.reshape(1).expand(len(latents)).to(latents.device)
        if hasattr(scheduler, "scale_noise"):
            return scheduler.scale_noise(latents, times, noise)
        return scheduler.add_noise(latents, noise, times)

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.LongTensor,
        prefix: VQDiTPrefix | None,
        guidance_scale: float,
        checks: FiniteChecks,
    ) -> torch.Tensor:
        """The transformer's prediction (B, out_channels, h, w) with classifier-free guidance; `checks` note whether it
        is finite."""
        times = timestep.reshape(1).expand(len(latents)).to(latents.device)
        latents = latents.to(self.transformer.dtype)
        given = {} if prefix is None else {"prefix": prefix}
        if guidance_scale == 1.0:
            with in_cache(self.transformer, "hooks_context", "cond"):
                prediction = self.transformer(latents, times, labels, **given).sample.float()
            finite = prediction.isfinite().all()
            checks.add(finite, finite, guidance_scale)
            return prediction
        free = torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)
        if prefix is None:
            with in_cache(self.transformer, "hooks_context", "both"):
                both = self.transformer(
                    torch.cat([latents, latents]), torch.cat([times, times]), torch.cat([labels, free])
                ).sample
            conditional, unconditional = both.float().chunk(2)
        else:
            # The half without a caption has no prefix to attend to; one with another caption has all else as it is.
            with in_cache(self.transformer, "hooks_context", "cond"):
                conditional = self.transformer(latents, times, labels, **given).sample.float()
            negative = prefix.negative if isinstance(prefix, GuidedPrefix) else None
            other, given = (free, {}) if negative is None else (labels, {"prefix": negative})
            with in_cache(self.transformer, "hooks_context", "uncond"):
                unconditional = self.transformer(latents, times, other, **given).sample.float()
        channels = latents.shape[1]
        guided = unconditional[:, :channels] + guidance_scale * (conditional - unconditional)[:, :channels]
        parts = conditional.isfinite().all() & unconditional.isfinite().all()
        checks.add(guided.isfinite().all(), parts, guidance_scale)
        # A learned variance is not guided.
        return torch.cat([guided, conditional[:, channels:]], dim=1)

    @staticmethod
    def _for_scheduler(scheduler: SchedulerMixin, prediction: torch.Tensor, channels: int) -> torch.Tensor:
        """The prediction with its learned variance where the scheduler reads one, else without."""
        if scheduler.config.get("variance_type") in ("learned", "learned_range"):
            return prediction
        return prediction[:, :channels]

    def _repeated(self, value: torch.Tensor, total: int) -> torch.Tensor:
        """A tensor of one row, or of one for each given sample, as `total` rows, equal ones next to one another."""
        return value.to(self._execution_device).repeat_interleave(total // len(value), dim=0)

    def _encode_inputs(
        self,
        texts: list[str] | PaddedStates | None,
        numbers: list[int] | None,
        total: int,
        negative: list[str] | PaddedStates | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[torch.LongTensor, VQDiTPrefix | None]:
        """Labels (total,), the one for none where there are none, and the texts as a prefix, with the negative ones.
        Both may be states already."""
        free = [self.transformer.config.num_embeds_ada_norm]
        labels = self._repeated(torch.tensor(free if numbers is None else numbers), total)
        prefix, other = (
            self._encode_caption(one, total, max_sequence_length, argument)
            for one, argument in ((texts, "prompt"), (negative, "negative_prompt"))
        )
        return labels, prefix if prefix is None or other is None else GuidedPrefix(**vars(prefix), negative=other)

    def _finish(self, drawn: torch.Tensor, pixels: torch.Tensor | None, mask: torch.Tensor | None, kind: str) -> Any:
        """Pictures of drawn pixels (B, C, H, W) in [-1, 1], pasted into those that were repainted."""
        if mask is None or pixels is None:
            return self.image_processor.postprocess(drawn, output_type=kind)
        repainted = cut_out(drawn, tuple(pixels.shape[2:])) / 2 + 0.5
        pixels, mask = (self._repeated(value, len(drawn)) for value in (pixels, mask))
        return self.pixel_processor.postprocess(torch.where(mask > 0, repainted, pixels), kind)

    def _encode_source(
        self,
        pixels: torch.Tensor,
        modes: list[str],
        mask: torch.Tensor | None,
        size: tuple[int, int],
        total: int,
    ) -> tuple[torch.Tensor, torch.BoolTensor | None]:
        """Latents (total, C, h, w) of pictures in [0, 1] at their own size, each fitted to `size` by its mode or whole
        where there are masks, and which of them their masks touch (total, 1, h, w)."""
        inputs = 2.0 * pixels.to(self._execution_device) - 1.0
        if mask is None:
            fitted = [resize_pixels(one[None], size, mode) for one, mode in zip(inputs, modes, strict=True)]
            return self._repeated(encode_latents(self.vae, torch.cat(fitted)), total), None
        mask = mask.to(inputs)
        source = encode_latents(self.vae, resize_pixels(fill_with_surroundings(inputs, mask), size))
        hole = touched_patches(mask, size, tuple(source.shape[2:]))[:, None]
        return self._repeated(source, total), self._repeated(hole, total)

    def _begin(
        self,
        scheduler: SchedulerMixin,
        count: int,
        noise: torch.Tensor,
        source: torch.Tensor | None,
        hole: torch.BoolTensor | None,
        strength: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents to begin with, noise or a picture's with noise, and the timesteps from there on."""
        timesteps = scheduler.timesteps
        strength = strength if strength is not None else (0.8 if hole is None else 1.0)
        if source is None or (hole is not None and strength == 1):
            return noise * getattr(scheduler, "init_noise_sigma", 1.0), timesteps
        # As many steps as diffusers' pipelines take, one at least.
        skipped = min(count - int(count * strength), count - 1) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        return self._noised(scheduler, source, noise, timesteps[skipped]), timesteps[skipped:]

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        scheduler: SchedulerMixin,
        labels: torch.LongTensor,
        prefix: VQDiTPrefix | None,
        *,
        known: tuple[torch.Tensor, torch.Tensor, torch.BoolTensor] | None,
        guidance_scale: float,
        options: dict[str, Any],
        callback: Callable | None,
        tensor_inputs: list[str],
    ) -> torch.Tensor:
        """Latents after all steps. `known` are a picture's latents, the noise to go with it, and the hole in it;
        `options` is what the scheduler's step takes besides."""
        scale_model_input = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
        channels, checks = latents.shape[1], FiniteChecks("prediction is")
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                scaled = scale_model_input(latents, timestep)
                prediction = self._predict(scaled, timestep, labels, prefix, guidance_scale, checks)
                prediction = self._for_scheduler(scheduler, prediction, channels)
                latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
                if known is not None:
                    # What is known goes through the forward process alone (Lugmayr et al. 2022, eq. 8).
                    source, noise, hole = known
                    if index < len(timesteps) - 1:
                        source = self._noised(scheduler, source, noise, timesteps[index + 1])
                    latents = torch.where(hole, latents, source)
                if callback is not None:
                    inputs = {"latents": latents} if "latents" in tensor_inputs else {}
                    latents = latents_of_callback(callback(self, index, timestep, inputs), latents)
                    guidance_scale = self._guidance_scale
                progress_bar.update()
        checks.read()
        return latents

    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @with_own_state
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        class_labels: int | str | list[int | str] | None = None,
        *,
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
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate pictures.

        Args:
            prompt: text or texts to draw.
            image: pictures to begin from: PIL, arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1].
            class_labels: label or labels to draw, by number or name. Nothing given means unconditionally.
            mask_image: one mask or one a picture, white where to repaint. Black pixels come out as they went in.
            strength: share of the noising that `image` goes through, in (0, 1]; by default 0.8, or 1 with a mask.
            height, width: in pixels; by default the trained size. With a mask the result has the size of `image`.
            guidance_scale: g of classifier-free guidance e_u + g (e_c - e_u) (Ho & Salimans 2022); 1 is none, 0 draws
                as if nothing were given.
            num_inference_steps: steps of the scheduler, up to 100,000.
            num_images_per_prompt: samples for each given one, next to one another; 65,536 in all at the most.
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
            negative_prompt: text or texts that guidance leads away from, e_n + g (e_c - e_n), with the labels of the
                other half.
            prompt_embeds: states (B, S, caption_channels) in place of `prompt` ([`encode_prompt`]).
            prompt_attention_mask: (B, S), zero at their padding.
            negative_prompt_embeds, negative_prompt_attention_mask: the same in place of `negative_prompt`.
            max_sequence_length: tokens of a prompt for a transformers encoder; by default the config's.

        Raises:
            ValueError: for an argument that doesn't fit.

        Examples:
        """
        tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)

        # 1. Check the arguments
        image, class_labels = labels_before_pictures(image, class_labels, self.labels)
        factor = downsample_factor(self.vae)
        trained = self.transformer.config.sample_size * factor
        height, width = (trained if side is None else side for side in (height, width))
        texts, negative = self._read_prompts(
            {"prompt": prompt, "negative_prompt": negative_prompt},
            {"prompt": prompt_embeds, "negative_prompt": negative_prompt_embeds},
            {"prompt": prompt_attention_mask, "negative_prompt": negative_prompt_attention_mask},
            max_sequence_length,
        )
        numbers, pixels, modes, mask, total = self.check_inputs(
            texts,
            class_labels,
            image,
            mask_image,
            strength=strength,
            size=(height, width),
            eta=eta,
            latents=latents,
            force_not_quantize=force_not_quantize,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type=output_type,
            return_dict=return_dict,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            tensor_inputs=tensor_inputs,
        )
        guidance_scale = guidance_scale if texts is not None or numbers is not None else 1.0
        self._guidance_scale, device = guidance_scale, self._execution_device

        # 2. Encode what is given
        labels, prefix = self._encode_inputs(texts, numbers, total, negative, max_sequence_length)

        # 3. Noise, a scheduler of the call's own with its times, and the picture to begin from
        shape = (total, self.transformer.config.in_channels, height // factor, width // factor)
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            noise = latents.to(device, torch.float32)
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(int(num_inference_steps), device=device)
        source, hole = None, None
        if pixels is not None:
            source, hole = self._encode_source(pixels, modes, mask, (height, width), total)
        latents, timesteps = self._begin(scheduler, int(num_inference_steps), noise, source, hole, strength)
        self._num_timesteps, accepted = len(timesteps), inspect.signature(scheduler.step).parameters

        # 4. Denoise
        latents = self._denoise(
            latents,
            timesteps,
            scheduler,
            labels,
            prefix,
            known=None if hole is None else (source, noise, hole),
            guidance_scale=guidance_scale,
            options={n: v for n, v in {"eta": eta, "generator": generator}.items() if n in accepted},
            callback=callback_on_step_end,
            tensor_inputs=tensor_inputs,
        )

        # 5. Decode
        if output_type == "latent":
            images = latents
        else:
            drawn = decode_latents(self.vae, latents, force_not_quantize).float()
            images = self._finish(drawn, pixels, mask, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)
