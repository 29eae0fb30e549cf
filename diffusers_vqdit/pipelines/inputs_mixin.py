"""What a call of a pipeline over codes asks for: its arguments checked and read, and the task they mean."""

from typing import Any

import torch

from ..schedulers.scheduling_masked_diffusion import check_temperature
from ..tasks import Task, check_task
from ..utils.checks import shown
from ..utils.images import own_size, read_images, read_mask
from ..utils.texts import check_texts
from .check_inputs import check_batch, check_call, check_labels


Codes = torch.LongTensor | dict[str, torch.LongTensor]


class InputsMixin:
    """The part of [`VQDiTPipeline`] that checks what is passed and plans the task, before any work."""

    def check_inputs(
        self,
        passed: dict[str, Any],
        output: str | None,
        *,
        mask_image: Any,
        strength: float | None,
        guidance_scale: float | None,
        temperature: float | None,
        latents: Codes | None,
        num_images_per_prompt: int,
        output_type: str,
        generator: torch.Generator | list[torch.Generator] | None,
        **options: Any,
    ) -> tuple[Task, dict[str, list], torch.Tensor | None, int]:
        """Check a call's arguments; `options` are those that [`~check_inputs.check_call`] has besides.

        Returns:
            the task, what is passed by segment ([`_read`]), the masks, and the number of samples without tiles.

        Raises:
            ValueError: for an argument that doesn't fit, or a task that the checkpoint was not trained for.
        """
        check_call(
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            strength=strength,
            output_type=output_type,
            generator=generator,
            known_tensors=self._callback_tensor_inputs,
            **options,
        )
        if temperature is not None:
            check_temperature("temperature", temperature)
        self._check_scheduler()
        task = self._plan(passed, output, mask_image, strength, output_type)
        if guidance_scale not in (None, 1.0) and not self._can_guide(task):
            unconditional = str(Task((), task.generated))
            reason = (
                f"the task {unconditional!r}, which this checkpoint doesn't know" if task.given else "a given segment"
            )
            raise ValueError(f"guidance_scale={guidance_scale} needs {reason}; use 1")
        passed = self._read(passed)
        if mask_image is not None:
            pixels = own_size(passed["image"])
            mask_image = read_mask(mask_image, tuple(pixels.shape[-2:]), len(pixels))
        total = check_batch({name: len(value) for name, value in passed.items()}, num_images_per_prompt, generator)
        partly_known = sorted(set(passed) & set(task.generated))
        if latents is not None and partly_known:
            raise ValueError(f"latents can't be given with {partly_known} partly known: both say where to start")
        if "image_lowres" not in passed:  # its tiles are told when it is encoded
            self._start(task, total, latents)
        return task, passed, mask_image, total

    def _check_scheduler(self) -> None:
        if not hasattr(self.scheduler, "next_event"):
            raise ValueError(
                f"scheduler is {type(self.scheduler).__name__}, but this pipeline needs a MaskedDiffusionScheduler: "
                "pipe.scheduler = MaskedDiffusionScheduler()"
            )

    def _defaults(
        self, task: Task, guidance_scale: float | None, num_inference_steps: int | None, temperature: float | None
    ) -> tuple[float, int, float | None]:
        """Guidance scale, steps and temperature where they are None; a temperature of None is the scheduler's."""
        kinds = {self._modality(name) for name in task.generated}
        if guidance_scale is None:
            guidance_scale = 3.0 if self._can_guide(task) and "image" in task.generated else 1.0
        if num_inference_steps is None:
            shapes = [self.transformer.config.segments[name]["shape"] for name in task.generated]
            num_inference_steps = sum(shape[0] for shape in shapes) if kinds == {"text"} else 16
        if temperature is None and task.given and "image" not in kinds:
            temperature = 0.0
        return guidance_scale, int(num_inference_steps), temperature

    def _can_guide(self, task: Task) -> bool:
        return bool(task.given) and str(Task((), task.generated)) in (self.transformer.config.tasks or [])

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
        passed = {name: list(value) if isinstance(value, tuple) else value for name, value in passed.items()}
        for name, value in passed.items():
            if isinstance(value, list) and not value:
                raise ValueError(f"{arguments.get(name, name)}=[] is an empty list; give at least one, or None")
        return passed

    def _read(self, passed: dict[str, Any]) -> dict[str, list]:
        """Lists of what was passed, by segment: texts and labels that are checked, and pictures that are read."""
        read = {}
        for name, value in passed.items():
            modality = self._modality(name)
            if modality == "image":
                read[name] = read_images(value, self.image_vq.config.in_channels)
            elif modality == "text":
                read[name] = check_texts("prompt" if name == "text" else f"inputs[{name!r}]", value)
            else:
                read[name] = check_labels("class_label", value, self._label_numbers(), self._num_labels())
        return read

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
        if output is None:
            wanted = "text" if "image" in passed or self._has_blank(passed.get("text")) else "image"
            output = "image" if redrawn else wanted
        elif not isinstance(output, str):
            raise ValueError(f"output={shown(output)} must be a string such as 'image' or 'image+text'")
        generated = [name.strip() for name in output.split("+")]
        known = self.transformer.config.segments
        if len(set(generated)) < len(generated) or not set(generated) <= set(known):
            raise ValueError(f"output={shown(output)} must name segments of {list(known)}, each once, joined by '+'")
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
                        f"{shown(passed[name])} has <mask>, which is for texts to fill in: ask for output={name!r}"
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
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"latents of {name!r} must be a tensor of codes, got {type(value).__name__}")
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
