"""What the models' arguments may be: each check raises a ValueError that names one, its value and what is accepted.

They run before anything is built, on the config as `register_to_config` has it. Upper bounds are far beyond what is
of use; they tell a slip, or a damaged file, from a model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.models.activations import ACT2CLS

from ..tasks import Task
from ..utils.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_integers,
    check_module_name,
    check_number,
    shown,
)
from .segment_layers import check_centered, check_patch


MAX_WIDTH = 2**17  # channels of a layer
MAX_LAYERS = 4096
MAX_CODES = 2**24  # codes of a codebook, tokens of a vocabulary, positions of a segment
SEGMENT_KEYS = (
    *("vocab_size", "shape", "shared_with", "patch", "separate_codebooks", "channels", "block_length"),
    "centered_positions",
)
LATENT_DIT_ACTIVATIONS = ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu")
MASKGIT_BLOCKS = ("MaskGITDownBlock2D", "MaskGITUpBlock2D")


def check_quantizer(**options: Any) -> None:
    """Check the arguments that quantizers share, as many as are given."""
    for name, value in options.items():
        if name in _QUANTIZER_CHOICES:
            check_choice(name, value, _QUANTIZER_CHOICES[name])
        elif name in _QUANTIZER_SIZES:
            check_integer(name, value, 1, _QUANTIZER_SIZES[name])
        elif name == "levels":
            check_levels(name, value)
        else:
            low, high, above = _QUANTIZER_NUMBERS[name]
            check_number(name, value, low, high, above=above)
    if options.get("restart_threshold") == 1:
        raise ValueError("restart_threshold=1 must be in [0, 1): every code would be restarted")


_QUANTIZER_CHOICES = {
    "codebook_norm": ("none", "l2"),
    "codebook_update": ("gradient", "ema"),
    "codebook_init": ("uniform", "data", "kmeans"),
    "gradient_estimator": ("straight_through", "rotation"),
}
_QUANTIZER_SIZES = {"num_codes": MAX_CODES, "code_dim": MAX_WIDTH, "num_quantizers": MAX_LAYERS}
# Lowest and highest value, and whether the lowest is left out.
_QUANTIZER_NUMBERS = {
    "beta": (0, None, False),
    "ema_decay": (0, 1, False),
    "restart_threshold": (0, 1, False),
    "entropy_weight": (0, None, False),
    "entropy_temperature": (0, None, True),
}


def check_levels(name: str, levels: Any) -> None:
    """Check FSQ's levels, and that their product counts codes."""
    if not isinstance(levels, list | tuple) or not levels:
        raise ValueError(f"{name}={shown(levels)} must be a list of integers of 3 or more, such as (8, 5, 5, 5)")
    for index, level in enumerate(levels):
        if not isinstance(level, bool) and level == 2:
            raise ValueError(f"{name}={shown(levels)} must be integers of 3 or more; for two levels take LFQ")
        check_integer(f"{name}={shown(levels)}: {name}[{index}]", level, 3, MAX_CODES)
    if math.prod(levels) > MAX_CODES:
        raise ValueError(f"{name}={shown(levels)} make {math.prod(levels)} codes; {MAX_CODES} are accepted")


def check_blocks(
    block_out_channels: Any, layers_per_block: Any, norm_num_groups: Any, in_channels: Any, out_channels: Any
) -> None:
    """Check the widths, depth and group norms of an image tokenizer's encoder or decoder."""
    check_integer("in_channels", in_channels, 1, MAX_WIDTH)
    check_integer("out_channels", out_channels, 1, MAX_WIDTH)
    check_integer("layers_per_block", layers_per_block, 1, MAX_LAYERS)
    check_integer("norm_num_groups", norm_num_groups, 1, MAX_WIDTH)
    for index, width in enumerate(check_integers("block_out_channels", block_out_channels, 1)):
        check_integer(f"block_out_channels[{index}]", width, 1, MAX_WIDTH)
        if width % norm_num_groups:
            raise ValueError(
                f"block_out_channels={shown(block_out_channels)} must be multiples of norm_num_groups="
                f"{norm_num_groups}"
            )


