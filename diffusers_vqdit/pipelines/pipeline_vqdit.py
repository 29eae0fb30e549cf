"""One pipeline for every task: what you pass is given, what you ask for is generated."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders import Mochi1LoraLoaderMixin
from diffusers.utils import BaseOutput, replace_example_docstring
from transformers import PreTrainedTokenizerBase

from ..likelihood import code_log_probabilities
from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..models.transformer_vqdit import VQDiTPrefix, VQDiTTransformer2DModel
from ..schedulers.scheduling_masked_diffusion import MaskedDiffusionScheduler
from ..tasks import Task, check_task
from .codes_mixin import CodesMixin
from .likelihood_mixin import LikelihoodMixin
from .pipeline_utils import PluginPipelineMixin


Codes = torch.LongTensor | dict[str, torch.LongTensor]

EXAMPLE_DOC_STRING = """
        Examples:
            ```py
            >>> from diffusers_vqdit import VQDiTPipeline

            >>> pipe = VQDiTPipeline.from_pretrained("model_cards/vqdit-emoji")
            >>> image = pipe("a red apple").images[0]
            >>> text = pipe(image=image).texts[0]
            >>> repainted = pipe("a green apple", image, mask_image=mask).images[0]
            >>> texts = pipe("a <mask> apple", output="text").texts
            ```
"""


@dataclass
class VQDiTPipelineOutput(BaseOutput):
    """Output of [`VQDiTPipeline`]; None for what was not generated.

    Args:
        images: list of PIL pictures, array (B, H, W, C) or tensor (B, C, H, W) in [0, 1], or codes (B, h, w).
        texts: list of strings, or codes (B, L).
        labels: list of label names, or codes (B, 1).
        segments: all that was generated, by the segment's name. Where a task generates several pictures or several
            texts, `images` and `texts` are the first of them by name.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    texts: list[str] | torch.Tensor | None = None
    labels: list[str] | torch.Tensor | None = None
    segments: dict[str, Any] | None = None


