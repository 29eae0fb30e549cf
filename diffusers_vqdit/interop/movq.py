"""Kandinsky's MoVQ (Zheng et al. 2022): taming's layout with spatial norms in the decoder.

Both Kandinsky 2's own checkpoints and open-muse's are read. Kandinsky 2.2's ``movq`` folder is in diffusers' format:
`ImageVQModel.from_pretrained` loads it.
"""

import torch

from . import taming


def convert(state_dict: dict[str, torch.Tensor], config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments and state dict of `ImageVQModel` from MoVQ's weights."""
    taming.check_shapes(state_dict, {"decoder.norm_out.conv_y.weight": 4})
    names = {"hidden_channels": "ch", "channel_mult": "ch_mult", "num_embeddings": "n_embed"}
    names |= {"quantized_embed_dim": "embed_dim", "num_channels": "in_channels"}
    config = {**config, **{ours: config[theirs] for theirs, ours in names.items() if theirs in config}}
    state_dict = without_unused_attention(state_dict)
    model_config, converted = taming.convert(state_dict, config)
    taming.require(
        model_config["vq_embed_dim"] == model_config["latent_channels"],
        f"embed_dim={model_config['vq_embed_dim']} must be z_channels={model_config['latent_channels']}: diffusers' "
        "spatial norms have the width of the latents",
    )
    model_config["norm_type"] = "spatial"
    return model_config, converted


def without_unused_attention(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that open-muse uses: it skips the attention of a level that has one attention block only.

    Its code is told by attention projections that are linear layers; Kandinsky's and taming's are convolutions.
    """
    unused = tuple(
        name.removesuffix("0.q.weight")
        for name, value in state_dict.items()
        if name.endswith(".attn.0.q.weight")
        and value.ndim == 2
        and name.replace(".attn.0.", ".attn.1.") not in state_dict
    )
    return {name: value for name, value in state_dict.items() if not name.startswith(unused)} if unused else state_dict