def check_block_types(config: Mapping[str, Any], code_dim: int) -> None:
    """Check an image tokenizer's types of blocks, and what goes with those that are not the usual ones."""
    c = config
    maskgit = False
    for name, stock, own in (
        ("down_block_types", ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), MASKGIT_BLOCKS[0]),
        ("up_block_types", ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), MASKGIT_BLOCKS[1]),
    ):
        if not isinstance(c[name], list | tuple) or len(c[name]) != len(c["block_out_channels"]):
            raise ValueError(
                f"{name}={shown(c[name])} must be a list of as many as block_out_channels="
                f"{shown(c['block_out_channels'])} has"
            )
        for index, block in enumerate(c[name]):
            check_choice(f"{name}[{index}]", block, (*stock, own))
        maskgit |= own in c[name]
    if maskgit:
        for name, value, expected in (
            ("down_block_types", set(c["down_block_types"]), {MASKGIT_BLOCKS[0]}),
            ("up_block_types", set(c["up_block_types"]), {MASKGIT_BLOCKS[1]}),
            ("act_fn", c["act_fn"], "silu"),
            ("norm_type", c["norm_type"], "group"),
            ("encoder_norm_type", c["encoder_norm_type"], "group"),
            ("mid_block_add_attention", c["mid_block_add_attention"], False),
            ("vq_embed_dim", code_dim, c["latent_channels"]),
        ):
            if value != expected:
                raise ValueError(f"{name}={value!r} must be {expected!r} with MaskGIT's blocks")
    elif c["norm_type"] == "spatial":
        # diffusers' spatial norm has 32 groups, whatever norm_num_groups is, and takes the codes for latents.
        if any(width % 32 for width in c["block_out_channels"]):
            raise ValueError(
                f"block_out_channels={shown(c['block_out_channels'])} must be multiples of 32 with norm_type='spatial'"
            )
        if code_dim != c["latent_channels"]:
            raise ValueError(
                f"vq_embed_dim={code_dim} must be latent_channels={c['latent_channels']} with norm_type='spatial'"
            )


