"""One pipeline for every task: what you pass is given, what you ask for is generated."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils import BaseOutput, logging, replace_example_docstring
from transformers import PreTrainedTokenizerBase

from ..image_utils import on_white
from ..likelihood import LikelihoodOutput, negative_elbo, stratified_masks
from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..retrieval import GalleryIndex, RetrievalOutput, all_masked, build_index, retrieve
from ..schedulers.scheduling_masked_diffusion import MaskedDiffusionScheduler
from ..tasks import Task, check_task


logger = logging.get_logger(__name__)

Codes = torch.LongTensor | dict[str, torch.LongTensor]

EXAMPLE_DOC_STRING = """
        Examples:
            ```py
            >>> from diffusers_vqdit import VQDiTPipeline

            >>> pipe = VQDiTPipeline.from_pretrained("model_cards/vqdit-emoji")
            >>> image = pipe("a red apple").images[0]
            >>> text = pipe(image=image).texts[0]
            ```
"""


@dataclass
class VQDiTPipelineOutput(BaseOutput):
    """Output of [`VQDiTPipeline`]; None for what was not generated.

    Args:
        images: list of PIL pictures, array (B, H, W, C) or tensor (B, C, H, W) in [0, 1], or codes (B, h, w).
        texts: list of strings, or codes (B, L).
        labels: list of label names, or codes (B, 1).
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    texts: list[str] | torch.Tensor | None = None
    labels: list[str] | torch.Tensor | None = None


@dataclass
class ClassificationOutput(BaseOutput):
    """Output of [`VQDiTPipeline.classify`].

    Args:
        labels (`list[str]`): the most probable label of each sample.
        probabilities (`torch.Tensor` of shape `(B, L)`): float32, rows sum to 1.
        names (`list[str]`): the L labels, in the order of the columns.
    """

    labels: list[str]
    probabilities: torch.Tensor
    names: list[str]


