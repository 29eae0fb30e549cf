"""taming-transformers' VQGAN (Esser et al. 2021) and latent diffusion's VQ first stages, which have its layout.

Other formats are converted by way of this one: [`convert_layout`] is what they share.
"""

import re

import torch


_RESNET = {"nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def count(state_dict: dict[str, torch.Tensor], pattern: str) -> int:
    """How many indices the group of `pattern` takes among the names."""
    return len({match[1] for name in state_dict if (match := re.match(pattern, name))})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_shapes(state_dict: dict[str, torch.Tensor], expected: dict[str, int | None]) -> None:
    """Raise a ValueError unless the tensors are there, with that many dimensions (None for any)."""
    for name, ndim in expected.items():
        require(name in state_dict, f"the checkpoint has no '{name}'; it is truncated, or of another architecture")
        tensor = state_dict[name]
        require(
            ndim is None or tensor.ndim == ndim,
            f"'{name}' must have {ndim} dimensions, got shape {tuple(tensor.shape)}",
        )


def check_config(config: dict, told: dict) -> None:
    """Raise a ValueError where the config contradicts what the shapes tell."""
    for name, value in told.items():
        given = config.get(name, value)
        given = list(given) if isinstance(given, list | tuple) else given
        require(given == value, f"config has {name}={given!r}, but the weights have {value!r}")


def layout_config(state_dict: dict[str, torch.Tensor], config: dict) -> dict:
    """The arguments of `ImageVQModel` that taming's layout tells by names and shapes."""
    check_shapes(
        state_dict,
        {
            "encoder.conv_in.weight": 4,
            "encoder.conv_out.weight": 4,
            "encoder.down.0.block.0.conv1.weight": 4,
            "decoder.conv_in.weight": 4,
            "decoder.conv_out.weight": 4,
            "decoder.up.0.block.0.conv1.weight": 4,
            "quant_conv.weight": 4,
            "post_quant_conv.weight": 4,
        },
    )
    require(
        "quantize.embedding.weight" in state_dict,
        "the checkpoint has no 'quantize.embedding.weight': a codebook of nearest codes was expected, not a Gumbel "
        "quantizer or a KL autoencoder",
    )
    check_shapes(state_dict, {"quantize.embedding.weight": 2})
    levels = count(state_dict, r"encoder\.down\.(\d+)\.")
    channels, in_channels = state_dict["encoder.conv_in.weight"].shape[:2]
    for level in range(levels):
        check_shapes(state_dict, {f"encoder.down.{level}.block.0.conv2.weight": 4})
    widths = [state_dict[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)]
    require(
        channels == widths[0],
        f"the first level must be as wide as conv_in, got ch={channels} and a first level of {widths[0]} channels; "
        "ch_mult must begin with 1",
    )
    require(
        all(width % 32 == 0 for width in widths),
        f"widths must be multiples of the 32 groups of the norms, got {widths}",
    )
    layers = count(state_dict, r"encoder\.down\.0\.block\.(\d+)\.")
    latent_channels = state_dict["encoder.conv_out.weight"].shape[0]
    num_codes, code_dim = state_dict["quantize.embedding.weight"].shape
    require(
        state_dict["decoder.conv_in.weight"].shape[1] == latent_channels,
        f"the decoder takes {state_dict['decoder.conv_in.weight'].shape[1]} channels and the encoder gives "
        f"{latent_channels}; a VQ model (double_z=False) was expected",
    )
    mid_attention = {side: f"{side}.mid.attn_1.q.weight" in state_dict for side in ("encoder", "decoder")}
    require(
        len(set(mid_attention.values())) == 1, "encoder and decoder must both have attention in the middle, or none"
    )
    check_config(
        config,
        {
            "in_channels": in_channels,
            "ch": channels,
            "ch_mult": [width // channels for width in widths],
            "num_res_blocks": layers,
            "z_channels": latent_channels,
            "n_embed": num_codes,
            "embed_dim": code_dim,
        },
    )

    def types(side: str, plain: str, attention: str) -> tuple[str, ...]:
        return tuple(
            attention if f"{side}.{level}.attn.0.q.weight" in state_dict else plain for level in range(levels)
        )

    return {
        "in_channels": in_channels,
        "out_channels": state_dict["decoder.conv_out.weight"].shape[0],
        "down_block_types": types("encoder.down", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        # Taming numbers the decoder's levels from the pictures down, diffusers in the order of the computation.
        "up_block_types": types("decoder.up", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")[::-1],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "sample_size": config.get("resolution", 256),
        "num_vq_embeddings": num_codes,
        "vq_embed_dim": code_dim,
        "norm_num_groups": 32,
        "mid_block_add_attention": mid_attention["encoder"],
    }


def convert_layout(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Taming's names to diffusers' `VQModel`'s; names that are not taming's stay."""
    levels = count(state_dict, r"decoder\.up\.(\d+)\.")
    converted = {}
    for name, value in state_dict.items():
        if match := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)", name):
            encoder = match[1] == "encoder.down"
            level = int(match[2]) if encoder else levels - 1 - int(match[2])
            prefix = f"encoder.down_blocks.{level}." if encoder else f"decoder.up_blocks.{level}."
            rest = match[3]
            rest = re.sub(r"^block\.(\d+)\.", r"resnets.\1.", rest)
            rest = re.sub(r"^attn\.(\d+)\.", r"attentions.\1.", rest)
            rest = re.sub(r"^(down|up)sample\.conv\.", r"\1samplers.0.conv.", rest)
        elif match := re.fullmatch(r"(encoder|decoder)\.mid\.(block|attn)_(\d+)\.(.+)", name):
            kind = "resnets" if match[2] == "block" else "attentions"
            prefix, rest = f"{match[1]}.mid_block.", f"{kind}.{int(match[3]) - 1}.{match[4]}"
        elif match := re.fullmatch(r"(encoder|decoder)\.norm_out\.(.+)", name):
            prefix, rest = f"{match[1]}.", f"conv_norm_out.{match[2]}"
        else:
            prefix, rest = "", name
        if match := re.fullmatch(r"(resnets\.\d+)\.(\w+)\.(.+)", rest):
            rest = f"{match[1]}.{_RESNET.get(match[2], match[2])}.{match[3]}"
        elif match := re.fullmatch(r"(attentions\.\d+)\.(\w+)\.(.+)", rest):
            module, parameter = _ATTENTION.get(match[2], match[2]), match[3]
            if match[2] == "norm" and "." in parameter:
                module = "spatial_norm"  # MoVQ's, of three layers
            elif match[2] != "norm" and parameter == "weight":
                value = value.flatten(1)  # a 1 x 1 convolution is a linear layer
            rest = f"{match[1]}.{module}.{parameter}"
        converted[prefix + rest] = value
    return converted


def convert(state_dict: dict[str, torch.Tensor], config: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments and state dict of `ImageVQModel` from taming's weights."""
    return layout_config(state_dict, config), convert_layout(state_dict)
