"""Checkpoints of other code bases as arguments and weights of our models: one module a format, of pure functions.

Nothing here imports a model. `ImageVQModel.from_original` and `VQDiTTransformer2DModel.from_original` are the ways in,
and ``python -m diffusers_vqdit.interop.convert`` from the command line; they check that the weights are the model's.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from . import amused, ibq, llamagen, maskgit_vqgan, movq, open_muse, taming
from .checkpoint import read_checkpoint, read_config, state_dicts


# What `format` may be: the module that converts it, and whose checkpoints it is for.
FORMATS = {
    "taming": (taming, "taming-transformers' VQGAN and latent diffusion's VQ"),
    "ibq": (ibq, "SEED-Voken's IBQ"),
    "open-muse": (open_muse, "open-muse's taming VQGAN"),
    "movq": (movq, "Kandinsky's and open-muse's MoVQ"),
    "llamagen": (llamagen, "LlamaGen's VQ"),
    "maskgit-vqgan": (maskgit_vqgan, "open-muse's MaskGIT-VQGAN"),
    "amused": (amused, "aMUSEd's VQ-VAE"),
}
_EMA_FORMATS = ("llamagen", "ibq")  # whose own evaluation takes the moving averages


def possible_formats(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """The formats that weights with these names and shapes can have."""
    if any(name.startswith("encoder.conv_blocks.") for name in state_dict):
        return ["llamagen"]
    if "decoder.norm_out.conv_y.weight" in state_dict:
        return ["movq"]
    if any(name.startswith("encoder.down_blocks.") for name in state_dict):
        return ["amused"]
    if "encoder.mid.block_1.conv1.weight" in state_dict:
        # Only open-muse's may be without attention in the middle.
        return ["taming", "ibq", "open-muse"] if "encoder.mid.attn_1.q.weight" in state_dict else ["open-muse"]
    if "encoder.mid.0.conv1.weight" in state_dict:
        return ["maskgit-vqgan"]
    return []


def load_original(
    checkpoint: str | Path | Mapping[str, torch.Tensor],
    *,
    format: str | None = None,
    config: str | Path | Mapping | None = None,
    use_ema: bool | None = None,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments and state dict of the `ImageVQModel` that equals a foreign checkpoint.

    The arguments and errors are those of `ImageVQModel.from_original`, which also checks that the state dict is whole.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {tuple(FORMATS)}")
    content = read_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint must be a path or a state dict, got {type(content).__name__}")
    weights, averages = state_dicts(content)

    possible = possible_formats(weights)
    if format is None and len(possible) == 1:
        format = possible[0]
    elif format is None and possible:
        raise ValueError(
            "the weights' names and shapes fit several formats: "
            + ", ".join(f"format={name!r} for {FORMATS[name][1]}" for name in possible)
            + "; give the one it is, because their codes or pixel ranges differ"
        )
    elif format is None:
        raise ValueError(
            "the weights are of no format known: " + ", ".join(f"{name} ({FORMATS[name][1]})" for name in FORMATS)
        )
    elif format not in possible:
        raise ValueError(
            f"the weights are not those of format={format!r} ({FORMATS[format][1]}); they look like "
            f"{' or '.join(possible) or 'none of ' + ', '.join(FORMATS)}"
        )

    if use_ema and averages is None:
        raise ValueError("use_ema=True, but the checkpoint has no moving averages of the weights")
    if averages is not None and (use_ema or (use_ema is None and format in _EMA_FORMATS)):
        weights = averages
    original = read_config(config)
    model_config, converted = FORMATS[format][0].convert(weights, original)
    if "pixel_range" in original:
        model_config["pixel_range"] = tuple(original["pixel_range"])
    return model_config, {name: value.float().contiguous() for name, value in converted.items()}
