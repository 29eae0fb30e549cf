"""Checks of what pipelines are passed, before any work. Each error names the argument, its value and what fits."""

import inspect
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..schedulers.scheduling_masked_diffusion import MAX_STEPS
from ..utils.checks import check_choice, check_flag, check_integer, check_number, shown


MAX_SAMPLES = 65_536  # of one call
MAX_SIDE = 65_536  # pixels


def check_call(
    *,
    num_images_per_prompt: int,
    num_inference_steps: int | str | None,
    guidance_scale: float | None,
    strength: float | None,
    output_type: str,
    return_dict: bool,
    generator: torch.Generator | list[torch.Generator] | None,
    callback_on_step_end: Any,
    tensor_inputs: list[str],
    known_tensors: list[str],
) -> None:
    """The arguments that both pipelines' ``__call__`` have; None is a default that is chosen later."""
    check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_SAMPLES)
    if num_inference_steps is not None and not isinstance(num_inference_steps, str):  # which the scheduler knows
        check_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    if guidance_scale is not None:
        check_number("guidance_scale", guidance_scale)
    if strength is not None:
        check_number("strength", strength, 0, 1, above=True)
    check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
    check_flag("return_dict", return_dict)
    check_generator(generator)
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise ValueError(f"callback_on_step_end={shown(callback_on_step_end)} must be callable, or None")
    if not isinstance(tensor_inputs, list) or any(name not in known_tensors for name in tensor_inputs):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs={shown(tensor_inputs)} must be a list from {known_tensors}"
        )


