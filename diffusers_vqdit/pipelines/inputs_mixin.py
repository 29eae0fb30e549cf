"""What a call of a pipeline over codes asks for: its arguments checked and read, and the task they mean."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers.utils import deprecate

from ..models.segment_layers import segment_patch
from ..schedulers.samplers import check_device
from ..schedulers.scheduling_masked_diffusion import check_temperature
from ..tasks import Task, check_task
from ..utils.checks import shown
from .check_inputs import check_batch, check_call, either
from .guidance import Scales, check_guidance, check_scales, check_scales_are_used, guidance_scales
from .prompt_mixin import PromptMixin, needs_encoder, prompt_segment_of
from .ready_codes import are_codes, check_codes_dtype, has_unknown
from .segment_base import ARGUMENTS, PROCESSORS, PROMPT, TEXT, SegmentProcessor
from .segment_processors import check_segment_tokenizers, entry_by_name, make_segment, output_by_name
from .sizes_mixin import Codes, SizesMixin
from .task_table import TaskRow, TaskTable, call_of, example_calls, hub_task_of


class InputsMixin(PromptMixin, SizesMixin):
    """The part of [`VQDiTPipeline`] that checks what is passed and plans the task, before any work."""

    # The pipeline's, of its components and of diffusers
    config: Any
    transformer: Any
    scheduler: Any
    progress_bar: Callable[..., Any]
    maybe_free_model_hooks: Callable[[], None]
    _execution_device: torch.device
    _optional_components: list[str]
    _callback_tensor_inputs: list[str]

    @property
    def _segments(self) -> dict[str, SegmentProcessor]:
        """By name. Of the components that the pipeline has now: any may be exchanged for another."""
        return self._segments_of({})

    def _segments_of(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, SegmentProcessor]:
        """By name, with grids of codes of these shapes in place of the transformer's own."""
        said = self.config.get("segments") or {}
        options = {"resize_mode": self.config.resize_mode, "device": lambda: self._execution_device}
        components = self._tokenizing_components
        segments, known = self.transformer.config.segments or {}, (list(self.config.labels), self.config.lowres_factor)
        found = {
            name: make_segment(
                name,
                said.get(name) or entry_by_name(name, segments, *known),
                geometry={**geometry, "shape": shapes.get(name, geometry["shape"])},
                components=components,
                **options,
            )
            for name, geometry in segments.items()
        }
        if (prompted := prompt_segment_of(found)) in found:
            found[prompted].argument = PROMPT
        return found

    @property
    def _tokenizing_components(self) -> dict[str, Any]:
        """What segments are encoded and decoded with, by name; None for what the pipeline lacks."""
        parts = [*self._optional_components, *PROCESSORS]
        components = {name: getattr(self, name) for name in parts}
        several = components.pop("segment_tokenizers")
        if several is not None:
            check_segment_tokenizers(several, self._optional_components)
            components |= several.parts
        return components

    def check_inputs(
        self,
        passed: dict[str, Any],
        output: str | None,
        *,
        mask_image: Any,
        strength: float | None,
        guidance_scale: Scales | None,
        temperature: float | None,
        latents: Codes | None,
        num_images_per_prompt: int,
        output_type: str,
        generator: torch.Generator | list[torch.Generator] | None,
        height: int | None = None,
        width: int | None = None,
        negative: str = "",
        image_guidance_scale: float | None = None,
        **options: Any,
    ) -> tuple[Task, dict[str, list], torch.Tensor | None, int, dict[str, tuple[int, ...]]]:
        """Check a call's arguments; `options` are those that [`~check_inputs.check_call`] has besides, and `negative`
        is the argument that says what guidance leads away from, or empty.

        Returns:
            the task, what is passed by segment ([`_read`]), the masks, the number of samples without tiles, and the
            shapes of codes that height and width ask for ([`_shapes`]).

        Raises:
            ValueError: for an argument that doesn't fit, or a task that the checkpoint was not trained for.
        """
        check_scales(guidance_scale, image_guidance_scale)
        check_call(
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=None,
            strength=strength,
            output_type=output_type,
            generator=generator,
            known_tensors=self._callback_tensor_inputs,
            **options,
        )
        if temperature is not None:
            check_temperature("temperature", temperature)
        self._check_device()
        self._check_scheduler()
        task, passed = self._plan(passed, output, mask_image, strength, output_type)
        check_scales_are_used(task, guidance_scale, image_guidance_scale, self._segments)
        scale = self.default_settings(task, guidance_scale, negative=bool(negative))[0]
        scales = guidance_scales(task, scale, image_guidance_scale, self._segments)
        check_guidance(task, scales, self.transformer.config.tasks or [], negative)
        passed, segments = self._read(passed, sizes=(height, width)), self._segments
        shapes = self._shapes(task, passed, height, width, latents)
        if mask_image is not None:
            known = [name for name in passed if name in task.generated and segments[name].takes_mask]
            mask_image = segments[known[0]].read_mask(mask_image, passed[known[0]])
        total = check_batch({name: len(value) for name, value in passed.items()}, num_images_per_prompt, generator)
        partly_known = sorted(set(passed) & set(task.generated))
        if latents is not None and partly_known:
            raise ValueError(f"latents can't be given with {partly_known} partly known: both say where to start")
        if not any(segments[name].tiled for name in passed):  # its tiles are not known yet
            self.prepare_latents(task, total, latents, shapes)
        return task, passed, mask_image, total, shapes

    def _check_device(self) -> None:
        check_device(self._execution_device, "pipe.to('cpu')")

    def _check_scheduler(self) -> None:
        if not hasattr(self.scheduler, "next_event"):
            raise ValueError(
                f"scheduler is {type(self.scheduler).__name__}, but this pipeline needs a MaskedDiffusionScheduler: "
                "pipe.scheduler = MaskedDiffusionScheduler()"
            )

    def default_settings(
        self,
        task: Task,
        guidance_scale: Scales | None = None,
        num_inference_steps: int | str | None = None,
        temperature: float | None = None,
        negative: bool = False,
    ) -> tuple[Any, int | str, float | None]:
        """The guidance scale, steps and temperature of a task's call: what is passed here, and the defaults for None;
        a temperature of None is the scheduler's. `negative` is whether there is a negative prompt."""
        segments = self._segments
        generated = [segments[name] for name in task.generated]
        if guidance_scale is None:
            guided = self._can_guide(task, negative)
            guidance_scale = max(one.guidance_scale for one in generated) if guided else 1.0
        if num_inference_steps is None:
            own = [one.num_inference_steps for one in generated if one.num_inference_steps is not None]
            num_inference_steps = (
                max(own) if own else sum(one.block_length or math.prod(one.shape) for one in generated)
            )
        temperatures = [one.temperature for one in generated if one.temperature is not None]
        if temperature is None and task.given and len(temperatures) == len(generated):
            temperature = max(temperatures)
        steps = num_inference_steps if isinstance(num_inference_steps, str) else int(num_inference_steps)
        return guidance_scale, steps, temperature

    def _can_guide(self, task: Task, negative: bool = False) -> bool:
        return negative or bool(task.given) and str(Task((), task.generated)) in (self.transformer.config.tasks or [])

    def _passed(
        self, prompt: Any, image: Any, class_labels: Any, inputs: dict[str, Any] | None, class_label: Any = None
    ) -> dict[str, Any]:
        """What is not None, by segment; `class_label` is the older name of `class_labels`."""
        if class_label is not None:
            deprecate("class_label", "1.0.0", "Pass class_labels.")
        class_labels = either("class_labels", class_labels, "class_label", class_label)
        own = {TEXT: self._prompt_segment()}
        arguments = {own.get(name, name): argument for argument, name in ARGUMENTS.items()}
        named = dict(zip(arguments, (prompt, image, class_labels), strict=True))
        if inputs is not None and not isinstance(inputs, dict):
            raise ValueError(f"inputs must be a dict of what to pass by segment, got {type(inputs).__name__}")
        for name in inputs or {}:
            others = sorted(set(self.transformer.config.segments) - set(ARGUMENTS.values()))
            if name not in others:
                own_argument = next((argument for argument, segment in ARGUMENTS.items() if segment == name), None)
                also = f"; {name!r} is passed as {own_argument}" if own_argument else ""
                raise ValueError(f"inputs has {name!r}; it takes {others}{also}")
            if named.get(name) is not None:
                raise ValueError(f"inputs has {name!r}, which {arguments[name]} says too; give one of them")
        passed = {name: value for name, value in {**named, **(inputs or {})}.items() if value is not None}
        passed = {name: list(value) if isinstance(value, tuple) else value for name, value in passed.items()}
        segments = self._segments
        for name in [name for name in passed if name in segments]:
            check_codes_dtype(segments[name], segments[name].argument, passed[name])
        for name, value in passed.items():
            if isinstance(value, list) and not value:
                raise ValueError(f"{arguments.get(name, name)}=[] is an empty list; give at least one, or None")
        return passed

    # -----------------------------------------------------------------------------------------------------------------
    # The task

    def _plan(
        self,
        passed: dict[str, Any],
        output: str | None,
        mask_image: Any = None,
        strength: float | None = None,
        output_type: str = "pil",
    ) -> tuple[Task, dict[str, Any]]:
        """The task that the arguments mean, checked against those the checkpoint knows.

        What is passed and generated too is taken as partly known: texts with blanks, and pictures with a mask or a
        strength. A picture to make a picture from without either is one to enlarge, and is passed on as the segment of
        its low resolution: the second of what is returned is `passed` so changed.
        """
        segments, passed = self._segments, dict(passed)
        if missing := sorted(set(passed) - set(segments)):
            raise ValueError(
                f"{missing} was passed, but this checkpoint has the segments {sorted(segments)}, which are passed by "
                f"name (inputs=...); it knows {', '.join(self.transformer.config.tasks or [])}"
            )
        ways = {"mask_image": mask_image, "strength": strength}
        redrawn = [name for name, value in ways.items() if value is not None]
        if len(redrawn) > 1:
            raise ValueError("give mask_image or strength, not both: one says what to repaint, the other finds it")
        pictures = [name for name in passed if name in segments and segments[name].takes_mask]
        blanks = [name for name in passed if name in segments and has_unknown(segments[name], passed[name])]
        ready = [name for name in passed if name in segments and are_codes(segments[name], passed[name])]
        if mask_image is not None and (masked := set(pictures) & set(ready)):
            raise ValueError(f"mask_image is for pictures; {sorted(masked)} are codes: what is unknown is the mask")
        if strength is not None and (partial := set(pictures) & set(blanks)):
            raise ValueError(
                f"strength={strength} redraws what is known; {sorted(partial)} has codes that are the mask"
            )
        if output is None:
            output = self._default_output(passed, blanks, pictures if redrawn else [])
        elif not isinstance(output, str):
            raise ValueError(f"output={shown(output)} must be a string such as 'image' or 'image+text'")
        generated = [name.strip() for name in output.split("+")]
        if len(set(generated)) < len(generated) or not set(generated) <= set(segments):
            raise ValueError(
                f"output={shown(output)} must name segments of {list(segments)}, each once, joined by '+'"
            )
        if states := [name for name in generated if segments[name].given_only]:
            raise ValueError(f"output={output!r}: {states} has states of an encoder, which are given, never generated")
        both = [name for name in passed if name in generated]
        repainted = [name for name in pictures if name in both and redrawn]
        if redrawn and len(repainted) != 1:
            wanted = next((segment.argument for segment in segments.values() if segment.takes_mask), "")
            raise ValueError(
                f"{redrawn[0]} needs {wanted or 'a picture'}, and an output with it, got output={output!r}"
                if not repainted
                else f"{redrawn[0]} is for one picture, but {repainted} are passed and generated"
            )
        for name in both:
            if name in blanks or name in repainted or name in ready or segments[name].continues:
                continue
            lowres = next((one for one in segments.values() if one.entry.get("lowres_of") == name), None)
            if lowres is None or lowres.name in passed:
                raise ValueError(
                    f"output={output!r} asks for {name!r}, which you passed: {segments[name].how_to_pass}"
                )
            passed[lowres.name] = passed.pop(name)
        for name in blanks:
            if name not in generated:
                unknown = f"the code {segments[name].vocab_size}, the mask" if name in ready else segments[name].blank
                raise ValueError(
                    f"{shown(passed[name])} has {unknown}, which is for what is to be filled in: ask for "
                    f"output={name!r}"
                )
        task = Task(tuple(name for name in passed if name not in generated), tuple(generated))
        known = self.transformer.config.tasks
        if strength is not None and known and (finds := str(Task(task.given, tuple(repainted)))) not in known:
            raise ValueError(
                f"strength={strength} finds what to redraw by {finds!r}, which this checkpoint doesn't know; "
                "mask_image says it instead"
            )
        # What comes out as codes needs no tokenizer, unless it is partly known, and ready states or codes no encoder.
        latent = output_type == "latent"
        tokenized = self._tokenized(passed, passed if latent else task.segments)
        self._check_task(task, (*tokenized, *(n for n in ready if n in generated and not latent)))
        return task, passed

    def _tokenized(self, passed: dict[str, Any], names: Iterable[str]) -> tuple[str, ...]:
        """Those of the segments whose tokenizer or encoder makes what is passed, or tells where it ends."""
        segments = {name: self._segments[name] for name in names}
        ready = [n for n, one in segments.items() if are_codes(one, passed.get(n)) and not one.has_length]
        return tuple(n for n, one in segments.items() if n not in ready and needs_encoder(one, passed.get(n)))

    def _default_output(self, passed: dict[str, Any], blanks: list[str], repainted: list[str]) -> str:
        """The output of the one known task that what was passed fits; else what its segments' names tell.

        `blanks` are the texts to fill in, and `repainted` the pictures of which one is to be.
        """
        tasks = [Task.parse(task) for task in self.transformer.config.tasks or []]
        fitting = []
        for task in tasks:
            both = set(passed) & set(task.generated)
            if set(passed) - both == set(task.given) and set(blanks) <= both and both <= {*blanks, *repainted}:
                if len(both & set(repainted)) == bool(repainted):
                    fitting.append(task)
        if len(fitting) == 1:
            return "+".join(fitting[0].generated)
        output = output_by_name(passed, blanks, bool(repainted) or any(self._segments[n].takes_mask for n in blanks))
        if output not in self._segments:
            known = ", ".join(str(task) for task in fitting or tasks)
            raise ValueError(f"output=None: {sorted(passed)} was passed; say what to generate, for one of {known}")
        return output

    @property
    def tasks(self) -> TaskTable:
        """What the checkpoint can do: its tasks, their default steps and guidance, and what to pass."""
        rows = TaskTable()
        for task in map(Task.parse, self.transformer.config.tasks or []):
            guidance_scale, num_inference_steps, _ = self.default_settings(task)
            rows.append(
                TaskRow(str(task), int(num_inference_steps), guidance_scale, call_of(task, self._segments, {}))
            )
        return rows

    def _example_calls(self, tasks: Iterable[str]) -> list[str]:
        components, segments = self._tokenizing_components, self._segments
        there = {name for name, one in segments.items() if all(components.get(need) is not None for need in one.needs)}
        known = [task for task in tasks if set(Task.parse(task).segments) <= there]
        return example_calls(known, segments, self.config.labels)

    @property
    def hub_task(self) -> str:
        """The Hub's name of what the checkpoint does, for its card."""
        return self._hub_task_of(self.transformer.config.tasks or [])

    def _hub_task_of(self, tasks: Iterable[str]) -> str:
        kinds = {name: one.kind for name, one in self._segments.items()}
        return hub_task_of(tasks, kinds)

    def _check_task(self, task: Task, tokenized: tuple[str, ...] | None = None) -> None:
        """Raise a ValueError unless the checkpoint knows the task and has the tokenizers of its segments."""
        check_task(task, self.transformer.config.tasks or [])
        for name in task.segments if tokenized is None else tokenized:
            self._check_components(name, f"the task {str(task)!r}")

    def prepare_latents(
        self,
        task: Task,
        batch_size: int,
        latents: Codes | None,
        shapes: dict[str, tuple[int, ...]] | None = None,
    ) -> dict[str, torch.LongTensor]:
        """The codes to start from: all masked, or the caller's; of `shapes`, where these have the segment."""
        segments = self.transformer.config.segments
        codes = {}
        if latents is not None and not isinstance(latents, dict):
            if not isinstance(latents, torch.Tensor):
                raise ValueError(f"latents must be a tensor of codes or a dict of them, got {type(latents).__name__}")
            if len(task.generated) > 1:
                raise ValueError(f"latents must be a dict with the segments {list(task.generated)}")
            latents = {task.generated[0]: latents}
        chosen: dict[str, Any] = latents or {}
        for name in chosen:
            if name not in task.generated:
                raise ValueError(f"latents has the segment {name!r}, but the task {str(task)!r} doesn't generate it")
        for name in task.generated:
            size, shape = segments[name]["vocab_size"], (shapes or {}).get(name, tuple(segments[name]["shape"]))
            if name not in chosen:
                codes[name] = torch.full((batch_size, *shape), size, device=self._execution_device)
                continue
            value = chosen[name]
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"latents of {name!r} must be a tensor of codes, got {type(value).__name__}")
            wanted = str((batch_size, *shape))
            if "block_length" in segments[name]:
                wanted = f"({batch_size}, n), n any length from 1 on"
                shape = tuple(value.shape[1:]) if value.ndim == 2 else shape
            fits = value.ndim == 1 + len(shape) and len(value) == batch_size and value.numel() > 0
            if fits and "block_length" not in segments[name]:
                own, patch = value.shape[1:], segment_patch(segments, name)
                fits = own == shape or self._segment(name).any_shape
                fits = fits and all(n % p == 0 for n, p in zip(own, patch, strict=True))
            if value.dtype != torch.int64 or not fits:
                raise ValueError(
                    f"latents of {name!r} must be int64 codes of shape {wanted}, {size} where unknown; got "
                    f"{value.dtype} of shape {tuple(value.shape)}"
                )
            if name in (shapes or {}) and value.shape[1:] != shape:
                raise ValueError(
                    f"latents of {name!r} have the shape {tuple(value.shape)}, but height and width ask for {shape} "
                    "each; give one of the two"
                )
            if value.min() < 0 or value.max() > size:
                raise ValueError(
                    f"latents of {name!r} must be in [0, {size}], {size} where unknown; got values from {value.min()} "
                    f"to {value.max()}"
                )
            codes[name] = value.to(self._execution_device)
        return codes
