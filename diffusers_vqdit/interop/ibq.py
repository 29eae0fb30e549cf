"""SEED-Voken's IBQ (Shi et al. 2024): taming's layout; the code is the argmax of the dot product."""

import torch

from . import taming


def convert(state_dict: dict[str, torch.Tensor], config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments and state dict of `ImageVQModel` from IBQ's weights."""
    model_config, converted = taming.convert(state_dict, config)
    model_config["quantizer_type"] = "ibq"
    if config.get("l2_normalize", False):
        model_config["codebook_norm"] = "l2"
    return model_config, converted
