"""Embeddings and heads of segments: codes to the transformer's positions, and positions to logits of codes.

A position holds one code, or a patch of them, as DiT's patches hold several latents (Peebles & Xie 2023, section 3.2).
Each code of a patch keeps its own mask and its own logits.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.embeddings import PixArtAlphaTextProjection

from ..utils.checks import check_flag, check_integer, check_integers, shown
from .layers import modulate, rotary_positions, sincos_positions


CODES_STD = 0.5  # of the embeddings of codes at first


class CodebookHeads(nn.ModuleList):
    """A linear head for each place in a patch, whose codes are of a codebook of their own.

    Args:
        places: P, the codes of a patch.
        width: S, the size of a code's state.
        vocab_size: K.
    """

    def __init__(self, places: int, width: int, vocab_size: int) -> None:
        super().__init__(nn.Linear(width, vocab_size) for _ in range(places))

    @property
    def weight(self) -> torch.Tensor:
        """(P, K, S)."""
        return torch.stack([head.weight for head in self])

    def forward(self, states: torch.Tensor, places: torch.LongTensor) -> torch.Tensor:
        """Logits (B, N, K) of states (B, N, S) of whole grids, `places` (N,); or (M, K) of (M, S), `places` (M,)."""
        order = places.argsort(stable=True)
        if states.ndim == 3:
            counts = [len(places) // len(self)] * len(self)
        else:
            counts = places.bincount(minlength=len(self)).tolist()
        parts = states.index_select(-2, order).split(counts, dim=-2)
        logits = torch.cat([head(part) for head, part in zip(self, parts, strict=True)], dim=-2)
        return logits.index_select(-2, order.argsort())


class StatesProjection(nn.Module):
    """States (B, n, channels) of an encoder as embeddings (B, n, D), as in PixArt, after a norm: encoders' scales
    differ by orders of magnitude.

    Args:
        channels: of the states.
        dim: D, the model's width.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.projection = PixArtAlphaTextProjection(channels, dim)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        dtype = self.projection.linear_1.weight.dtype
        # A quantized layer's weights are integers; it casts what it takes.
        return self.projection(self.norm(states.to(dtype) if dtype.is_floating_point else states))


