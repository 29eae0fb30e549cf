"""Several tokenizers as one component, for segments whose codes none of a pipeline's named components makes."""

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn as nn
import transformers
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from ..utils.cards import warn_of_older_card
from ..utils.checkpoint_mixin import ModelCheckpointMixin
from ..utils.checks import check_module_name, shown
from ..utils.token_ids import makes_token_ids
from ..utils.weight_files import replacing_weights


class MultiTokenizerModel(ModelCheckpointMixin, ModelMixin, ConfigMixin):
    """Tokenizers by name, each with what stands beside it: what `MultiControlNetModel` is to controlnets.

    A pipeline's components come from its signature, which has no place for as many as there are segments.

    ``save_pretrained`` writes each into ``{name}.tokenizer``, and into ``tokenizer`` in there what stands beside it.
    These folders can be loaded on their own, by the model's class.

    Args:
        tokenizers: models of diffusers (such as `ImageVQModel` and `TextVQModel`) or of transformers (such as
            `DacModel`), by name; or tokenizers of transformers, whose ids are the codes.
        beside: what makes their inputs: a text tokenizer of transformers, or a feature extractor; by the same names,
            for those that need one.

    Raises:
        ValueError: if there is none, or one of another kind or with a name that is no identifier.
    """

    index_files = "tokenizers.*.json"  # one a variant
    _skip_layerwise_casting_patterns = ["quantize", "norm"]  # as of the tokenizers that have codebooks

    def __init__(self, tokenizers: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        beside = dict(beside or {})
        if not isinstance(tokenizers, Mapping) or not tokenizers:
            raise ValueError(f"tokenizers={shown(tokenizers)} must be a dict of one or more models by name")
        for name, model in tokenizers.items():
            check_module_name("tokenizers", name)
            if not isinstance(model, ModelMixin | transformers.PreTrainedModel) and not makes_token_ids(model):
                raise ValueError(
                    f"tokenizers[{name!r}]={shown(model)} must be a model of diffusers or transformers, or a "
                    "tokenizer of transformers"
                )
        for name, one in beside.items():
            if name not in tokenizers:
                raise ValueError(f"beside has {name!r}, but tokenizers are {list(tokenizers)}")
            if not hasattr(one, "save_pretrained"):
                raise ValueError(f"beside[{name!r}]={shown(one)} must be a tokenizer or a processor of transformers")
        models = {name: one for name, one in tokenizers.items() if isinstance(one, nn.Module)}
        self.tokenizers, self.beside = nn.ModuleDict(models), beside
        self.alone = {name: one for name, one in tokenizers.items() if name not in models}  # of token ids
        # Codebooks are read outside of their modules' calls.
        self._supports_group_offloading = all(
            getattr(one, "_supports_group_offloading", True) for one in models.values()
        )
        # By which pipelines know a device where there is no model.
        self.register_buffer("place", torch.empty(0), persistent=False)
        # As in model_index.json.
        self.register_to_config(
            kinds={name: _kind_of(model) for name, model in tokenizers.items()},
            kinds_beside={name: _kind_of(one) for name, one in beside.items()},
        )

    @property
    def saved_parts(self) -> dict[str, Any]:
        """What its folder has, by subfolder."""
        found: dict[str, Any] = {}
        for name, model in {**self.tokenizers, **self.alone}.items():
            found[f"{name}.tokenizer"] = model
            if name in self.beside:
                found[f"{name}.tokenizer/tokenizer"] = self.beside[name]
        return found

    @property
    def parts(self) -> dict[str, Any]:
        """The tokenizers by name, and as ``{name}.tokenizer`` what stands beside them."""
        return {**self.tokenizers, **self.alone, **{f"{name}.tokenizer": one for name, one in self.beside.items()}}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write all tokenizers; the arguments are those of any model of diffusers."""
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        with replacing_weights(save_directory) as unfinished:
            self.save_config(unfinished)
            for folder, part in self.saved_parts.items():
                if isinstance(part, nn.Module):
                    part.save_pretrained(str(unfinished / folder), **_accepted(part.save_pretrained, options))
                else:
                    part.save_pretrained(str(unfinished / folder))
            if variant is not None:
                # By such a name diffusers knows that a component has the variant. It splits all names in the folder
                # at a dot, which is why those of the subfolders have one.
                kept = json.dumps({"variant": variant, "tokenizers": list(self.config.kinds)}, indent=2)
                Path(unfinished, f"tokenizers.{variant}.json").write_text(kept + "\n", encoding="utf-8")
            if push_to_hub:
                warn_of_older_card(self, unfinished, Path(save_directory))
        if push_to_hub:
            self._push_saved(save_directory, **kwargs)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Refused: the config tells which classes the tokenizers are of, and not their sizes.

        Raises:
            ValueError: always. A ``device_map`` that shares a pipeline out asks for it, to learn the sizes.
        """
        raise ValueError(
            f"{cls.__name__} has its tokenizers' sizes in their folders, not in its config, so that its pipeline "
            'can\'t be shared out: load it with device_map="cuda" or another single device, or without'
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "MultiTokenizerModel":
        """Load all tokenizers; the arguments, which are those of any model of diffusers, go to each.

        Raises:
            ValueError: for a config that names no models.
        """
        place = kwargs.pop("subfolder", None) or ""
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, subfolder=place or None, **hub)
        # Checks the class and the format; the rest are no arguments of ours.
        cls.extract_init_dict({name: value for name, value in config.items() if name.startswith("_")})
        parts = []
        for entry, end in (("kinds", ""), ("kinds_beside", "/tokenizer")):
            kinds, found = config.get(entry), {}
            if not isinstance(kinds, dict):
                raise ValueError(f"{pretrained_model_name_or_path}: {entry}={shown(kinds)} must be classes by name")
            for name, kind in kinds.items():
                check_module_name(f"{pretrained_model_name_or_path}: {entry}", name)  # it names a folder
                folder = "/".join(part for part in (place, f"{name}.tokenizer{end}") if part)
                source = pretrained_model_name_or_path
                if os.path.isdir(source):  # errors of diffusers name a folder without the subfolder
                    source, folder = os.path.join(source, folder), ""
                part: Any = _class_of(f"{pretrained_model_name_or_path}: {entry}[{name!r}]", kind)
                options = kwargs if issubclass(part, ModelMixin) else hub
                if issubclass(part, transformers.PreTrainedModel):
                    options = hub | {n: kwargs[n] for n in ("variant", "dtype", "device_map") if n in kwargs}
                    options |= {"dtype": kwargs["torch_dtype"]} if kwargs.get("torch_dtype") is not None else {}
                found[name] = _load_whole(part, source, folder, options)
            parts.append(found)
        return cls(*parts).eval()


_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


def _kind_of(part: Any) -> list[str]:
    """Library and class. Classes of this package are diffusers', where importing it puts them."""
    library = type(part).__module__.split(".")[0]
    return ["transformers" if library == "transformers" else "diffusers", type(part).__name__]


def _class_of(where: str, kind: Any) -> type:
    libraries = {"diffusers": diffusers, "transformers": transformers}
    if not isinstance(kind, list | tuple) or len(kind) != 2 or kind[0] not in libraries:
        raise ValueError(f"{where}={shown(kind)} must be [library, class], of {list(libraries)}")
    found = getattr(libraries[kind[0]], str(kind[1]), None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ValueError(f"{where}={shown(kind)} is no class of {kind[0]}'s that can be loaded")
    return found


def _load_whole(part: Any, source: str | os.PathLike, folder: str, options: dict[str, Any]) -> Any:
    """A model with all its weights, or what stands beside one.

    Raises:
        ValueError: if weights are missing, as in a folder of another class: libraries warn, and draw others.
    """
    if not issubclass(part, nn.Module):
        return part.from_pretrained(source, subfolder=folder, **options)
    model, loading = part.from_pretrained(source, subfolder=folder, output_loading_info=True, **options)
    if missing := sorted(loading["missing_keys"]):
        place = "/".join(filter(None, (str(source), folder)))
        raise ValueError(f"{place} lacks {missing[0]!r} and {len(missing) - 1} more weights of a {part.__name__}")
    return model


def _accepted(function: Any, options: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}