def callback_inputs(callback: Any, tensor_inputs: list[str] | None) -> list[str]:
    """What a callback gets: what one of diffusers' classes asks for, else what the caller says, else the latents."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        return callback.tensor_inputs
    return ["latents"] if tensor_inputs is None else tensor_inputs


def codes_of_callback(outputs: Any, codes: dict[str, torch.LongTensor]) -> dict[str, torch.LongTensor]:
    """The codes to go on with after a callback that had `codes`, by segment, and returned `outputs`."""
    value = _returned_latents(outputs, codes)
    changed = value if len(codes) > 1 or value is codes else dict.fromkeys(codes, value)
    if not isinstance(changed, dict) or changed.keys() != codes.keys():
        raise ValueError(f"latents of callback_on_step_end={shown(value)} must be a dict of codes of {list(codes)}")
    for name, old in codes.items():
        new = changed[name]
        if not isinstance(new, torch.Tensor) or new.dtype != old.dtype or new.shape != old.shape:
            got = f"{new.dtype} of shape {tuple(new.shape)}" if isinstance(new, torch.Tensor) else shown(new)
            raise ValueError(
                f"latents of callback_on_step_end must be {old.dtype} codes of {name!r} of shape {tuple(old.shape)}, "
                f"got {got}"
            )
    return {name: changed[name] for name in codes}


def latents_of_callback(outputs: Any, latents: torch.Tensor) -> torch.Tensor:
    """The latents to go on with after a callback that had `latents` and returned `outputs`."""
    new = _returned_latents(outputs, latents)
    if not isinstance(new, torch.Tensor) or not new.is_floating_point() or new.shape != latents.shape:
        got = f"{new.dtype} of shape {tuple(new.shape)}" if isinstance(new, torch.Tensor) else shown(new)
        raise ValueError(
            f"latents of callback_on_step_end must be floating-point of shape {tuple(latents.shape)}, got {got}"
        )
    return new


def _returned_latents(outputs: Any, latents: Any) -> Any:
    if outputs is not None and not isinstance(outputs, dict):
        raise ValueError(f"callback_on_step_end returned {shown(outputs)}; it must be a dict with 'latents', or None")
    return (outputs or {}).get("latents", latents)


def check_generator(generator: Any, *, cpu_only: bool = False) -> None:
    """A `torch.Generator`, or a list of them; with `cpu_only` a single one on the CPU, or None either way."""
    every = generator if isinstance(generator, list) and not cpu_only else [generator]
    if generator is None:
        return
    if not every or not all(isinstance(one, torch.Generator) for one in every):
        wanted = "a torch.Generator" if cpu_only else "a torch.Generator or a list of them, one a sample"
        raise ValueError(f"generator={shown(generator)} must be {wanted}, or None")
    if cpu_only and generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, where the masks are drawn, got one on {generator.device}")


def check_batch(sizes: dict[str, int], num_images_per_prompt: int, generator: Any, *, broadcast: bool = False) -> int:
    """How many samples are generated, without tiles: `sizes` is how many of each argument were passed."""
    several = set(sizes.values()) - {1} if broadcast else set(sizes.values())
    if len(several) > 1:
        also = ", or one that stands for all" if broadcast else ""
        raise ValueError(f"what is given must have one batch size{also}, got {sizes}")
    total = max(sizes.values(), default=1) * int(num_images_per_prompt)  # numpy's small integers overflow
    if total > MAX_SAMPLES:
        raise ValueError(
            f"num_images_per_prompt={num_images_per_prompt} of {sizes} makes {total} samples; a call draws at most "
            f"{MAX_SAMPLES}"
        )
    if isinstance(generator, list) and len(generator) != total:
        raise ValueError(f"generator is a list of {len(generator)}, but {total} samples are generated")
    return total


def as_list(value: Any) -> list:
    """One or several of something as a list."""
    return list(value) if isinstance(value, list | tuple | range) else [value]


def either(name: str, value: Any, old_name: str, old_value: Any) -> Any:
    """The value of an argument that may be given by its older name.

    Raises:
        ValueError: if both are given.
    """
    if value is not None and old_value is not None:
        raise ValueError(f"give {name} or {old_name}, its older name, not both")
    return old_value if value is None else value


def check_labels(name: str, labels: Any, numbers: dict[str, int], size: int) -> list[int]:
    """One or several labels, by number or name, as a list of numbers in [0, size)."""
    labels = as_list(labels.tolist() if isinstance(labels, np.ndarray) and labels.ndim == 1 else labels)
    if not labels:
        raise ValueError(f"{name}=[] is an empty list; give at least one, or None")
    found = []
    for label in labels:
        if isinstance(label, str) and label in numbers:
            found.append(numbers[label])
        elif isinstance(label, Integral) and not isinstance(label, bool) and 0 <= int(label) < size:
            found.append(int(label))
        else:
            raise ValueError(
                f"{name}={shown(label)} must be a number in [0, {size}) or one of {shown(list(numbers), 400)}, or a "
                "list of them"
            )
    return found


def check_latents(latents: Any, shape: Iterable[int]) -> None:
    """Noise to begin from: a tensor of finite floats of this shape."""
    shape = tuple(shape)
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point() or tuple(latents.shape) != shape:
        got = (
            f"{latents.dtype} of shape {tuple(latents.shape)}" if isinstance(latents, torch.Tensor) else shown(latents)
        )
        raise ValueError(f"latents must have shape {shape} and hold floats, got {got}")
    if not latents.isfinite().all():
        raise ValueError("latents must be finite, got NaN or infinite values")


class FiniteChecks:
    """Whether what a transformer predicts in a run is finite: noted at each step, and read once, at the end.

    Reading it at each step would wait for the device.

    Args:
        what: ``"logits are"``, or what else the message is to say.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.found: list[tuple[torch.Tensor, torch.Tensor, float | dict[str, float]]] = []

    def add(self, finite: torch.Tensor, parts: torch.Tensor, guidance_scale: float | dict[str, float]) -> None:
        """Bools () on the device: whether a prediction is finite, and the parts that guidance combined it from."""
        self.found.append((finite, parts, guidance_scale))

    def read(self) -> None:
        """Raise a ValueError for the first step that was not finite. It names the guidance scale where the parts
        were."""
        if not self.found:
            return
        finite, parts = (torch.stack(flags).tolist() for flags in list(zip(*self.found, strict=True))[:2])
        if all(finite):
            return
        first = finite.index(False)
        if parts[first]:
            raise ValueError(
                f"guidance_scale={self.found[first][2]} is too large: with it the transformer's {self.what} not finite"
            )
        raise ValueError(f"the transformer's {self.what} not finite")


def check_gaussian(scheduler: Any) -> None:
    """A scheduler of Gaussian diffusion or flow matching, whose step takes a prediction, a time and the sample."""
    step = getattr(scheduler, "step", None)
    known = hasattr(scheduler, "alphas_cumprod") or hasattr(scheduler, "sigmas")
    if step is not None and known and not hasattr(scheduler, "next_event"):
        parameters = list(inspect.signature(step).parameters.values())[3:]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if all(one.default is not one.empty or one.kind in variadic for one in parameters):
            return
    raise ValueError(
        f"scheduler is {type(scheduler).__name__}; this pipeline needs one of Gaussian diffusion or flow "
        "matching with a step(model_output, timestep, sample), such as DDIMScheduler"
    )
