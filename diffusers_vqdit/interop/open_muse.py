"""open-muse's taming VQGAN: taming's layout, possibly without attention in the middle, for pixels in [0, 1]."""

import torch

from . import taming


def convert(state_dict: dict[str, torch.Tensor], config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments and state dict of `ImageVQModel` from open-muse's weights."""
    names = {"hidden_channels": "ch", "channel_mult": "ch_mult", "num_embeddings": "n_embed"}
    names |= {"quantized_embed_dim": "embed_dim", "num_channels": "in_channels"}
    config = {**config, **{ours: config[theirs] for theirs, ours in names.items() if theirs in config}}
    model_config, converted = taming.convert(state_dict, config)
    model_config["pixel_range"] = (0.0, 1.0)
    return model_config, converted