def check_image_vq(
    config: Mapping[str, Any], quantizer_options: Mapping[str, Sequence[str]], defaults: Mapping[str, Any]
) -> None:
    """Check the arguments of [`ImageVQModel`].

    Args:
        config: the arguments.
        quantizer_options: those that each type of quantizer takes.
        defaults: what the others must be.
    """
    c = config
    check_integer("latent_channels", c["latent_channels"], 1, MAX_WIDTH)
    check_integer("sample_size", c["sample_size"], 1, MAX_CODES)
    check_number("scaling_factor", c["scaling_factor"], 0, above=True)
    for name in ("mid_block_add_attention", "lookup_from_codebook", "force_upcast"):
        check_flag(name, c[name])

    # 1. Encoder and decoder
    blocks = ("block_out_channels", "layers_per_block", "norm_num_groups", "in_channels", "out_channels")
    check_blocks(*(c[name] for name in blocks))
    activation = c["act_fn"].lower() if isinstance(c["act_fn"], str) else c["act_fn"]
    check_choice("act_fn", activation, tuple(ACT2CLS))
    check_choice("norm_type", c["norm_type"], ("group", "spatial"))
    check_choice("encoder_norm_type", c["encoder_norm_type"], ("group", "position"))
    code_dim = c["latent_channels"] if c["vq_embed_dim"] is None else c["vq_embed_dim"]
    check_integer("vq_embed_dim", code_dim, 1, MAX_WIDTH)
    check_block_types(c, code_dim)

    # 2. Quantizer
    check_choice("quantizer_type", c["quantizer_type"], tuple(quantizer_options))
    check_integer("num_vq_embeddings", c["num_vq_embeddings"], 1, MAX_CODES)
    named = {name: c[name] for names in quantizer_options.values() for name in names if name != "fsq_levels"}
    check_quantizer(**named)
    if c["fsq_levels"] is not None:
        check_levels("fsq_levels", c["fsq_levels"])
    taken = quantizer_options[c["quantizer_type"]]
    for name in (*named, "fsq_levels"):
        if name not in taken and c[name] != defaults[name]:
            raise ValueError(
                f"{name}={shown(c[name])} has no meaning with quantizer_type={c['quantizer_type']!r}, which takes "
                f"{', '.join(taken)}"
            )
    found, expected = (c["num_vq_embeddings"], code_dim), None
    if c["quantizer_type"] == "fsq":
        if c["fsq_levels"] is None:
            raise ValueError("fsq_levels is missing: give the number of levels of each channel, such as (8, 5, 5)")
        expected = (math.prod(c["fsq_levels"]), len(c["fsq_levels"]))
    elif c["quantizer_type"] == "lfq":
        check_integer("vq_embed_dim", code_dim, 1, MAX_CODES.bit_length() - 1)
        expected = (2**code_dim, code_dim)
    if expected is not None and found != expected:
        raise ValueError(
            f"num_vq_embeddings={found[0]} and vq_embed_dim={found[1]} must be {expected[0]} and {expected[1]} with "
            f"quantizer_type={c['quantizer_type']!r} and fsq_levels={c['fsq_levels']}"
        )

    # 3. Pixels and latents
    low, high = _numbers("pixel_range", c["pixel_range"], 2)
    if not low < high:
        raise ValueError(f"pixel_range={shown(c['pixel_range'])} must be (lowest, highest)")
    for name in ("latents_mean", "latents_std"):
        if (c["latents_mean"] is None) != (c["latents_std"] is None):
            raise ValueError(
                f"latents_mean={shown(c['latents_mean'])} and latents_std={shown(c['latents_std'])}: give both or none"
            )
        if c[name] is not None and min(_numbers(name, c[name], code_dim)) <= 0 and name == "latents_std":
            raise ValueError(f"{name}={shown(c[name])} must be numbers above 0")


def _numbers(name: str, values: Any, length: int) -> list[float]:
    if not isinstance(values, list | tuple) or len(values) != length:
        raise ValueError(f"{name}={shown(values)} must be a list of {length} numbers")
    return [check_number(f"{name}[{index}]", value) for index, value in enumerate(values)]


def check_text_vq(config: Mapping[str, Any]) -> None:
    """Check the arguments of [`TextVQModel`]."""
    c = config
    check_integer("vocab_size", c["vocab_size"], 1, MAX_CODES)
    check_integer("pad_token_id", c["pad_token_id"], 0, c["vocab_size"] - 1)
    check_integer("max_length", c["max_length"], 1, MAX_CODES)
    check_integer("downsample_factor", c["downsample_factor"], 1, MAX_CODES)
    if c["max_length"] % c["downsample_factor"]:
        raise ValueError(
            f"max_length={c['max_length']} must be a multiple of downsample_factor={c['downsample_factor']}"
        )
    check_choice("quantizer_type", c["quantizer_type"], ("vq", "rvq"))
    for name, other in (("num_codebooks", "rvq"), ("num_quantizers", "vq")):
        if check_integer(name, c[name], 1, MAX_LAYERS) > 1 and c["quantizer_type"] == other:
            raise ValueError(f"{name}={c[name]} must be 1 with quantizer_type={other!r}")
    check_integer("hidden_size", c["hidden_size"], 1, MAX_WIDTH)
    check_integer("num_layers", c["num_layers"], 0, MAX_LAYERS)
    if check_integer("kernel_size", c["kernel_size"], 1, MAX_WIDTH) % 2 == 0:
        raise ValueError(f"kernel_size={c['kernel_size']} must be odd")
    options = ("num_codes", "code_dim", *_QUANTIZER_CHOICES, *_QUANTIZER_NUMBERS)
    check_quantizer(**{name: c[name] for name in options if name in c})
    if c["quantizer_type"] == "rvq" and c["code_dim"] % c["downsample_factor"]:
        raise ValueError(
            f"code_dim={c['code_dim']} must be a multiple of downsample_factor={c['downsample_factor']} with "
            "quantizer_type='rvq'"
        )
    for name in ("num_codebooks", "num_quantizers"):
        if c[name] > 1 and c["codebook_norm"] == "l2":
            raise ValueError(f"{name}={c[name]} needs codebook_norm='none', not 'l2': residuals have no unit length")


