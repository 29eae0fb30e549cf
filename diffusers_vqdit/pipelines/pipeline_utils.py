"""What the pipelines of this package have in common."""

import os
from typing import Any

from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME

from ..hub.checkpoint_mixin import CheckpointMixin
from ..hub.remote_code import save_remote_code


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
