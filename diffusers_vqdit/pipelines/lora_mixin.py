"""LoRAs of a pipeline's transformer, checked before they are loaded."""

from typing import Any

import torch
from diffusers.loaders import Mochi1LoraLoaderMixin

from .pipeline_utils import check_lora


# Of diffusers' mixins for LoRA this is one for pipelines with a transformer and nothing else to adapt.
class LoraMixin(Mochi1LoraLoaderMixin):
    """The part of [`VQDiTPipeline`] that loads LoRAs."""

    transformer: Any  # the pipeline's

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA of the transformer, as diffusers' pipelines do.

        Raises:
            ValueError: if a layer or a shape is not this transformer's, or a value is not finite.
        """
        options = {name: value for name, value in kwargs.items() if name != "low_cpu_mem_usage"}
        check_lora(self.lora_state_dict(pretrained_model_name_or_path_or_dict, **options), self.transformer)
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **kwargs)