def check_transformer(config: Mapping[str, Any]) -> None:
    """Check the arguments of [`VQDiTTransformer2DModel`], with segments and for continuous latents."""
    c = config
    for name in ("attention_bias", "upcast_attention", "norm_elementwise_affine", "time_conditioned"):
        check_flag(name, c[name])
    rotary = check_flag("use_rotary_positional_embeddings", c["use_rotary_positional_embeddings"])
    for name in ("num_attention_heads", "attention_head_dim", "in_channels", "norm_num_groups"):
        check_integer(name, c[name], 1, MAX_WIDTH)
    check_integer("num_layers", c["num_layers"], 1, MAX_LAYERS)
    check_integer("sample_size", c["sample_size"], 1, MAX_WIDTH)
    check_integer("patch_size", c["patch_size"], 1, MAX_WIDTH)
    for name in ("out_channels", "num_embeds_ada_norm", "caption_channels"):
        if c[name] is not None:
            check_integer(name, c[name], 1, MAX_CODES if name == "num_embeds_ada_norm" else MAX_WIDTH)
    check_number("norm_eps", c["norm_eps"], 0, above=True)
    for name, limit in (("dropout", 1), ("freq_shift", 128)):  # of freq_shift, 128 - s divides
        if check_number(name, c[name], 0, limit) == limit:
            raise ValueError(f"{name}={c[name]} must be in [0, {limit})")
    check_choice("activation_fn", c["activation_fn"], LATENT_DIT_ACTIVATIONS)
    check_choice("norm_type", c["norm_type"], ("ada_norm_zero",))
    dim = c["num_attention_heads"] * c["attention_head_dim"]
    if dim > MAX_WIDTH:
        raise ValueError(
            f"num_attention_heads={c['num_attention_heads']} and attention_head_dim={c['attention_head_dim']} make a "
            f"width of {dim}; {MAX_WIDTH} is accepted"
        )
    if c["segments"] is not None:
        if c["caption_channels"] is not None:
            raise ValueError(
                f"caption_channels={c['caption_channels']} needs segments=None; else a caption is one of the segments"
            )
        check_segments(c["segments"])
        check_tasks(c["tasks"], c["segments"])
        axes = max(len(segment["shape"]) for segment in c["segments"].values())
        if rotary and (c["attention_head_dim"] < 2 * axes or c["attention_head_dim"] % 2):
            raise ValueError(
                f"use_rotary_positional_embeddings=True needs attention_head_dim={c['attention_head_dim']} to be even "
                f"and at least {2 * axes}: two channels for each of the {axes} axes of a segment"
            )
        return
    # diffusers' table of positions has sines and cosines of two axes.
    if dim % 4:
        raise ValueError(
            f"num_attention_heads={c['num_attention_heads']} times attention_head_dim={c['attention_head_dim']} must "
            "be a multiple of 4 with segments=None"
        )
    if c["patch_size"] > c["sample_size"]:
        raise ValueError(f"patch_size={c['patch_size']} must be at most sample_size={c['sample_size']}")
    if c["num_embeds_ada_norm"] is None:
        raise ValueError("num_embeds_ada_norm=None must be the number of labels, at least 1, with segments=None")
    for name, default in (("tasks", None), ("time_conditioned", False), ("use_rotary_positional_embeddings", False)):
        if c[name] != default:
            raise ValueError(f"{name}={shown(c[name])} needs segments; with segments=None it must be {default}")


