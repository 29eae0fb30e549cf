"""What the pipelines of this package have in common."""

import os
from typing import Any

from diffusers import DiffusionPipeline


class PluginPipeline(DiffusionPipeline):
    """A `DiffusionPipeline` whose saved form can be loaded from the Hub, though its classes are not diffusers'."""

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
