"""What every class with checkpoints has: configs and weights that are checked, and publishing in one commit."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn as nn
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import CommitInfo, create_repo

from .cards import fill_blank_card, warn_of_older_card
from .checks import check_integer, shown
from .hub import push_folder, saved_files
from .weight_files import check_finite, check_weights, replacing_weights, weight_file_of


# Raised when a checkpoint means something else than before, so that older code would misread it.
FORMAT_VERSION = 1


if TYPE_CHECKING:  # what it is mixed into, whose methods it calls
    from diffusers import ModelMixin as Checkpointed
else:
    Checkpointed = object


class CheckpointMixin(Checkpointed):
    """Checkpoints carry the version of their format, are checked when they are read, and published in one commit.

    A checkpoint without a version, such as one of diffusers' own classes, is of the first. One of a later version
    than `FORMAT_VERSION` is refused, before anything is loaded.
    """

    def register_to_config(self, **kwargs: Any) -> None:
        """Put arguments into the config; numpy's numbers as Python's, for JSON knows no others."""
        super().register_to_config(**{name: _without_numpy(value) for name, value in kwargs.items()})

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config with the version of its format."""
        self.register_to_config(_format_version=FORMAT_VERSION)
        super().save_config(save_directory, push_to_hub, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file)
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must hold a JSON object of {cls.__name__}'s arguments, got {shown(config)}")
        return config

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """The arguments in a config, after a look at its format's version.

        Raises:
            ValueError: if the format is later than what this version reads, or no version.
        """
        found = check_integer("_format_version", config_dict.get("_format_version", 1), 1)
        if found > FORMAT_VERSION:
            raise ValueError(
                f"_format_version={found}: this checkpoint of {cls.__name__} has format version {found}, but the "
                f"installed diffusers_vqdit reads versions up to {FORMAT_VERSION}: upgrade it, or load an earlier "
                "revision of the checkpoint"
            )
        defaults = config_dict.get("_use_default_values", [])
        if not isinstance(defaults, list | tuple | set):
            raise ValueError(f"_use_default_values={shown(defaults)} must be a list of {cls.__name__}'s arguments")
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As diffusers'; what is wrong with a checkpoint is told with its place.

        Raises:
            ValueError: if its config or its weights can't be used; names the folder, and the argument or the tensor.
        """
        default_dtype = torch.get_default_dtype()
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except ValueError as error:
            if str(pretrained_model_name_or_path) in str(error):
                raise
            subfolder = kwargs.get("subfolder") or ""
            place = Path(str(pretrained_model_name_or_path), str(subfolder), cls.config_name)
            raise ValueError(f"{place}: {error}") from error
        finally:
            # diffusers makes the model in the dtype asked for, and leaves that as the default where it fails.
            if torch.get_default_dtype() != default_dtype:
                torch.set_default_dtype(default_dtype)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo:
        # What `push_to_hub` and `save_pretrained(push_to_hub=True)` of diffusers upload with. The latter's folder is
        # the user's, who may keep other things there.
        saved = saved_files(self, working_dir)
        if subfolder is None:
            saved += fill_blank_card(self, Path(working_dir, "README.md"), repo_id, saved, token)
        return push_folder(
            working_dir,
            repo_id,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            path_in_repo=subfolder,
            files=saved,
        )

    def _push_saved(
        self,
        folder: str | os.PathLike,
        repo_id: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        create_pr: bool = False,
    ) -> None:
        """Publish what was just saved in a folder, and its card: diffusers' ``save_pretrained(push_to_hub=True)``."""
        name = repo_id or Path(folder).resolve().name
        repo_id = create_repo(name, exist_ok=True, private=private, token=token).repo_id
        if not Path(folder, "README.md").is_file():
            card = load_or_create_model_card(repo_id, token=token, is_pipeline=hasattr(self, "components"))
            populate_model_card(card).save(Path(folder, "README.md"))
        self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)


class ComponentCheckpointMixin(CheckpointMixin):
    """For models and schedulers: a config of another class is refused."""

    # Other names under which diffusers has saved what this class loads.
    _saved_class_names: tuple[str, ...] = ()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """The arguments in a config, which must be this class's, a base's or a subclass's.

        Raises:
            ValueError: if the config is another class's, or its format's version can't be read.
        """
        found = config_dict.get("_class_name", cls.__name__)
        bases = [base.__name__ for base in cls.__mro__ if hasattr(base, "config_name")]
        if found not in [*bases, *cls._saved_class_names, *_subclass_names(cls)]:
            raise ValueError(f"_class_name={shown(found)} must be {cls.__name__!r}, or a class that it extends")
        return super().extract_init_dict(config_dict, **kwargs)


