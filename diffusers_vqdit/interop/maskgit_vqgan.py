"""MaskGIT's VQGAN (Chang et al. 2022) as open-muse has it, for pixels in [0, 1]."""

import re

import torch

from . import taming


def convert(state_dict: dict[str, torch.Tensor], config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments and state dict of `ImageVQModel` from MaskGIT-VQGAN's weights."""
    levels = taming.count(state_dict, r"encoder\.down\.(\d+)\.")
    taming.check_shapes(
        state_dict,
        {
            "encoder.conv_in.weight": 4,
            "encoder.conv_out.weight": 4,
            "decoder.conv_in.weight": 4,
            "decoder.conv_out.weight": 4,
            "quantize.embedding.weight": 2,
            **{f"encoder.down.{level}.block.0.conv2.weight": 4 for level in range(levels)},
        },
    )
    widths = [state_dict[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    channels, in_channels = state_dict["encoder.conv_in.weight"].shape[:2]
    taming.require(
        bool(widths) and channels == widths[0],
        f"the first level must be as wide as conv_in, got {channels} and {widths[:1]}; channel_mult must begin with 1",
    )
    taming.require(
        all(width % 32 == 0 for width in widths),
        f"widths must be multiples of the 32 groups of the norms, got {widths}",
    )
    layers = taming.count(state_dict, r"encoder\.down\.0\.block\.(\d+)\.")
    latent_channels = state_dict["encoder.conv_out.weight"].shape[0]
    num_codes, code_dim = state_dict["quantize.embedding.weight"].shape
    taming.check_config(
        config,
        {
            "num_channels": in_channels,
            "hidden_channels": channels,
            "channel_mult": [width // channels for width in widths],
            "num_res_blocks": layers,
            "z_channels": latent_channels,
            "num_embeddings": num_codes,
            "quantized_embed_dim": code_dim,
        },
    )
    converted = {}
    for name, value in state_dict.items():
        if match := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)", name):
            encoder = match[1] == "encoder.down"
            block = f"encoder.down_blocks.{match[2]}" if encoder else f"decoder.up_blocks.{levels - 1 - int(match[2])}"
            name = f"{block}.{re.sub('^block', 'resnets', match[3])}"
        name = re.sub(r"^(encoder|decoder)\.mid\.", r"\1.mid_block.", name)
        name = name.replace(".norm_out.", ".conv_norm_out.").replace(".nin_shortcut.", ".conv_shortcut.")
        converted[name] = value
    model_config = {
        "in_channels": in_channels,
        "out_channels": state_dict["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("MaskGITDownBlock2D",) * levels,
        "up_block_types": ("MaskGITUpBlock2D",) * levels,
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "sample_size": config.get("resolution", 256),
        "num_vq_embeddings": num_codes,
        "vq_embed_dim": code_dim,
        "norm_num_groups": 32,
        "mid_block_add_attention": False,
        "pixel_range": (0.0, 1.0),
    }
    return model_config, converted