def check_segments(segments: Any) -> None:
    """Raise a ValueError that names the segment whose name, vocabulary size or shape can't be used."""
    if not isinstance(segments, dict):
        raise ValueError(f"segments={shown(segments)} must be a dict of segments by name, or None")
    if not segments:
        raise ValueError("segments={} has no segment; use segments=None for continuous latents")
    for name, segment in segments.items():
        check_module_name("segments", name)
        if not isinstance(segment, dict):
            raise ValueError(f"segments[{name!r}]={shown(segment)} must be a dict with vocab_size and shape")
        if unknown := set(segment) - set(SEGMENT_KEYS):
            raise ValueError(
                f"segments[{name!r}]: unknown {sorted(map(str, unknown))}; it takes {', '.join(SEGMENT_KEYS)}"
            )
        if "channels" in segment:
            check_states_segment(name, segment)
            continue
        check_integer(f"segments[{name!r}]: vocab_size", segment.get("vocab_size"), 1, MAX_CODES)
        shape = segment.get("shape")
        if not isinstance(shape, list | tuple) or len(shape) not in (1, 2, 3):
            raise ValueError(
                f"segments[{name!r}]: shape={shown(shape)} must be [n], [h, w] or [t, h, w] with positive integers"
            )
        sides = [check_integer(f"segments[{name!r}]: shape={shown(shape)}: a side", side, 1) for side in shape]
        if math.prod(sides) > MAX_CODES:
            raise ValueError(f"segments[{name!r}]: shape={shown(shape)} must have at most {MAX_CODES} positions")
        if "shared_with" in segment:
            shared_with = segment["shared_with"]
            other = segments.get(shared_with) if isinstance(shared_with, str) and shared_with != name else None
            if (
                not isinstance(other, dict)
                or "shared_with" in other
                or "channels" in other
                or other.get("vocab_size") != segment["vocab_size"]
            ):
                raise ValueError(
                    f"segments[{name!r}]: shared_with={shown(shared_with)} must be another segment with "
                    f"vocab_size={segment['vocab_size']} and embeddings of its own"
                )
    for name in segments:
        check_patch(segments, name)
        check_centered(segments, name)


def check_states_segment(name: str, segment: Mapping[str, Any]) -> None:
    """Check a segment of an encoder's states: its channels and its length, and nothing that codes have."""
    check_integer(f"segments[{name!r}]: channels", segment["channels"], 1, MAX_WIDTH)
    if others := sorted(set(segment) - {"channels", "shape"}):
        raise ValueError(f"segments[{name!r}]: states have channels and shape, but {others} are for codes")
    shape = segment.get("shape")
    if not isinstance(shape, list | tuple) or len(shape) != 1:
        raise ValueError(f"segments[{name!r}]: shape={shown(shape)} must be [n], how many states there are")
    check_integer(f"segments[{name!r}]: shape={shown(shape)}: a side", shape[0], 1, MAX_CODES)


def check_tasks(tasks: Any, segments: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the task that can't be read, or that has other segments than these."""
    if tasks is None:
        return
    if not isinstance(tasks, list | tuple) or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"tasks={shown(tasks)} must be a list of tasks such as 'text->image', or None")
    for task in tasks:
        try:
            parsed = Task.parse(task)
        except ValueError as error:
            raise ValueError(f"tasks: {error}") from error
        if unknown := sorted(set(parsed.segments) - set(segments)):
            raise ValueError(f"tasks: {task!r} has the segments {unknown}; segments has {sorted(segments)}")
        if states := [name for name in parsed.generated if "channels" in segments[name]]:
            raise ValueError(f"tasks: {task!r} generates {states}: states of an encoder are given, never generated")
        blocks = [name for name in parsed.generated if "block_length" in segments[name]]
        if blocks and len(parsed.generated) > 1:
            raise ValueError(f"tasks: {task!r} generates {blocks[0]!r} by blocks, which is generated alone")
