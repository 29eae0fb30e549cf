"""What the pipelines of this package have in common."""

import os
from pathlib import Path
from typing import Any

import torch.nn as nn
from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME

from ..hub.checkpoint_mixin import CheckpointMixin, check_saveable
from ..hub.remote_code import save_remote_code
from ..utils.checks import shown
from ..utils.weight_files import replacing_weights


class PluginPipelineMixin(CheckpointMixin):
    """For a `DiffusionPipeline` whose saved form can be loaded from the Hub, though its classes are not diffusers'.

    No pipeline itself: diffusers wants a single one in a repository's ``pipeline.py``.
    """

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
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, safe_serialization=safe_serialization, variant=variant, **kwargs)