class VQDiTPipeline(DiffusionPipeline):
    """Generate pictures, captions or labels from one another by masked diffusion over their codes.

    Args:
        transformer: the denoiser, with the segments ``image``, ``text`` and ``label`` or some of them.
        scheduler: masks and samples.
        image_vq: tokenizer of pictures; None for a checkpoint without them.
        text_vq: tokenizer of texts, with its `tokenizer`; None for a checkpoint without them.
        labels: the names of the label codes.
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
        labels: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, image_vq=image_vq, text_vq=text_vq, tokenizer=tokenizer
        )
        self.register_to_config(labels=list(labels or []))
        factor = image_vq.downsample_factor if image_vq is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Record our classes as diffusers', where importing this package puts them.

        `DiffusionPipeline.from_pretrained` refuses repositories with components of a library that it doesn't know.
        """
        package = __package__.split(".")[0]
        ours = {
            name: ("diffusers", self.config[name][1])
            for name, component in self.components.items()
            if component is not None and self.config[name][0].split(".")[0] == package
        }
        self.register_to_config(**ours)
        super().save_config(save_directory, push_to_hub, **kwargs)

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

    def encode_prompt(self, prompt: list[str]) -> torch.LongTensor:
        """Codes (B, L) of texts; what is longer than the text tokenizer's length is cut off, with a warning."""
        for text in prompt:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"prompt must be a non-empty string or a list of them, got {text!r}")
        length = self.text_vq.config.max_length
        for text, ids in zip(prompt, self.tokenizer(prompt, verbose=False).input_ids, strict=True):
            if len(ids) > length:
                logger.warning(f"prompt {text!r} has {len(ids)} tokens; only the first {length} are used")
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self._execution_device)
        return self.text_vq.encode_codes(tokens.input_ids, tokens.attention_mask)

    def encode_image(self, image: PipelineImageInput) -> torch.LongTensor:
        """Codes (B, h, w) of pictures, resized to the size that the model was trained for."""
        images = image if isinstance(image, list) else [image]
        pictures = [one for one in images if isinstance(one, PIL.Image.Image)]
        if len(pictures) == len(images):
            image = [on_white(one) for one in pictures]
        else:
            check_pixels(images, self.image_vq.config.in_channels)
        factor = self.image_vq.downsample_factor
        height, width = (size * factor for size in self.transformer.config.segments["image"]["shape"])
        pixels = self.image_processor.preprocess(image, height=height, width=width)  # (B, C, H, W) in [-1, 1]
        return self.image_vq.encode_codes(pixels.to(self._execution_device))

    def encode_label(self, class_label: list[int | str]) -> torch.LongTensor:
        """Codes (B, 1) of labels, given by number or by name."""
        size = self.transformer.config.segments["label"]["vocab_size"]
        names = list(self.config.labels)
        codes = []
        for label in class_label:
            if isinstance(label, str) and label in names:
                codes.append(names.index(label))
            elif isinstance(label, Integral) and not isinstance(label, bool) and 0 <= label < size:
                codes.append(int(label))
            else:
                raise ValueError(
                    f"class_label={label!r} must be a number in [0, {size}) or one of {names}, or a list of them"
                )
        return torch.tensor(codes, device=self._execution_device)[:, None]

    def _encode(self, prompt: Any, image: Any, class_label: Any) -> dict[str, torch.LongTensor]:
        """Codes of the segments that are not None."""
        for name, value in (("prompt", prompt), ("image", image), ("class_label", class_label)):
            if isinstance(value, list) and not value:
                raise ValueError(f"{name}=[] is an empty list; give at least one, or None")
        codes = {}
        if prompt is not None:
            codes["text"] = self.encode_prompt(prompt if isinstance(prompt, list) else [prompt])
        if image is not None:
            codes["image"] = self.encode_image(image)
        if class_label is not None:
            codes["label"] = self.encode_label(class_label if isinstance(class_label, list) else [class_label])
        return codes

    # -----------------------------------------------------------------------------------------------------------------
    # Checks

    def _task(self, prompt: Any, image: Any, class_label: Any, output: str | None) -> Task:
        """The task that the arguments mean, checked against those the checkpoint knows."""
        given = [
            name for name, value in (("text", prompt), ("image", image), ("label", class_label)) if value is not None
        ]
        if output is None:
            output = "text" if image is not None else "image"
        elif not isinstance(output, str):
            raise ValueError(f"output={output!r} must be a string such as 'image' or 'image+text'")
        generated = [name.strip() for name in output.split("+")]
        both = sorted(set(given) & set(generated))
        if both:
            raise ValueError(f"output={output!r} asks for {both}, which you passed: a segment is given or generated")
        task = Task(tuple(given), tuple(generated))
        self._check_task(task)
        return task

    def _check_task(self, task: Task) -> None:
        """Raise a ValueError unless the checkpoint knows the task and has its tokenizers."""
        check_task(task, self.transformer.config.tasks or [])
        for name, needed in (("text", ("text_vq", "tokenizer")), ("image", ("image_vq",))):
            for component in needed:
                if name in task.segments and getattr(self, component) is None:
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
        guidance_scale: float | None = None,
        num_inference_steps: int = 16,
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
            prompt: given text or texts.
            image: given pictures: PIL, arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1].
            class_label: given label or labels, by number or name.
            output: the segments to generate, such as ``"image"``, ``"text"`` or ``"image+text"``; by default
                ``"text"`` when a picture is given, else ``"image"``.
            guidance_scale: g of classifier-free guidance l_u + g (l_c - l_u) on the logits (Ho & Salimans 2022); 1 is
                none. By default 3 for pictures where the checkpoint knows the task without anything given, else 1.
            num_inference_steps: steps of the sampler.
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
        if guidance_scale is not None and (not isinstance(guidance_scale, Real) or not math.isfinite(guidance_scale)):
            raise ValueError(f"guidance_scale={guidance_scale!r} must be a finite number")
        task = self._task(prompt, image, class_label, output)
        unconditional = str(Task((), task.generated))
        can_guide = bool(task.given) and unconditional in (self.transformer.config.tasks or [])
        if guidance_scale is None:
            guidance_scale = 3.0 if can_guide and "image" in task.generated else 1.0
        elif guidance_scale != 1.0 and not can_guide:
            reason = (
                f"the task {unconditional!r}, which this checkpoint doesn't know" if task.given else "a given segment"
            )
            raise ValueError(f"guidance_scale={guidance_scale} needs {reason}; use 1")
        self._guidance_scale = guidance_scale
        self._interrupt = False

        # 2. Encode what is given
        given = self._encode(prompt, image, class_label)
        sizes = {name: len(codes) for name, codes in given.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"what is given must have one batch size, got {sizes}")
        batch_size = next(iter(sizes.values()), 1) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator is a list of {len(generator)}, but {batch_size} samples are generated")
        prefix = None
        if given:
            prefix = self.transformer.encode_prefix(given)
            if num_images_per_prompt > 1:
                prefix = prefix.repeat_interleave(num_images_per_prompt)

        # 3. Start from masks
        codes = self._start(task, batch_size, latents)
        masks = {name: self.transformer.config.segments[name]["vocab_size"] for name in codes}
        predicted = dict(codes)

        # 4. Set the times
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        self._num_timesteps = num_inference_steps

        # 5. Denoise
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for index, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                # Without masks a step changes nothing; few codes may all be known before the last one.
                if any((value == masks[name]).any() for name, value in codes.items()):
                    times = timestep.expand(batch_size)
                    logits = self.transformer(codes, timestep=times, prefix=prefix).sample
                    if guidance_scale != 1.0:
                        free = self.transformer(codes, timestep=times).sample
                        logits = {name: free[name] + guidance_scale * (logits[name] - free[name]) for name in logits}
                    for name, value in codes.items():
                        step = self.scheduler.step(logits[name], timestep, value.flatten(1), generator=generator)
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
        if output_type == "latent":
            images, texts, labels = codes.get("image"), codes.get("text"), codes.get("label")
        else:
            known = {name: torch.where(value == masks[name], predicted[name], value) for name, value in codes.items()}
            images = self.decode_image(known["image"], output_type) if "image" in known else None
            texts = self.decode_text(known["text"]) if "text" in known else None
            labels = self.decode_label(known["label"]) if "label" in known else None
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, texts, labels
        return VQDiTPipelineOutput(images=images, texts=texts, labels=labels)

    # -----------------------------------------------------------------------------------------------------------------
    # Likelihood

    @torch.no_grad()
    def score(
        self,
        task: str,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        class_label: int | str | list[int | str] | None = None,
        *,
        num_samples: int = 32,
        batch_size: int = 64,
        generator: torch.Generator | None = None,
    ) -> LikelihoodOutput:
        """How likely the generated side of a task is given the other: bounds on -log p, comparable among candidates.

        All candidates share the masks, so that their differences are known better than each bound
        ([`~likelihood.negative_elbo`]). One on either side stands for all, as in the pictures of one prompt.

        Args:
            task: the arrow, such as ``"text->image"``.
            prompt, image, class_label: what the task has on either side, as in [`__call__`].
            num_samples: masks, 1 or an even number. The standard error falls with its root or faster.
            batch_size: candidates a forward pass.
            generator: draws the masks, on the CPU; the same seed gives the same masks.

        Returns:
            [`~likelihood.LikelihoodOutput`]: ``nll`` and ``standard_error`` in nats, ``bits_per_code``.

        Raises:
            ValueError: if what is passed is not what the task has, or for an argument that doesn't fit.

        Examples:
            ```py
            >>> output = pipe.score("image->text", ["a red apple", "a sailboat"], image)
            >>> best = output.nll.argmin()
            ```
        """
        arrow = Task.parse(task)
        self._check_task(arrow)
        passed = {"text": prompt, "image": image, "label": class_label}
        present = sorted(name for name, value in passed.items() if value is not None)
        if present != sorted(arrow.segments):
            raise ValueError(f"task={task!r} has the segments {sorted(arrow.segments)}, but {present} were passed")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1")
        codes = self._encode(prompt, image, class_label)
        sizes = {name: len(value) for name, value in codes.items()}
        size = max(sizes.values())
        if not set(sizes.values()) <= {1, size}:
            raise ValueError(f"what is scored must have one batch size, or one that stands for all, got {sizes}")
        given = {name: codes[name] for name in arrow.given}
        prefix = None
        if given:
            # What is the same for all is encoded once.
            shared = max(len(value) for value in given.values())
            prefix = self.transformer.encode_prefix({n: v.expand(shared, *v.shape[1:]) for n, v in given.items()})
        generated = {name: codes[name].expand(size, *codes[name].shape[1:]) for name in arrow.generated}
        num_codes = sum(value[0].numel() for value in generated.values())
        masks, ratios = stratified_masks(num_codes, num_samples, generator)
        times = self.scheduler.time_of_mask_ratio(ratios) if self.transformer.config.time_conditioned else None
        with self.progress_bar(total=len(masks) * -(-size // batch_size)) as progress_bar:
            output = negative_elbo(
                self.transformer,
                generated,
                prefix,
                masks,
                times=times,
                batch_size=batch_size,
                progress=progress_bar.update,
            )
        self.maybe_free_model_hooks()
        return output

    # -----------------------------------------------------------------------------------------------------------------
    # Classification and retrieval

    @torch.no_grad()
    def classify(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        labels: list[str] | None = None,
        *,
        num_samples: int = 32,
        batch_size: int = 64,
        generator: torch.Generator | None = None,
    ) -> ClassificationOutput:
        """Label texts, pictures or both; among the checkpoint's labels, or for pictures among texts of your own.

        The checkpoint's label is one code, so its distribution is exact: one forward pass. Texts of your own are
        candidates for the caption: the softmax over them of the bound on log p(text | picture), with masks that all
        share, less that on log p(text) where the checkpoint knows the task ``->text`` (PMI: a uniform prior). Without
        it, frequent and short texts have an advantage.

        Args:
            prompt, image: what is given, as in [`__call__`]. Both: of one batch size.
            labels: candidate texts, at least two, all different; None for the checkpoint's labels.
            num_samples: masks, as in [`score`]; for `labels` only.
            batch_size: candidates a forward pass; for `labels` only.
            generator: draws the masks, on the CPU; for `labels` only.

        Raises:
            ValueError: for a task that the checkpoint was not trained for, or an argument that doesn't fit.

        Examples:
            ```py
            >>> pipe.classify(image=image).labels[0]
            >>> pipe.classify(image=image, labels=["a cat", "a dog"]).probabilities
            ```
        """
        if labels is not None:
            if image is None or prompt is not None:
                raise ValueError("labels of your own are captions of pictures: pass image, and no prompt")
            if not isinstance(labels, list) or len(labels) < 2 or len(set(labels)) < len(labels):
                raise ValueError(f"labels={labels!r} must be a list of at least two different texts")
            if not isinstance(batch_size, int) or batch_size < 1:
                raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1")
            scores = -self._caption_nll(image, labels, num_samples, batch_size, generator)
            names = list(labels)
        else:
            if prompt is None and image is None:
                raise ValueError("prompt and image are None: there is nothing to classify")
            self._task(prompt, image, None, "label")
            given = self._encode(prompt, image, None)
            sizes = {name: len(codes) for name, codes in given.items()}
            if len(set(sizes.values())) > 1:
                raise ValueError(f"what is given must have one batch size, got {sizes}")
            scores = all_masked(self.transformer, "label", given)[1][:, 0]  # (B, K)
            names = self.decode_label(torch.arange(scores.shape[1])[:, None])
        self.maybe_free_model_hooks()
        probabilities = scores.softmax(-1).float().cpu()
        best = [names[index] for index in probabilities.argmax(1).tolist()]
        return ClassificationOutput(labels=best, probabilities=probabilities, names=names)

    def _caption_nll(
        self, image: Any, texts: list[str], num_samples: int, batch_size: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Bounds (B, L) on -log p(text | picture), less those on -log p(text) where the checkpoint knows them."""
        self._check_task(Task(("image",), ("text",)))
        codes = self._encode(texts, image, None)
        text, pictures = codes["text"], codes["image"]
        masks, ratios = stratified_masks(text[0].numel(), num_samples, generator)
        times = self.scheduler.time_of_mask_ratio(ratios) if self.transformer.config.time_conditioned else None
        options = {"times": times, "batch_size": batch_size}
        prefixes = self.transformer.encode_prefix({"image": pictures})
        # A picture's keys and values serve all texts.
        rows = [prefixes.select(slice(row, row + 1)) for row in range(len(pictures))]
        nll = torch.stack([negative_elbo(self.transformer, {"text": text}, row, masks, **options).nll for row in rows])
        if "->text" in (self.transformer.config.tasks or []):
            nll = nll - negative_elbo(self.transformer, {"text": text}, None, masks, **options).nll
        return nll

    @torch.no_grad()
    def index(
        self,
        prompt: list[str] | None = None,
        image: PipelineImageInput | None = None,
        *,
        batch_size: int = 64,
    ) -> GalleryIndex:
        """Index a gallery of texts, for queries by pictures, or of pictures, for queries by texts.

        Args:
            prompt, image: one of them: the items.
            batch_size: items a forward pass.

        Returns:
            [`~retrieval.GalleryIndex`]: 0.7 kB a picture of 64 codes; ``save`` and ``load`` it.

        Raises:
            ValueError: for an empty gallery, or a checkpoint that knows no task between pictures and texts.
        """
        if (prompt is None) == (image is None):
            raise ValueError("give prompt or image, one of them: a gallery holds texts or pictures")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1")
        segment, query = ("text", "image") if image is None else ("image", "text")
        items = prompt if image is None else image
        if isinstance(items, list) and items:
            parts = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        else:
            parts = [items]
        codes = [
            self._encode(part if image is None else None, part if image is not None else None, None) for part in parts
        ]
        output = build_index(
            self.transformer, torch.cat([one[segment] for one in codes]), segment, query, batch_size=batch_size
        )
        self.maybe_free_model_hooks()
        return output

    @torch.no_grad()
    def retrieve(
        self,
        query: str | list[str] | PipelineImageInput,
        gallery: GalleryIndex,
        top_k: int = 5,
        *,
        shortlist: int | None = None,
        batch_size: int = 64,
    ) -> RetrievalOutput:
        """The items of a gallery that go best with each query: texts for pictures, pictures for texts.

        Args:
            query: texts for a gallery of pictures, pictures for one of texts.
            gallery: from [`index`].
            top_k: items a query.
            shortlist: candidates a query that the features find, and PMI ranks; by default 20, or twice `top_k` where
                that is more. Each candidate costs a forward pass where the checkpoint knows both directions.
            batch_size: queries or candidates a forward pass.

        Returns:
            [`~retrieval.RetrievalOutput`]: ``indices`` and ``scores`` (B, top_k), best first.

        Raises:
            ValueError: for an index of another model, or an argument that doesn't fit.

        Examples:
            ```py
            >>> gallery = pipe.index(image=pictures)
            >>> gallery.save("gallery.safetensors")
            >>> best = pipe.retrieve("a red apple", gallery, top_k=3).indices[0]
            ```
        """
        if not isinstance(gallery, GalleryIndex):
            raise ValueError(f"gallery must be a GalleryIndex, which pipe.index makes, got {type(gallery).__name__}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be an integer of at least 1")
        first = query[0] if isinstance(query, list) and query else query
        if isinstance(first, str) != (gallery.query == "text"):
            wanted = "texts" if gallery.query == "text" else "pictures"
            raise ValueError(
                f"query must be {wanted}, as the gallery holds {gallery.segment} codes, got {type(first)}"
            )
        arguments = (query, None) if gallery.query == "text" else (None, query)
        codes = self._encode(*arguments, None)[gallery.query]
        if shortlist is None:
            shortlist = max(20, 2 * top_k) if isinstance(top_k, int) else 20  # a wrong top_k is named below
        output = retrieve(self.transformer, codes, gallery, top_k=top_k, shortlist=shortlist, batch_size=batch_size)
        self.maybe_free_model_hooks()
        return output

    # -----------------------------------------------------------------------------------------------------------------
    # What is generated

    def decode_image(self, codes: torch.LongTensor, output_type: str = "pil") -> Any:
        """Pictures of codes (B, h, w), as ``"pil"``, ``"np"`` or ``"pt"``."""
        return self.image_processor.postprocess(self.image_vq.decode_codes(codes).sample, output_type=output_type)

    def decode_text(self, codes: torch.LongTensor) -> list[str]:
        """Strings of codes (B, L)."""
        tokens = self.text_vq.decode_codes(codes).argmax(-1)
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def decode_label(self, codes: torch.LongTensor) -> list[str]:
        """Names of label codes (B, 1); their numbers where the checkpoint has no names."""
        names = list(self.config.labels)
        return [names[code] if code < len(names) else str(code) for code in codes[:, 0].tolist()]


def check_pixels(images: list[Any], channels: int) -> None:
    """Raise a ValueError unless all are arrays ((B,) H, W, C) or all tensors ((B,) C, H, W) of floats in [0, 1]."""
    kinds = {type(one).__name__ for one in images}
    if len(kinds) > 1 or not isinstance(images[0], np.ndarray | torch.Tensor):
        raise ValueError(
            f"image must be PIL pictures, arrays (B, H, W, C) or tensors (B, C, H, W), all of one kind, got "
            f"{', '.join(sorted(kinds))}"
        )
    for one in images:
        axis = -1 if isinstance(one, np.ndarray) else -3
        if one.ndim not in (3, 4) or 0 in tuple(one.shape) or one.shape[axis] != channels:
            order = f"(B, H, W, {channels})" if axis == -1 else f"(B, {channels}, H, W)"
            raise ValueError(f"image as {type(one).__name__} must have shape {order}, got {tuple(one.shape)}")
        floating = one.is_floating_point() if isinstance(one, torch.Tensor) else np.issubdtype(one.dtype, np.floating)
        if not floating or not (one.min() >= 0 and one.max() <= 1):
            raise ValueError(
                f"image as {type(one).__name__} must hold floats in [0, 1], got {one.dtype} from {one.min()} to "
                f"{one.max()}"
            )