class ModelCheckpointMixin(ComponentCheckpointMixin):
    """For models: weights are loaded and saved whole, finite and as the config says, or refused by name."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As diffusers', but weights that the config doesn't fit are refused, where diffusers warns and draws others.

        Raises:
            ValueError: if a tensor is missing, not finite, or has another shape or kind of number than the config
                asks for (with ``ignore_mismatched_sizes=True`` shapes may differ), or if the config can't be used.
            OSError: if a file is missing or can't be read.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            _check_shard_indices(folder, kwargs.get("variant"))
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if not str(error).startswith("Unable to load weights"):
                raise
            cause: BaseException = error
            while cause.__context__ is not None:
                cause = cause.__context__
            reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
            raise OSError(f"{str(error).strip()} It is not whole, or no file of weights: {reason}") from error

    def _fix_state_dict_keys_on_load(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        # Called by diffusers with what a file holds, before anything else is done with it.
        if not isinstance(state_dict, Mapping) or not all(
            isinstance(value, torch.Tensor) for value in state_dict.values()
        ):
            raise ValueError(f"the file of weights must hold tensors by name, got a {type(state_dict).__name__}")
        super()._fix_state_dict_keys_on_load(state_dict)

    @classmethod
    def _load_pretrained_model(
        cls, model: nn.Module, state_dict: Mapping | None, resolved_model_file: list[str], *args: Any, **kwargs: Any
    ) -> tuple:
        # Called by diffusers' from_pretrained when the model is made and before it gets its weights.
        if kwargs.get("hf_quantizer") is None:  # quantized weights have other shapes and dtypes
            if state_dict is not None:
                files: Iterable[tuple[str, Mapping]] = [(resolved_model_file[0], state_dict)]
            else:
                files = ((file, load_state_dict(file)) for file in resolved_model_file)
            check_weights(model.state_dict(), files, shapes=not kwargs.get("ignore_mismatched_sizes"))
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

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
        """As diffusers'; and older weights of the same variant in the folder are replaced whatever their form.

        A save that fails leaves the folder as it was.

        Raises:
            ValueError: before anything is written, if a tensor is not finite or an adapter (LoRA) is loaded.
            OSError: if the folder can't be written.
        """
        check_saveable(self)
        with replacing_weights(save_directory) as unfinished:
            super().save_pretrained(
                str(unfinished),
                is_main_process,
                save_function,
                safe_serialization,
                variant,
                max_shard_size,
                use_flashpack=kwargs.pop("use_flashpack", False),
            )
            if push_to_hub:
                warn_of_older_card(self, unfinished, Path(save_directory))
        if push_to_hub:
            self._push_saved(save_directory, **kwargs)


def check_saveable(module: nn.Module, name: str | None = None) -> None:
    """Raise a ValueError if a model's weights are not finite, or can't be loaded again as an adapter is in them."""
    owner = name or type(module).__name__
    if any(".base_layer." in key for key, _ in module.named_parameters()):
        adapters = list(getattr(module, "peft_config", {}) or {})
        raise ValueError(
            f"{owner} has the adapters {adapters} loaded, with which its folder couldn't be loaded again: unload them "
            "(pipe.unload_lora_weights()) to save the base weights, fuse them first (pipe.fuse_lora(), then "
            "pipe.unload_lora_weights()) to save the sum, or save them alone (pipe.save_lora_weights)"
        )
    if getattr(module, "hf_quantizer", None) is None:
        own = isinstance(module, ModelCheckpointMixin)
        check_finite(module.state_dict() if own else dict(module.named_parameters()), owner)


def _check_shard_indices(folder: Path, variant: str | None) -> None:
    """Raise a ValueError that names an index of shards in a folder that is none."""
    for path in sorted(folder.glob("*.index*.json")):
        if weight_file_of(path.name) != ("diffusion_pytorch_model", variant or ""):
            continue
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            names = index["weight_map"]
            fits = bool(names) and all(isinstance(file, str) for item in names.items() for file in item)
            fits = fits and isinstance(index.get("metadata"), dict)
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise ValueError(f"{path} must hold 'metadata' and a 'weight_map' of each tensor's file; it is broken")


def _subclass_names(cls: type) -> set[str]:
    subclasses: list[type] = cls.__subclasses__()
    return {subclass.__name__ for subclass in subclasses}.union(*map(_subclass_names, subclasses))


def _without_numpy(value: Any) -> Any:
    """A config's value with Python's own numbers, in lists, tuples and dicts too."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_without_numpy(one) for one in value)
    if type(value) is dict:
        return {name: _without_numpy(one) for name, one in value.items()}
    return value
