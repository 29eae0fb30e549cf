"""What the pipelines of this package have in common."""

import functools
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME, convert_unet_state_dict_to_peft

from ..utils.cards import warn_of_older_card
from ..utils.checkpoint_mixin import CheckpointMixin, check_saveable
from ..utils.checks import shown
from ..utils.remote_code import save_remote_code
from ..utils.weight_files import replacing_weights


class CallStates(threading.local):
    """What the calls of this thread tell of themselves, for each pipeline that of the innermost call."""

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


_call_states = CallStates()


def in_cache(model: Any, method: str, *args: str) -> AbstractContextManager:
    """One of [`~models.cache_mixin.DenoiserCacheMixin`]'s contexts; of a model without them, as stock DiT, nothing."""
    return getattr(model, method, lambda *args: nullcontext())(*args)


def with_own_state(call: Callable) -> Callable:
    """A pipeline's call with a state of its own; one that its callback makes gives the state back at its end."""

    @functools.wraps(call)
    def with_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _call_states.of.get(self, {})
        outer = before if before.get("runs") else None
        state = {**before, "runs": True, "outer": outer, "interrupts": self._interrupts}
        _call_states.of[self] = state
        try:
            with in_cache(self.transformer, "own_hooks"):
                return call(self, *args, **kwargs)
        finally:
            state["runs"] = False
            if outer is not None:
                _call_states.of[self] = outer

    return with_state


def _of_call(name: str) -> property:
    """An attribute of a pipeline that every thread has its own value of, as every call has."""

    def read(self: Any) -> Any:
        try:
            return _call_states.of[self][name]
        except KeyError:
            raise AttributeError(f"{name} is known while the pipeline is called, and after that") from None

    def write(self: Any, value: Any) -> None:
        _call_states.of.setdefault(self, {})[name] = value

    return property(read, write)


def check_components(**components: Any) -> None:
    """Raise a ValueError that names a component without which there is no pipeline."""
    for name, component in components.items():
        if component is None:
            raise ValueError(f"{name}=None must be a component: the pipeline can't do without it")


def check_lora(state_dict: dict[str, torch.Tensor], transformer: torch.nn.Module) -> None:
    """Raise a ValueError unless each tensor of a LoRA is finite and belongs to a layer of the transformer, whose size
    it has. Names are those of PEFT behind ``transformer.``."""
    modules = dict(transformer.named_modules())
    tensors = {n.removeprefix("transformer."): v for n, v in state_dict.items() if n.startswith("transformer.")}
    if not tensors or len(tensors) < len(state_dict):
        raise ValueError(
            f"the LoRA must have tensors of 'transformer', and of nothing else; it has {shown(list(state_dict), 400)}"
        )
    if not any(".lora_" in name for name in tensors):  # diffusers' older names
        tensors = convert_unet_state_dict_to_peft(tensors)
    for name, value in tensors.items():
        path, _, side = name.partition(".lora_")
        layer = modules.get(path)
        layer = getattr(layer, "base_layer", layer)
        if getattr(layer, "weight", None) is None:
            raise ValueError(f"the LoRA has the layer {path!r}, which this transformer doesn't have: it is another's")
        if not value.isfinite().all():
            raise ValueError(f"the LoRA's tensor {name!r} is not finite")
        # Of its features, not of its weight: a quantized weight has another shape.
        inputs, outputs = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
        own = {"A.": (-1, inputs), "B.": (0, outputs)}.get(side[:2])
        if inputs is not None and own is not None and value.ndim > 1 and value.shape[own[0]] != own[1]:
            raise ValueError(
                f"the LoRA's tensor {name!r} has shape {tuple(value.shape)}, but the layer goes from {inputs} to "
                f"{outputs} features: it is another model's"
            )


class PluginPipelineMixin(CheckpointMixin):
    """For a `DiffusionPipeline` whose saved form can be loaded from the Hub, though its classes are not diffusers'.

    No pipeline itself: diffusers wants a single one in a repository's ``pipeline.py``.
    """

    # By diffusers' names, which callbacks read and write.
    _guidance_scale = _of_call("guidance_scale")
    _num_timesteps = _of_call("num_timesteps")

    @property
    def guidance_scale(self) -> float:
        """Of the call that runs in this thread, or ran last; a callback may set ``pipe._guidance_scale``."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Of the call that runs in this thread, or ran last."""
        return self._num_timesteps

    _interrupts = 0

    @property
    def interrupt(self) -> bool:
        """Whether the call that runs in this thread is to end: ``pipe._interrupt = True``, said in any thread or by a
        callback, ends all the calls that run then, but for one in whose callback it is said by another call's."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return self._interrupts != _call_states.of.get(self, {}).get("interrupts", self._interrupts)

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        state = _call_states.of.setdefault(self, {})
        if not value:
            state["interrupts"] = self._interrupts
            return
        self._interrupts += 1
        outer = state.get("outer")
        while outer is not None:  # the calls in whose callbacks this one runs
            outer["interrupts"] += 1
            outer = outer.get("outer")

    def __setattr__(self, name: str, value: Any) -> None:
        """As diffusers', which leaves a component that was None before out of the config, and so of what is saved."""
        super().__setattr__(name, value)
        if value is not None and name in self.__dict__ and list(self.config.get(name) or ()) == [None, None]:
            self.register_modules(**{name: value})

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Record our classes as diffusers', where importing this package puts them, and write ``pipeline.py``.

        `DiffusionPipeline.from_pretrained` refuses repositories with components of a library that it doesn't know.
        """
        ours = ("diffusers_vqdit", DIFFUSERS_DYNAMIC_MODULE_NAME)  # as a package, and as a file of a repository
        recorded = {
            name: ("diffusers", self.config[name][1])
            for name, component in self.components.items()
            if component is not None and self.config[name][0].split(".")[0] in ours
        }
        self.register_to_config(**recorded)
        if type(self).__module__.split(".")[0] in ours:
            os.makedirs(save_directory, exist_ok=True)
            save_remote_code(type(self), save_directory)
        super().save_config(save_directory, push_to_hub, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """The components and arguments in ``model_index.json``.

        Raises:
            ValueError: if the entry of a component isn't ``[library, class]``, or the format is a later one.
        """
        for name in cls._get_signature_keys(cls)[0]:
            entry = config_dict.get(name)
            if entry is not None:
                pair = isinstance(entry, list | tuple) and len(entry) == 2
                if not pair or not (all(isinstance(part, str) for part in entry) or list(entry) == [None, None]):
                    raise ValueError(f"{name}={shown(entry)} must be [library, class], or [null, null] for none")
        return super().extract_init_dict(config_dict, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As diffusers'; and older weights of the same variant in the folders are replaced whatever their form.

        A save that fails leaves the folder as it was.

        Raises:
            ValueError: before anything is written, if a component's tensor is not finite or an adapter (LoRA) is
                loaded.
            OSError: if the folder can't be written.
        """
        for name, component in self.components.items():
            if isinstance(component, nn.Module):
                check_saveable(component, name)
        with replacing_weights(save_directory) as unfinished:
            super().save_pretrained(
                str(unfinished),
                safe_serialization,
                variant,
                max_shard_size,
                use_flashpack=kwargs.pop("use_flashpack", False),
            )
            if push_to_hub:
                warn_of_older_card(self, unfinished, Path(save_directory))
        if push_to_hub:
            self._push_saved(save_directory, **kwargs)
