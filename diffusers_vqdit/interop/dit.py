"""The original DiT's checkpoints (facebookresearch/DiT, Peebles & Xie 2023), both ways.

Its weights are those of `DiTTransformer2DModel` under other names, with one embedder for all blocks and with queries,
keys and values in one matrix. Two constants differ, which no weights can make up for: the frequencies of the time's
embedding (``freq_shift=0``) and the epsilon before the feed-forward layers (``norm_eps=1e-6``). Both are in
`VQDiTTransformer2DModel`'s config; stock DiT has the second one only.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.utils import deprecate

from .checkpoint import read_checkpoint


# Width of the published sizes S, B, L and XL -> attention heads, which no weight's shape tells.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}

# Ours -> the original's. Those of a block begin with "transformer_blocks.N." and "blocks.N.".
_MODEL = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_EMBEDDER = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def convert_from_original(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A `DiTTransformer2DModel` state dict of the original's weights.

    Args:
        state_dict: the original's, as in its ``.pt`` files.

    Raises:
        ValueError: if weights are missing, or there are others than DiT's, or its fixed position table was changed.
    """
    rest = dict(state_dict)

    def take(name: str) -> torch.Tensor:
        if name not in rest:
            raise ValueError(f"state_dict is no original DiT's: {name!r} is not in it")
        return rest.pop(name)

    positions = rest.pop("pos_embed", None)
    converted = {}
    for ours, theirs in _MODEL.items():
        for kind in ("weight", "bias"):
            converted[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")
    embedder = {}
    for ours, theirs in _EMBEDDER.items():
        for kind in ("weight",) if ours.startswith("class") else ("weight", "bias"):
            embedder[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")
    for layer in range(_num_layers(state_dict)):
        block, original = f"transformer_blocks.{layer}.", f"blocks.{layer}."
        # A copy for each block, as tensors that share memory can't be saved.
        converted |= {f"{block}norm1.emb.{name}": value.clone() for name, value in embedder.items()}
        for kind in ("weight", "bias"):
            packed = take(f"{original}attn.qkv.{kind}")
            for ours, part in zip(_QKV, packed.chunk(3), strict=True):
                converted[f"{block}{ours}.{kind}"] = part.clone()
            for ours, theirs in _BLOCK.items():
                converted[f"{block}{ours}.{kind}"] = take(f"{original}{theirs}.{kind}")
    if rest:
        raise ValueError(f"state_dict has weights that DiT has no place for: {sorted(rest)[:5]}")
    if positions is not None:
        expected = _positions(positions.shape[1], positions.shape[2])
        if not torch.allclose(positions.float(), expected, atol=1e-3):
            raise ValueError("state_dict's pos_embed is not the sine-cosine table, and DiT in diffusers has no other")
    return converted


def convert_to_original(state_dict: dict[str, torch.Tensor], num_patches: int) -> dict[str, torch.Tensor]:
    """The original's state dict of a `DiTTransformer2DModel`'s.

    Args:
        state_dict: of a stock model, or of ours without segments.
        num_patches: N of the trained size, (sample_size / patch_size)^2; the original keeps its positions.

    Raises:
        ValueError: if the blocks' embedders differ (the original has one), or there are other weights than DiT's.
    """
    rest = dict(state_dict)
    converted = {}
    for ours, theirs in _MODEL.items():
        for kind in ("weight", "bias"):
            converted[f"{theirs}.{kind}"] = rest.pop(f"{ours}.{kind}")
    width = converted["x_embedder.proj.bias"].shape[0]
    converted["pos_embed"] = _positions(num_patches, width).to(converted["x_embedder.proj.bias"])
    layers = 1 + max(int(name.split(".")[1]) for name in rest if name.startswith("transformer_blocks."))
    for layer in range(layers):
        block, original = f"transformer_blocks.{layer}.", f"blocks.{layer}."
        for ours, theirs in _EMBEDDER.items():
            for kind in ("weight",) if ours.startswith("class") else ("weight", "bias"):
                value = rest.pop(f"{block}norm1.emb.{ours}.{kind}")
                if not torch.equal(converted.setdefault(f"{theirs}.{kind}", value), value):
                    raise ValueError(
                        f"state_dict: block {layer}'s embedder differs from the first one's; the original DiT has one "
                        "for all blocks, so that these weights can't be written in its format"
                    )
        for kind in ("weight", "bias"):
            converted[f"{original}attn.qkv.{kind}"] = torch.cat([rest.pop(f"{block}{ours}.{kind}") for ours in _QKV])
            for ours, theirs in _BLOCK.items():
                converted[f"{original}{theirs}.{kind}"] = rest.pop(f"{block}{ours}.{kind}")
    if rest:
        raise ValueError(f"state_dict has weights that the original DiT has no place for: {sorted(rest)[:5]}")
    return converted


def convert(
    state_dict: Mapping[str, torch.Tensor], num_attention_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Arguments and state dict of the `VQDiTTransformer2DModel` that gives the original's outputs.

    Args:
        state_dict: the original's, as in its ``.pt`` files.
        num_attention_heads: which no weight's shape tells; by default that of the published size of this width.

    Raises:
        ValueError: if the weights are not DiT's, or `num_attention_heads` can't be known.
    """
    weights = convert_from_original(state_dict)
    if weights["pos_embed.proj.weight"].ndim != 4:
        shape = tuple(weights["pos_embed.proj.weight"].shape)
        raise ValueError(f"'x_embedder.proj.weight' must have 4 dimensions, got shape {shape}")
    width, in_channels, patch_size, _ = weights["pos_embed.proj.weight"].shape
    heads = num_attention_heads or HEADS.get(width)
    if heads is None or width % heads:
        raise ValueError(
            f"num_attention_heads={num_attention_heads} must be given for a width of {width}, and divide it: only "
            f"the published widths {sorted(HEADS)} are known"
        )
    if "pos_embed" not in state_dict:
        raise ValueError("state_dict has no pos_embed, which tells the trained size")
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": len(weights["proj_out_2.bias"]) // patch_size**2,
        "num_layers": _num_layers(state_dict),
        "sample_size": round(state_dict["pos_embed"].shape[1] ** 0.5) * patch_size,
        "patch_size": patch_size,
        "num_embeds_ada_norm": len(state_dict["y_embedder.embedding_table.weight"]) - 1,
        "norm_eps": 1e-6,
        "freq_shift": 0.0,
    }
    return config, weights


def load_original(
    checkpoint: str | Path | Mapping[str, torch.Tensor],
    *,
    num_attention_heads: int | None = None,
    use_ema: bool = True,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """[`convert`] of a ``.pt`` file, or of what one holds.

    The arguments and errors are those of `VQDiTTransformer2DModel.from_original`, which also checks the shapes.
    """
    content = read_checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint must be a path or a state dict, got {type(content).__name__}")
    if "model" in content and "ema" in content:
        content = content["ema" if use_ema else "model"]
    # Weights saved from DistributedDataParallel.
    return convert({name.removeprefix("module."): value for name, value in content.items()}, num_attention_heads)


def load_original_dit(path: str | Path, *, num_attention_heads: int | None = None, use_ema: bool = True) -> ModelMixin:
    """Old name of `VQDiTTransformer2DModel.from_original`."""
    deprecate("load_original_dit", "1.0.0", "Call `VQDiTTransformer2DModel.from_original`.")
    model_class = import_module("diffusers_vqdit").VQDiTTransformer2DModel
    return model_class.from_original(path, num_attention_heads=num_attention_heads, use_ema=use_ema)


def save_original_dit(model: ModelMixin, path: str | Path, *, ema: ModelMixin | None = None) -> None:
    """Write a model as the original DiT's code reads it.

    Args:
        model: a `VQDiTTransformer2DModel` without segments and captions, with ``freq_shift=0`` and ``norm_eps=1e-6``.
        path: the ``.pt`` file.
        ema: the moving average of its weights; the file then has ``"model"`` and ``"ema"``, as a training run's.

    Raises:
        ValueError: if the original's code would give other outputs, or has no place for these weights.
    """
    parts = {"model": model} if ema is None else {"model": model, "ema": ema}
    converted = {}
    for name, part in parts.items():
        config = part.config
        wrong = {
            key: config.get(key)
            for key, value in {"freq_shift": 0.0, "norm_eps": 1e-6, "segments": None, "attention_bias": True}.items()
            if config.get(key) != value
        }
        if wrong:
            raise ValueError(
                f"{name} has {wrong}, where the original DiT has freq_shift=0, norm_eps=1e-6, segments=None and "
                "attention_bias=True: its outputs would be others. convert_to_original writes the weights alone"
            )
        converted[name] = convert_to_original(part.state_dict(), (config.sample_size // config.patch_size) ** 2)
    torch.save(converted if ema is not None else converted["model"], path)


def _num_layers(state_dict: Mapping[str, torch.Tensor]) -> int:
    layers = {int(name.split(".")[1]) for name in state_dict if name.startswith("blocks.")}
    if not layers:
        raise ValueError("state_dict is no original DiT's: 'blocks.0' is not in it")
    return 1 + max(layers)


def _positions(num_patches: int, width: int) -> torch.Tensor:
    """DiT's position table (1, N, D) of a square grid."""
    side = round(num_patches**0.5)
    return get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").float()[None]