# Of diffusers' mixins for LoRA this is one for pipelines with a transformer and nothing else to adapt.
class VQDiTPipeline(CodesMixin, LikelihoodMixin, PluginPipelineMixin, DiffusionPipeline, Mochi1LoraLoaderMixin):
    """Generate pictures, captions or labels from one another by masked diffusion over their codes.

    A segment on a grid holds pictures and a segment on a line texts, but for ``label``, whose only code is a label.

    Args:
        transformer: the denoiser, with the segments ``image``, ``text`` and ``label``, some of them or others.
        scheduler: masks and samples.
        image_vq: tokenizer of pictures; None for a checkpoint without them.
        text_vq: tokenizer of texts, with its `tokenizer`; None for a checkpoint without them.
        labels: the names of the label codes, in their order or by code.
        lowres_factor: how many times smaller the pictures were that ``image_lowres`` was trained on.
    """

    model_cpu_offload_seq = "text_vq->transformer->image_vq"
    _optional_components = ["image_vq", "text_vq", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: VQDiTTransformer2DModel,
        scheduler: MaskedDiffusionScheduler,
        image_vq: ImageVQModel | None = None,
        text_vq: TextVQModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        labels: list[str] | dict[str, str] | None = None,
        lowres_factor: int = 2,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, image_vq=image_vq, text_vq=text_vq, tokenizer=tokenizer
        )
        if isinstance(labels, dict):  # as they are saved
            labels = [labels[code] for code in sorted(labels, key=int)]
        self.register_to_config(labels=list(labels or []), lowres_factor=lowres_factor)
        factor = image_vq.downsample_factor if image_vq is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)
        # Pictures as they are, for pasting: in [0, 1], at their own size.
        self.pixel_processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    def to_json_string(self) -> str:
        """The config as it is saved, with the labels by code.

        `DiffusionPipeline.download` takes every list for a component, and refuses a repository with any other.
        """
        config = json.loads(super().to_json_string())
        config["labels"] = {str(code): name for code, name in enumerate(config["labels"])}
        return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

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
    # Before the first step

    def _passed(self, prompt: Any, image: Any, class_label: Any, inputs: dict[str, Any] | None) -> dict[str, Any]:
        """What is not None, by segment."""
        named = {"text": prompt, "image": image, "label": class_label}
        if inputs is not None and not isinstance(inputs, dict):
            raise ValueError(f"inputs must be a dict of what to pass by segment, got {type(inputs).__name__}")
        for name in inputs or {}:
            others = sorted(set(self.transformer.config.segments) - set(named))
            if name not in others:
                raise ValueError(f"inputs has {name!r}; it takes {others}; the others have arguments of their own")
        passed = {name: value for name, value in {**named, **(inputs or {})}.items() if value is not None}
        arguments = {"text": "prompt", "label": "class_label"}
        for name, value in passed.items():
            if isinstance(value, list) and not value:
                raise ValueError(f"{arguments.get(name, name)}=[] is an empty list; give at least one, or None")
        return passed

    def _plan(
        self,
        passed: dict[str, Any],
        output: str | None,
        mask_image: Any = None,
        strength: float | None = None,
        output_type: str = "pil",
    ) -> Task:
        """The task that the arguments mean, checked against those the checkpoint knows.

        What is passed and generated too is taken as partly known: texts with blanks, and pictures with a mask or a
        strength. A picture to make a picture from without either is one to enlarge, and becomes ``image_lowres``.
        """
        redrawn = {"mask_image": mask_image, "strength": strength}
        redrawn = [name for name, value in redrawn.items() if value is not None]
        if len(redrawn) > 1:
            raise ValueError("give mask_image or strength, not both: one says what to repaint, the other finds it")
        if strength is not None and (not isinstance(strength, Real) or not 0 < strength <= 1):
            raise ValueError(f"strength={strength!r} must be a number in (0, 1], the share of codes to draw anew")
        if output is None:
            wanted = "text" if "image" in passed or self._has_blank(passed.get("text")) else "image"
            output = "image" if redrawn else wanted
        elif not isinstance(output, str):
            raise ValueError(f"output={output!r} must be a string such as 'image' or 'image+text'")
        generated = [name.strip() for name in output.split("+")]
        known = self.transformer.config.segments
        if "image" in generated and "image" in passed and not redrawn:
            if "image_lowres" in known and "image_lowres" not in passed:
                passed["image_lowres"] = passed.pop("image")
            else:
                raise ValueError(
                    f"output={output!r} asks for 'image', which you passed: give mask_image to repaint a part or "
                    "strength to repair it; this checkpoint can't enlarge pictures"
                )
        if redrawn and not ("image" in generated and "image" in passed):
            raise ValueError(f"{redrawn[0]} needs image, and an output with 'image', got output={output!r}")
        for name in passed:
            if name in known and self._modality(name) == "text":
                blank = self._has_blank(passed[name])
                if name in generated and not blank:
                    raise ValueError(
                        f"output={output!r} asks for {name!r}, which you passed: a segment is given or generated. "
                        "Put <mask> where a text is to be filled in"
                    )
                if blank and name not in generated:
                    raise ValueError(
                        f"{passed[name]!r} has <mask>, which is for texts to fill in: ask for output={name!r}"
                    )
            elif name in generated and not (name == "image" and redrawn):
                raise ValueError(f"output={output!r} asks for {name!r}, which you passed: it is given or generated")
        task = Task(tuple(name for name in passed if name not in generated), tuple(generated))
        # What comes out as codes needs no tokenizer, unless it is partly known.
        self._check_task(task, tuple(passed) if output_type == "latent" else task.segments)
        return task

    def _check_task(self, task: Task, tokenized: tuple[str, ...] | None = None) -> None:
        """Raise a ValueError unless the checkpoint knows the task and has the tokenizers of its segments."""
        check_task(task, self.transformer.config.tasks or [])
        needed = {"text": ("text_vq", "tokenizer"), "image": ("image_vq",), "label": ()}
        for name in task.segments if tokenized is None else tokenized:
            for component in needed[self._modality(name)]:
                if getattr(self, component) is None:
                    raise ValueError(f"the task {str(task)!r} needs the component {component}, which is None")

    def _start(self, task: Task, batch_size: int, latents: Codes | None) -> dict[str, torch.LongTensor]:
        """The codes to start from: all masked, or the caller's."""
        segments = self.transformer.config.segments
        codes = {}
        if latents is not None and not isinstance(latents, dict):
            if not isinstance(latents, torch.Tensor):
                raise ValueError(f"latents must be a tensor of codes or a dict of them, got {type(latents).__name__}")
            if len(task.generated) > 1:
                raise ValueError(f"latents must be a dict with the segments {list(task.generated)}")
            latents = {task.generated[0]: latents}
        for name in latents or {}:
            if name not in task.generated:
                raise ValueError(f"latents has the segment {name!r}, but the task {str(task)!r} doesn't generate it")
        for name in task.generated:
            size, shape = segments[name]["vocab_size"], tuple(segments[name]["shape"])
            if latents is None or name not in latents:
                codes[name] = torch.full((batch_size, *shape), size, device=self._execution_device)
                continue
            value = latents[name]
            if value.dtype != torch.int64 or value.ndim != 1 + len(shape) or len(value) != batch_size:
                raise ValueError(
                    f"latents of {name!r} must be int64 codes of shape {(batch_size, *shape)}, {size} where unknown; "
                    f"got {value.dtype} of shape {tuple(value.shape)}"
                )
            if value.numel() and (value.min() < 0 or value.max() > size):
                raise ValueError(
                    f"latents of {name!r} must be in [0, {size}], {size} where unknown; got values from {value.min()} "
                    f"to {value.max()}"
                )
            codes[name] = value.to(self._execution_device)
        return codes

    def _forget(self, codes: torch.LongTensor, strength: float, prefix: VQDiTPrefix | None) -> torch.LongTensor:
        """Codes (B, h, w) with the share `strength` of them masked, those that fit the others worst."""
        scheduler = self.scheduler
        times = (
            (lambda r: scheduler.time_of_mask_ratio(torch.tensor(r)))
            if self.transformer.config.time_conditioned
            else None
        )
        fit = code_log_probabilities(
            self.transformer, {"image": codes}, prefix, times=times, generator=torch.Generator().manual_seed(0)
        )["image"]  # (B, N)
        worst = fit.argsort(dim=1, stable=True)[:, : max(1, round(strength * fit.shape[1]))]
        size = self.transformer.config.segments["image"]["vocab_size"]
        return codes.flatten(1).scatter(1, worst, size).view_as(codes)

    # -----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        class_label: int | str | list[int | str] | None = None,
        *,
        output: str | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float | None = None,
        inputs: dict[str, Any] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Codes | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["VQDiTPipeline", int, float, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> VQDiTPipelineOutput | tuple:
        """Generate.

        Args:
            prompt: given text or texts. Where text is generated, one with blanks to fill in: each ``<mask>`` is one
                token, and what else it says stays.
            image: given pictures: PIL, arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1]. Where a picture is
                generated, one to repaint (with `mask_image`), to repair (with `strength`), or else to enlarge, of any
                size, by a checkpoint that has ``image_lowres``.
            class_label: given label or labels, by number or name.
            output: the segments to generate, such as ``"image"``, ``"text"`` or ``"image+text"``. By default
                ``"image"`` with a mask or a strength, ``"text"`` when a picture or a blank is given, else
                ``"image"``.
            mask_image: one mask or one a picture, white where to repaint. The codes that white pixels change are
                generated; black pixels come out as they went in, and so does the size.
            strength: share of the codes to draw anew in (0, 1], those that fit the others worst
                ([`~likelihood.code_log_probabilities`]).
            inputs: what is given by segment, for segments other than ``text``, ``image`` and ``label``.
            guidance_scale: g of classifier-free guidance l_u + g (l_c - l_u) on the logits (Ho & Salimans 2022); 1 is
                none. By default 3 for pictures where the checkpoint knows the task without anything given, else 1.
            num_inference_steps: steps of the sampler. By default 16 for pictures and labels, and as many as there are
                codes for texts alone, whose codes hang together more.
            temperature: divides the logits. By default the scheduler's for pictures and for all that is generated
                from nothing, and 0, the likeliest code, for texts and labels that something is given for.
            num_images_per_prompt: samples for each given one, next to one another.
            generator: one for the batch, or one a sample, which then comes out as it would alone.
            latents: codes to start from, int64, the segment's ``vocab_size`` where unknown. Known codes stay. A
                tensor, or a dict of them where several segments are generated.
            output_type: ``"pil"``, ``"np"`` or ``"pt"``; ``"latent"`` returns codes, of texts and labels too.
            return_dict: whether to return a [`VQDiTPipelineOutput`] or a tuple (images, texts, labels).
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": codes})`` after each
                step; may return other codes. Setting ``pipeline._interrupt`` ends the sampling; codes still masked
                are then decoded as last predicted, and stay masked in ``"latent"`` output.
            callback_on_step_end_tensor_inputs: what it gets: ``["latents"]``, the default, or ``[]``.

        Raises:
            ValueError: for an argument that doesn't fit, or a task that the checkpoint was not trained for.

        Examples:
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]

        # 1. Check the arguments
        if not isinstance(callback_on_step_end_tensor_inputs, list) or any(
            name not in self._callback_tensor_inputs for name in callback_on_step_end_tensor_inputs
        ):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs!r} must be a list from "
                f"{self._callback_tensor_inputs}"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be 'pil', 'np', 'pt' or 'latent'")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt!r} must be an integer of at least 1")
        if temperature is not None and (not isinstance(temperature, Real) or not temperature >= 0):
            raise ValueError(f"temperature={temperature!r} must be a number of at least 0")
        if guidance_scale is not None and (not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale)):
            raise ValueError(f"guidance_scale={guidance_scale!r} must be a finite number")
        passed = self._passed(prompt, image, class_label, inputs)
        task = self._plan(passed, output, mask_image, strength, output_type)
        unconditional = str(Task((), task.generated))
        can_guide = bool(task.given) and unconditional in (self.transformer.config.tasks or [])
        if guidance_scale is None:
            guidance_scale = 3.0 if can_guide and "image" in task.generated else 1.0
        elif guidance_scale != 1.0 and not can_guide:
            reason = (
                f"the task {unconditional!r}, which this checkpoint doesn't know" if task.given else "a given segment"
            )
            raise ValueError(f"guidance_scale={guidance_scale} needs {reason}; use 1")
        kinds = {self._modality(name) for name in task.generated}
        if num_inference_steps is None:
            shapes = [self.transformer.config.segments[name]["shape"] for name in task.generated]
            num_inference_steps = sum(shape[0] for shape in shapes) if kinds == {"text"} else 16
        if temperature is None and task.given and "image" not in kinds:
            temperature = 0.0
        self._guidance_scale = guidance_scale
        self._interrupt = False

        # 2. Encode what is given, and what is known of the generated side
        given, known, source, written = {}, {}, None, {}
        for name, value in passed.items():
            if name == "image_lowres":
                given[name], source = self._encode_lowres(value)
            elif name in task.given:
                given |= self._encode({name: value})
            elif name == "image" and mask_image is not None:
                known[name], source = self._encode_holes(value, mask_image)
            elif name == "image":
                known[name] = self.encode_image(value)
            else:
                known[name], *written[name] = self._infill(value if isinstance(value, list) else [value], name)
        tiles = source.tiles if source is not None and source.tiles is not None else 1
        sizes = {
            name: len(codes) // (tiles if name == "image_lowres" else 1) for name, codes in (given | known).items()
        }
        if len(set(sizes.values())) > 1:
            raise ValueError(f"what is given must have one batch size, got {sizes}")
        if tiles > 1 and task.generated != ("image",):
            raise ValueError(
                f"image of {tuple(source.pixels.shape[-2:])} pixels makes {tiles} tiles, which only make 'image', "
                f"not {'+'.join(task.generated)!r}"
            )
        batch_size = next(iter(sizes.values()), 1) * num_images_per_prompt
        if isinstance(generator, list):
            if len(generator) != batch_size:
                raise ValueError(f"generator is a list of {len(generator)}, but {batch_size} samples are generated")
            generator = [one for one in generator for _ in range(tiles)]
        prefix = None
        if given:
            given = {n: v if n == "image_lowres" else v.repeat_interleave(tiles, dim=0) for n, v in given.items()}
            prefix = self.transformer.encode_prefix(given)
        if strength is not None:
            known["image"] = self._forget(known["image"], strength, prefix)
        if num_images_per_prompt > 1:
            # Each sample's tiles stay together.
            rows = torch.arange(batch_size // num_images_per_prompt * tiles).unflatten(0, (-1, 1, tiles))
            rows = rows.expand(-1, num_images_per_prompt, -1).flatten()
            prefix = prefix.select(rows) if prefix is not None else None
            known = {name: codes[rows] for name, codes in known.items()}
            written = {name: [tensor[rows] for tensor in pair] for name, pair in written.items()}
        batch_size *= tiles

        # 3. Start from masks, and from what is known
        if latents is not None and known:
            raise ValueError(f"latents can't be given with {sorted(known)} partly known: both say where to start")
        codes = self._start(task, batch_size, known or latents)
        masks = {name: self.transformer.config.segments[name]["vocab_size"] for name in codes}
        predicted = dict(codes)

        # 4. Set the times
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        self._num_timesteps = num_inference_steps

        # 5. Denoise
        fixed = {name: (value != masks[name]).flatten(1) for name, value in codes.items()}
        sizes = [value.shape[1] for value in fixed.values()]
        event = None
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for index, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                masked = torch.cat([(value == masks[name]).flatten(1) for name, value in codes.items()], 1)  # (B, N)
                event = self.scheduler.next_event(timestep, masked, event, generator=generator)
                if event.needs_model:
                    times = event.timesteps
                    scale = self.scheduler.guidance_scale_at(masked.double().mean(1), guidance_scale)  # (B,)
                    guided = bool((scale != 1.0).any())
                    logits = self.transformer(
                        codes, timestep=times, prefix=prefix, with_unconditional=guided
                    ).sample  # (B, N, K), or (2B, N, K) with and without what is given
                    if guided:
                        # l_u + g (l_c - l_u), which is l_c exactly where g is 1
                        halves = {name: value.chunk(2) for name, value in logits.items()}
                        weight = {name: scale.to(value)[:, None, None] for name, value in logits.items()}
                        logits = {name: torch.lerp(free, own, weight[name]) for name, (own, free) in halves.items()}
                    revealed = [None] * len(sizes) if event.revealed is None else event.revealed.split(sizes, 1)
                    for (name, value), reveal in zip(codes.items(), revealed, strict=True):
                        step = self.scheduler.step(
                            logits[name],
                            timestep,
                            value.flatten(1),
                            revealed=reveal,
                            known=fixed[name],
                            shape=value.shape[1:],
                            temperature=temperature,
                            generator=generator,
                        )
                        codes[name] = step.prev_sample.view_as(value)
                        predicted[name] = step.pred_original_sample.view_as(value)
                if callback_on_step_end is not None:
                    several = len(task.generated) > 1
                    current = codes if several else codes[task.generated[0]]
                    inputs = {"latents": current} if "latents" in callback_on_step_end_tensor_inputs else {}
                    outputs = callback_on_step_end(self, index, timestep, inputs) or {}
                    current = outputs.pop("latents", current)
                    codes = current if several else {task.generated[0]: current}
                progress_bar.update()

        # 6. Decode
        if output_type != "latent":
            codes = {name: torch.where(value == masks[name], predicted[name], value) for name, value in codes.items()}
        decoded = {"image": [], "text": [], "label": []}
        segments = {}
        for name, value in codes.items():
            modality = self._modality(name)
            if output_type == "latent":
                segments[name] = value
            elif name == "image" and source is not None:
                segments[name] = self._finish(value, source, num_images_per_prompt, output_type)
            elif modality == "image":
                segments[name] = self.decode_image(value, output_type)
            elif modality == "text":
                segments[name] = self.decode_text(value, *written.get(name, ()))
            else:
                segments[name] = self.decode_label(value)
            decoded[modality].append(segments[name])
        images, texts, labels = (next(iter(decoded[modality]), None) for modality in ("image", "text", "label"))
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, texts, labels
        return VQDiTPipelineOutput(images=images, texts=texts, labels=labels, segments=segments)