class SegmentLayers:
    """The part of [`VQDiTTransformer2DModel`] that knows what a position holds; between its parts are only positions.

    The embeddings of a patch's codes are joined by a linear layer, whose blocks tell the places in the patch apart; a
    linear layer of the position's state makes one state for each of its codes, which the head takes. Neither layer is
    there for a segment of one code a position.
    """

    # The model's, of diffusers and of its other parts
    config: Any
    inner_dim: int
    norm_out: nn.Module

    def _build_embeddings(self, segments: dict[str, dict[str, Any]], dim: int) -> None:
        self.code_embeddings, self.proj_in = nn.ModuleDict(), nn.ModuleDict()
        for name, segment in segments.items():
            if "channels" in segment:
                self.proj_in[name] = StatesProjection(segment["channels"], dim)
            if "shared_with" in segment or "channels" in segment:
                continue
            codes, tables = math.prod(segment_patch(segments, name)), num_tables(segments, name)
            # The row after a table's last code is the mask's.
            width = code_width(dim, codes)
            self.code_embeddings[name] = nn.Embedding(tables * (segment["vocab_size"] + 1), width)
            if codes > 1:
                self.proj_in[name] = nn.Linear(codes * width, dim)

    def _build_heads(self, segments: dict[str, dict[str, Any]], dim: int) -> None:
        self.proj_out, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name, segment in segments.items():
            if "shared_with" in segment or "channels" in segment:
                continue
            codes, tables = math.prod(segment_patch(segments, name)), num_tables(segments, name)
            width, size = code_width(dim, codes), segment["vocab_size"]
            if codes > 1:
                self.proj_out[name] = nn.Linear(dim, codes * width)
            self.heads[name] = CodebookHeads(tables, width, size) if tables > 1 else nn.Linear(width, size)

    def _initialize_segment_layers(self) -> None:
        """Embedded codes of the positions' scale, for either to be seen; zero heads, for a first loss of log K."""
        for embedding in self.code_embeddings.values():
            nn.init.normal_(embedding.weight, std=CODES_STD)
        for layer in self.proj_in.values():
            if isinstance(layer, StatesProjection):
                continue
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # keeps the scale
        for layer in self.heads.modules():
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def _table(self, name: str) -> str:
        """The segment whose embeddings and head this one uses."""
        return self.config.segments[name].get("shared_with", name)

    def _embed(
        self, codes: dict[str, torch.Tensor], offsets: Mapping[str, int] | None = None
    ) -> tuple[torch.Tensor, tuple[int, ...], tuple[torch.Tensor, torch.Tensor] | None]:
        """Embedded codes with positions (B, N, D), the segments' lengths in positions, and the cosines and sines
        (N, head_dim) of a model with rotary positions.

        Those are beside the added ones, not in their place: where all codes are masked, all values are equal, and no
        rotation of queries and keys tells one position from another. Those of a segment of blocks count from its
        start, `offsets` codes before the first of these, however long it is.
        """
        segments, parts, rotations = self.config.segments, [], []
        for name, value in codes.items():
            if "channels" in segments[name]:
                embedded = self.proj_in[name](value)
                grid = trained = (value.shape[1],)  # a state's place counts from the start, however many there are
            else:
                embedded, patch = self._embed_codes(name, value), segment_patch(segments, name)
                grid, trained = (
                    tuple(length // size for length, size in zip(shape, patch, strict=True))
                    for shape in (value.shape[1:], segments[name]["shape"])
                )
            own = None  # all of the grid's
            if "block_length" in segments[name]:
                start = (offsets or {}).get(name, 0)
                own = slice(start, start + grid[0])
                # One table for all blocks, and for longer texts few: tables are kept.
                grid = trained = trained if own.stop <= trained[0] else (1 << (own.stop - 1).bit_length(),)
            if self.config.use_rotary_positional_embeddings:
                tables = rotary_positions(grid, self.config.attention_head_dim, embedded.device)
                rotations.append(tables if own is None else tuple(table[own] for table in tables))
            centered = segments[name].get("centered_positions", False)
            scale = scale_of_sides(segments, name, value.shape[1:]) if centered else None
            positions = sincos_positions(grid, trained, self.inner_dim, embedded, scale)
            parts.append(embedded + (positions if own is None else positions[own]))
        rotary = tuple(torch.cat(tables) for tables in zip(*rotations, strict=True)) if rotations else None
        return torch.cat(parts, dim=1), tuple(part.shape[1] for part in parts), rotary

    def _embed_codes(self, name: str, codes: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, n, D) of a segment's codes (B, *shape), without positions."""
        segments, table = self.config.segments, self._table(name)
        if table not in self.proj_in:
            return self.code_embeddings[table](codes.flatten(1))
        codes = patchify(codes, segment_patch(segments, name))  # (B, n, P)
        if num_tables(segments, table) > 1:
            # One table after the other
            codes = codes + torch.arange(codes.shape[2], device=codes.device) * (segments[name]["vocab_size"] + 1)
        return self.proj_in[table](self.code_embeddings[table](codes).flatten(2))

    def _places(self, name: str, shape: tuple[int, ...], device: torch.device) -> tuple[torch.LongTensor, ...]:
        """What a segment's head takes besides states: each code's place in its patch (N,), where it has several."""
        if num_tables(self.config.segments, self._table(name)) == 1:
            return ()
        patch = segment_patch(self.config.segments, name)
        size = math.prod(patch)
        places = torch.arange(size, device=device).expand(1, math.prod(shape) // size, size)
        return (unpatchify(places[..., None], shape, patch)[0, :, 0],)

    def _logits(
        self,
        name: str,
        hidden_states: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        shape: tuple[int, ...],
        masked: torch.BoolTensor | None,
    ) -> torch.Tensor:
        """Logits (B, N, K) of a segment's codes, `shape` their grid, from its positions (B, n, D); or (M, K) of the
        masked ones, `masked` (B, N). Shift and scale are (1 or B, 1 or n, D)."""
        table = self._table(name)
        if table in self.proj_out:
            patch, places = segment_patch(self.config.segments, name), self._places(name, shape, hidden_states.device)
            hidden_states = F.gelu(modulate(self.norm_out, hidden_states, shift, scale), approximate="tanh")
            states = self.proj_out[table](hidden_states).unflatten(-1, (math.prod(patch), -1))  # (B, n, P, S)
            states = unpatchify(states, shape, patch)  # (B, N, S)
            if masked is not None:
                states = states[masked]  # (M, S)
                places = tuple(place.expand_as(masked)[masked] for place in places)  # (M,)
            return self.heads[table](states, *places)
        if masked is not None:
            if shift.shape[:2] != (1, 1):
                shift, scale = (x.expand_as(hidden_states)[masked] for x in (shift, scale))  # (M, D)
            else:
                shift, scale = shift[0], scale[0]  # (1, D)
            hidden_states = hidden_states[masked]  # (M, D)
        return self.heads[table](modulate(self.norm_out, hidden_states, shift, scale))


def segment_patch(segments: dict[str, dict[str, Any]], name: str) -> tuple[int, ...]:
    """The codes of a position along each axis of a segment: those of the segment whose tables it uses."""
    table = segments[segments[name].get("shared_with", name)]
    return tuple(table.get("patch", (1,) * len(segments[name]["shape"])))


def has_codebooks(segments: Mapping[str, Any], name: str) -> bool:
    """Whether the places in a segment's patch have codebooks of their own, as the last axis of residual codes has."""
    return segments[segments[name].get("shared_with", name)].get("separate_codebooks", False)


def scale_of_sides(segments: Mapping[str, Any], name: str, shape: Sequence[int]) -> float:
    """The codes of a segment's own grid that one of another grid `shape` is as long as, where the longest sides are.

    Sides are in codes, not in positions: a patch needn't be square. The codebooks of residual codes are no side.
    """
    trained = segments[name]["shape"]
    sides = slice(-1 if len(trained) == 3 and has_codebooks(segments, name) else None)
    return max(trained[sides]) / max(shape[sides])


def num_tables(segments: dict[str, dict[str, Any]], name: str) -> int:
    """The embedding tables, and heads, of a segment that shares with none."""
    return math.prod(segment_patch(segments, name)) if segments[name].get("separate_codebooks") else 1


def code_width(dim: int, codes: int) -> int:
    """Channels of a code's embedding, and of the state that its head takes, at a model width of `dim`."""
    return dim if codes == 1 else max(dim // 2, 64)


def patchify(codes: torch.Tensor, patch: tuple[int, ...]) -> torch.Tensor:
    """Codes (B, *shape) as (B, n, P): n patches in row-major order, P codes of each in row-major order."""
    sizes = [x for length, size in zip(codes.shape[1:], patch, strict=True) for x in (length // size, size)]
    axes = range(1, len(sizes) + 1)
    cut = codes.reshape(len(codes), *sizes).permute(0, *axes[::2], *axes[1::2])  # (B, *grid, *patch)
    return cut.flatten(1, len(patch)).flatten(2)


def unpatchify(values: torch.Tensor, shape: tuple[int, ...], patch: tuple[int, ...]) -> torch.Tensor:
    """Values (B, n, P, C) of the codes of each patch as (B, N, C), the codes of `shape` in row-major order."""
    grid = [length // size for length, size in zip(shape, patch, strict=True)]
    axes = [axis + offset for axis in range(1, len(patch) + 1) for offset in (0, len(patch))]
    values = values.reshape(len(values), *grid, *patch, values.shape[-1])
    return values.permute(0, *axes, -1).flatten(1, -2)


def ordered_codes(
    codes: Any, segments: dict[str, dict[str, Any]], argument: str, check_values: bool = True
) -> dict[str, torch.Tensor]:
    """Codes (B, *shape) and states (B, n, channels) by segment, checked and sorted by the segments' names: the order
    in a dict has no meaning, and JSON loses it.

    Raises:
        ValueError: for an unknown segment, a wrong shape or dtype, or a code out of range.
    """
    if not isinstance(codes, dict) or not codes:
        found = "an empty dict" if isinstance(codes, dict) else f"a {type(codes).__name__}"
        raise ValueError(f"{argument} must be a dict of codes of one or more of {list(segments)}, got {found}")
    for name, value in codes.items():
        if name not in segments:
            raise ValueError(f"{argument} has the segment {name!r}; this model has {list(segments)}")
        check_type(argument, name, value)
        if "channels" in segments[name]:
            check_states(argument, name, value, segments[name]["channels"])
            continue
        shape, size = segments[name]["shape"], segments[name]["vocab_size"]
        if value.ndim != 1 + len(shape):
            raise ValueError(
                f"{argument}[{name!r}] must have {1 + len(shape)} dimensions, (B, {', '.join(map(str, shape))}), "
                f"got shape {tuple(value.shape)}"
            )
        check_divisible(f"{argument}[{name!r}]", value.shape[1:], segment_patch(segments, name))
        if value.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{argument}[{name!r}] must be int64 or int32 codes, got {value.dtype}")
        if not value.numel():
            raise ValueError(f"{argument}[{name!r}] must not be empty, got shape {tuple(value.shape)}")
        if not check_values or torch.compiler.is_compiling():
            continue  # values are unknown while a graph is traced
        # Checked here, as a wrong index on a GPU kills the process's whole context.
        low, high = torch.stack(value.aminmax()).tolist()
        limit = size if argument == "hidden_states" else size - 1
        if low < 0 or high > limit:
            note = f"; {size} is the mask, and a segment with masked codes is generated" if limit < size else ""
            raise ValueError(f"{argument}[{name!r}] must be in [0, {limit}], got {low} to {high}{note}")
    sizes = {name: len(value) for name, value in codes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{argument} must have one batch size, got {sizes}")
    return {name: codes[name] for name in sorted(codes)}


def check_type(argument: str, name: str, value: Any) -> None:
    """Raise a ValueError unless it is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{argument}[{name!r}]={shown(value)} must be a tensor, got {type(value).__name__}")


def check_states(argument: str, name: str, states: torch.Tensor, channels: int) -> None:
    """Raise a ValueError unless states of an encoder are given, and are finite numbers (B, n, channels)."""
    where = f"{argument}[{name!r}]"
    if argument != "given":
        raise ValueError(f"{where}: states of an encoder are given, never generated")
    if states.ndim != 3 or states.shape[2] != channels or not states.is_floating_point() or not states.numel():
        raise ValueError(
            f"{where} must be states (B, n, {channels}) of an encoder, got {states.dtype} of {tuple(states.shape)}"
        )
    if not torch.compiler.is_compiling() and not states.isfinite().all():
        raise ValueError(f"{where} has states that are not finite")


def check_divisible(argument: str, shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """Raise a ValueError unless the patch divides the shape, axis by axis."""
    if any(length % size for length, size in zip(shape, patch, strict=True)):
        raise ValueError(f"{argument}: shape={list(shape)} must be divisible by the segment's patch {list(patch)}")


def check_masked(masked: Any, codes: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError unless `masked` has a bool for each of the generated codes (B, *shape), flattened."""
    if masked is None:
        return
    if not isinstance(masked, dict):
        raise ValueError(f"masked must be a dict of bools by segment, got {type(masked).__name__}")
    if masked.keys() != codes.keys():
        raise ValueError(f"masked must have the generated segments {sorted(codes)}, got {sorted(masked)}")
    for name, value in masked.items():
        expected = tuple(codes[name].flatten(1).shape)
        check_type("masked", name, value)
        if value.dtype != torch.bool or tuple(value.shape) != expected:
            raise ValueError(
                f"masked[{name!r}] must be bool of shape {expected}, got {value.dtype} of {tuple(value.shape)}"
            )


def check_centered(segments: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError unless a segment's positions are centered or not, and are of a grid where they are."""
    argument, shape = f"segments[{name!r}]: centered_positions", segments[name]["shape"]
    if check_flag(argument, segments[name].get("centered_positions", False)) and len(shape) == 1:
        raise ValueError(f"{argument}=True needs a grid, not shape={shown(shape)}")


def check_patch(segments: dict[str, dict[str, Any]], name: str) -> None:
    """Raise a ValueError unless a segment's patch, its own or that of the segment it shares with, fits its shape."""
    segment, argument = segments[name], f"segments[{name!r}]"
    if "channels" in segment:
        return
    if "block_length" in segment:
        length = check_integer(f"{argument}: block_length", segment["block_length"], 1)
        if len(segment["shape"]) != 1 or segment["shape"][0] % length:
            raise ValueError(f"{argument}: shape={segment['shape']} must be [n], n whole blocks of {length} codes")
        if "patch" in segments[segment.get("shared_with", name)]:
            raise ValueError(f"{argument} has a block_length and a patch; it takes one of the two")
    owner = segments[segment.get("shared_with", name)]
    for key in ("patch", "separate_codebooks"):
        if key in segment and owner.get(key) != segment[key]:
            raise ValueError(
                f"{argument}: {key}={segment[key]!r} must be {owner.get(key)!r}, as that of "
                f"{segment['shared_with']!r}, whose embeddings it uses"
            )
    separate = check_flag(f"{argument}: separate_codebooks", owner.get("separate_codebooks", False))
    if "patch" in owner:
        patch = check_integers(f"{argument}: patch", owner["patch"], 1, len(segment["shape"]))
        check_divisible(argument, tuple(segment["shape"]), tuple(patch))
    elif separate:
        raise ValueError(f"{argument}: separate_codebooks=True needs a patch: a codebook for each place in it")
