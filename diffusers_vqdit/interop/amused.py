"""aMUSEd's VQ-VAE (Patil et al. 2024): weights in diffusers' own layout, for pixels in [0, 1].

`ImageVQModel.from_pretrained` loads it as well, and then takes pixels in [0, 1] as the stock model does.
"""

import re

import torch

from . import taming


def to_taming(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Diffusers' names to taming's, so far as [`taming.layout_config`] reads them."""
    levels = taming.count(state_dict, r"decoder\.up_blocks\.(\d+)\.")
    renamed = {}
    for name, value in state_dict.items():
        name = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", name)
        name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
        name = name.replace(".resnets.", ".block.").replace(".mid_block.attentions.0.", ".mid.attn_1.")
        renamed[name.replace(".attentions.", ".attn.").replace(".to_q.", ".q.")] = value
    return renamed


def convert(state_dict: dict[str, torch.Tensor], config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments and state dict of `ImageVQModel` from aMUSEd's weights."""
    names = {"latent_channels": "z_channels", "layers_per_block": "num_res_blocks", "num_vq_embeddings": "n_embed"}
    config = {**config, **{ours: config[theirs] for theirs, ours in names.items() if theirs in config}}
    model_config = taming.layout_config(to_taming(state_dict), config)
    for name in ("lookup_from_codebook", "force_upcast", "scaling_factor", "sample_size"):
        if name in config:
            model_config[name] = config[name]
    model_config["pixel_range"] = (0.0, 1.0)
    return model_config, state_dict
