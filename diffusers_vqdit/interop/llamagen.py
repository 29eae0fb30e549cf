"""LlamaGen's VQ (Sun et al. 2024): taming's blocks under other names, and l2-normalised codes."""

import re

import torch

from . import taming


def convert(state_dict: dict[str, torch.Tensor], config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments and state dict of `ImageVQModel` from LlamaGen's weights."""
    levels = taming.count(state_dict, r"decoder\.conv_blocks\.(\d+)\.")
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    renamed = {}
    for name, value in state_dict.items():
        if name == "quantize.codebook_used":
            continue  # of the training's statistics
        if match := re.fullmatch(r"(encoder|decoder)\.conv_blocks\.(\d+)\.(.+)", name):
            # LlamaGen numbers the decoder's levels in the order of the computation, taming the other way.
            level = match[2] if match[1] == "encoder" else levels - 1 - int(match[2])
            rest = re.sub(r"^res\.", "block.", match[3])
            name = f"{match[1]}.{'down' if match[1] == 'encoder' else 'up'}.{level}.{rest}"
        elif match := re.fullmatch(r"(encoder|decoder)\.mid\.([012])\.(.+)", name):
            name = f"{match[1]}.mid.{middle[match[2]]}.{match[3]}"
        renamed[name] = value
    for ours, theirs in (("n_embed", "codebook_size"), ("embed_dim", "codebook_embed_dim")):
        if theirs in config:
            config = {**config, ours: config[theirs]}
    if "encoder_ch_mult" in config:
        config = {**config, "ch_mult": config["encoder_ch_mult"]}
    model_config, converted = taming.convert(renamed, config)
    model_config["codebook_norm"] = "l2" if config.get("codebook_l2_norm", True) else "none"
    return model_config, converted
