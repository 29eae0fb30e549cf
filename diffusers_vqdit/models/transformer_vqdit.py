"""The denoiser: a diffusion transformer over segments of codes, or over continuous latents as in DiT."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook


@dataclass
class VQDiTOutput(BaseOutput):
    """Output of [`VQDiTTransformer2DModel`] with segments.

    Args:
        sample (`dict[str, torch.Tensor]`): for each generated segment logits (B, N, K) over its codes, positions in
            row-major order; or (M, K) at the M masked positions only, where `masked` was given.
    """

    sample: dict[str, torch.Tensor]


@dataclass
class VQDiTPrefix:
    """What the generated segments need of the given ones, for reuse at every sampling step.

    Args:
        names (`tuple[str, ...]`): the given segments.
        keys, values (`list[torch.Tensor]`): for each layer (B, S, heads, head_dim), S positions of all given segments.
    """

    names: tuple[str, ...]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    def repeat_interleave(self, repeats: int) -> "VQDiTPrefix":
        """Each sample `repeats` times in a row."""
        return self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def select(self, index: torch.Tensor | slice) -> "VQDiTPrefix":
        """The samples at `index`."""
        return self._map(lambda x: x[index])

    def _map(self, function) -> "VQDiTPrefix":
        return VQDiTPrefix(self.names, [function(x) for x in self.keys], [function(x) for x in self.values])


class VQDiTAttnProcessor:
    """Attention of a side's positions to the prefix and to themselves, through diffusers' choice of backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "VQDiTAttention",
        hidden_states: torch.Tensor,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the new hidden states (B, N, D), and keys and values (B, N, heads, head_dim) of these positions."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = attn.norm_q(query.unflatten(-1, (-1, attn.head_dim)))  # (B, N, heads, head_dim)
        key = attn.norm_k(key.unflatten(-1, (-1, attn.head_dim)))
        value = value.unflatten(-1, (-1, attn.head_dim))
        all_keys, all_values = key, value
        if prefix is not None:
            all_keys = torch.cat([prefix[0], key], dim=1)  # (B, S + N, heads, head_dim)
            all_values = torch.cat([prefix[1], value], dim=1)
        hidden_states = dispatch_attention_fn(
            query, all_keys, all_values, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](hidden_states)), key, value


class VQDiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with RMS-normalised queries and keys, for high learning rates (Dehghani et al. 2023).

    The projections carry diffusers' usual names, so that peft's and diffusers' LoRA targets fit.
    """

    _default_processor_cls = VQDiTAttnProcessor
    _available_processors = [VQDiTAttnProcessor]

    def __init__(self, dim: int, heads: int, head_dim: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.inner_dim = heads * head_dim
        self.use_bias = bias
        self.is_cross_attention = False
        self.added_kv_proj_dim = None
        self.to_q = nn.Linear(dim, self.inner_dim, bias=bias)
        self.to_k = nn.Linear(dim, self.inner_dim, bias=bias)
        self.to_v = nn.Linear(dim, self.inner_dim, bias=bias)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, dim), nn.Dropout(dropout)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self, hidden_states: torch.Tensor, prefix: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.processor(self, hidden_states, prefix)

    def keys_and_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values alone: all that the last layer's prefix is for."""
        if self.fused_projections:
            _, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            key, value = self.to_k(hidden_states), self.to_v(hidden_states)
        return self.norm_k(key.unflatten(-1, (-1, self.head_dim))), value.unflatten(-1, (-1, self.head_dim))


class VQDiTBlock(nn.Module):
    """DiT's block with adaLN-zero (Peebles & Xie 2023, section 3.2), conditioned on the segment."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, bias: bool, dropout: float, activation_fn: str, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.attn1 = VQDiTAttention(dim, heads, head_dim, bias, dropout)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.ff = FeedForward(dim, dropout=dropout, activation_fn=activation_fn)
        self.adaln = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        lengths: tuple[int, ...],
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        keys_only: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states (B, N, D), and keys and values (B, N, heads, head_dim) of these positions.

        `conditioning` is (1 or B, segments, D); `lengths` are the segments' positions, N together.
        """
        modulation = expand_segments(self.adaln(conditioning), lengths)  # (1 or B, N, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        normed = torch.addcmul(shift1, self.norm1(hidden_states), 1 + scale1)  # (B, N, D)
        if keys_only:
            return hidden_states, *self.attn1.keys_and_values(normed)
        attended, key, value = self.attn1(normed, prefix)
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        normed = torch.addcmul(shift2, self.norm2(hidden_states), 1 + scale2)
        return torch.addcmul(hidden_states, gate2, self.ff(normed)), key, value


def expand_segments(values: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """(B, segments, D) to (B, N, D): each segment's row at all of its positions."""
    if len(lengths) == 1:
        return values  # broadcasts over the positions
    return torch.cat([row.expand(-1, n, -1) for row, n in zip(values.split(1, dim=1), lengths, strict=True)], dim=1)


@lru_cache(maxsize=64)
def sincos_positions(shape: tuple[int, ...], trained_shape: tuple[int, ...], dim: int) -> torch.Tensor:
    """Sine-cosine positions (prod(shape), dim) of a line or a grid, each axis with an equal part of the channels.

    Coordinates are scaled to the trained shape, so that another grid covers the same range (Peebles & Xie 2023;
    Vaswani et al. 2017, section 3.5).
    """
    part = dim // (2 * len(shape)) * 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(0, part, 2, dtype=torch.float64) / part)
    axes = [torch.arange(n, dtype=torch.float64) * (base / n) for n, base in zip(shape, trained_shape, strict=True)]
    waves = []
    for coordinate in torch.meshgrid(*axes, indexing="ij"):
        angle = coordinate.flatten()[:, None] * frequencies
        waves += [angle.sin(), angle.cos()]
    return F.pad(torch.cat(waves, dim=1), (0, dim - part * len(shape))).float()


class VQDiTTransformer2DModel(DiTTransformer2DModel, AttentionMixin, PeftAdapterMixin):
    """A diffusion transformer that denoises segments of codes, given other segments.

    With ``segments=None`` it is diffusers' `DiTTransformer2DModel` over continuous latents, weights and outputs alike.
    With segments,
    the positions of the given ones attend to one another and never to generated ones; those attend to
    everything. So what a given segment contributes is the same at every sampling step: [`encode_prefix`] computes it
    once. No attention mask is needed.

    Codes of a segment are in [0, K), K being its ``vocab_size``; K itself is the mask. The mask is never predicted.

    Args:
        num_attention_heads, attention_head_dim, num_layers, dropout, attention_bias, activation_fn, norm_eps: as in
            `DiTTransformer2DModel`, whose other arguments hold for ``segments=None`` only.
        segments: name -> ``{"vocab_size": K, "shape": [n] or [h, w]}``.
        tasks: the tasks that the weights were trained for, such as ``["text->image", "->image"]``.
        time_conditioned: whether adaLN sees the time too. The share of masked codes already tells it.

    Raises:
        ValueError: if a segment lacks its size or shape.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["VQDiTBlock", "BasicTransformerBlock"]
    _repeated_blocks = ["VQDiTBlock", "BasicTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "code_embeddings", "norm"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        segments: dict[str, dict[str, Any]] | None = None,
        tasks: list[str] | None = None,
        time_conditioned: bool = False,
    ) -> None:
        if segments is None:
            super().__init__(
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                in_channels=in_channels,
                out_channels=out_channels,
                num_layers=num_layers,
                dropout=dropout,
                norm_num_groups=norm_num_groups,
                attention_bias=attention_bias,
                sample_size=sample_size,
                patch_size=patch_size,
                activation_fn=activation_fn,
                num_embeds_ada_norm=num_embeds_ada_norm,
                upcast_attention=upcast_attention,
                norm_type=norm_type,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            return
        super(DiTTransformer2DModel, self).__init__()
        check_segments(segments)
        dim = num_attention_heads * attention_head_dim
        self.inner_dim = dim
        self.gradient_checkpointing = False
        # 1. Codes and conditioning. The row after the last code is the mask's.
        self.code_embeddings = nn.ModuleDict(
            {name: nn.Embedding(segment["vocab_size"] + 1, dim) for name, segment in segments.items()}
        )
        # One row a segment and role: first the given ones, then the generated ones.
        self.segment_embedding = nn.Embedding(2 * len(segments), dim)
        if time_conditioned:
            self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.time_embedding = TimestepEmbedding(256, dim)
        # 2. Blocks
        self.transformer_blocks = nn.ModuleList(
            VQDiTBlock(dim, num_attention_heads, attention_head_dim, attention_bias, dropout, activation_fn, norm_eps)
            for _ in range(num_layers)
        )
        # 3. Output
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaln_out = nn.Linear(dim, 2 * dim)
        self.heads = nn.ModuleDict({name: nn.Linear(dim, segment["vocab_size"]) for name, segment in segments.items()})
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        """DiT's initialisation: Xavier matrices, zero modulation and heads; the first loss is log K exactly."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in self.code_embeddings.values():
            nn.init.normal_(embedding.weight, std=0.5)  # the positions' scale, for either to be seen
        nn.init.normal_(self.segment_embedding.weight, std=0.5)
        for layer in [block.adaln for block in self.transformer_blocks] + [self.adaln_out, *self.heads.values()]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    # -----------------------------------------------------------------------------------------------------------------
    # Parts of the forward pass

    def _ordered(self, codes: dict[str, torch.Tensor], argument: str) -> dict[str, torch.Tensor]:
        """Checked codes, sorted by the segments' names: the order in a dict has no meaning, and JSON loses it."""
        segments = self.config.segments
        for name, value in codes.items():
            if name not in segments:
                raise ValueError(f"{argument} has the segment {name!r}; this model has {list(segments)}")
            shape, size = segments[name]["shape"], segments[name]["vocab_size"]
            if value.ndim != 1 + len(shape):
                raise ValueError(
                    f"{argument}[{name!r}] must have {1 + len(shape)} dimensions, (B, {', '.join(map(str, shape))}), "
                    f"got shape {tuple(value.shape)}"
                )
            if value.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"{argument}[{name!r}] must be int64 or int32 codes, got {value.dtype}")
            if value.numel() and (value.min() < 0 or value.max() > size):
                raise ValueError(
                    f"{argument}[{name!r}] must be in [0, {size}], {size} being the mask; got values from "
                    f"{value.min()} to {value.max()}"
                )
        sizes = {name: len(value) for name, value in codes.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{argument} must have one batch size, got {sizes}")
        return {name: codes[name] for name in sorted(codes)}

    def _embed(self, codes: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Embedded codes with positions (B, N, D), and the segments' lengths."""
        parts = []
        for name, value in codes.items():
            embedding = self.code_embeddings[name]
            trained = tuple(self.config.segments[name]["shape"])
            positions = sincos_positions(tuple(value.shape[1:]), trained, self.inner_dim)
            parts.append(embedding(value.flatten(1)) + positions.to(embedding.weight.device, embedding.weight.dtype))
        return torch.cat(parts, dim=1), tuple(part.shape[1] for part in parts)

    def _conditioning(self, names: list[str], generated: bool, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """SiLU of the conditioning (1 or B, segments, D), as adaLN takes it."""
        order = sorted(self.config.segments)
        rows = [order.index(name) + len(order) * generated for name in names]
        weight = self.segment_embedding.weight
        conditioning = self.segment_embedding(torch.tensor(rows, device=weight.device))[None]  # (1, segments, D)
        if self.config.time_conditioned and generated:
            if timestep is None:
                raise ValueError("timestep is None, but this model is time_conditioned: give times (B,) in [0, 1]")
            frequencies = self.time_proj(1000.0 * timestep.reshape(-1).float()).to(weight.dtype)
            conditioning = conditioning + self.time_embedding(frequencies)[:, None]  # (B, segments, D)
        return F.silu(conditioning)

    def _block(self, block: VQDiTBlock, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    @apply_forward_hook
    def encode_prefix(self, given: dict[str, torch.LongTensor]) -> VQDiTPrefix:
        """Keys and values of the given segments at every layer.

        Args:
            given: name -> codes (B, *shape), at least one segment.

        Raises:
            ValueError: for an unknown segment, a wrong shape or dtype, or a code out of range.
        """
        if not given:
            raise ValueError("given is empty: without given segments there is no prefix")
        given = self._ordered(given, "given")
        hidden_states, lengths = self._embed(given)  # (B, S, D)
        conditioning = self._conditioning(list(given), generated=False)
        keys, values = [], []
        for block in self.transformer_blocks:
            last = block is self.transformer_blocks[-1]
            hidden_states, key, value = self._block(block, hidden_states, conditioning, lengths, None, last)
            keys.append(key)
            values.append(value)
        return VQDiTPrefix(tuple(given), keys, values)

    # -----------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor | dict[str, torch.LongTensor],
        timestep: torch.Tensor | None = None,
        class_labels: torch.LongTensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        given: dict[str, torch.LongTensor] | None = None,
        prefix: VQDiTPrefix | None = None,
        masked: dict[str, torch.BoolTensor] | None = None,
        return_dict: bool = True,
    ) -> VQDiTOutput | Transformer2DModelOutput | tuple:
        """Predict the codes of the generated segments.

        Args:
            hidden_states: name -> codes (B, *shape) of the generated segments, K where masked. Without segments,
                latents (B, C, H, W), and the arguments are those of `DiTTransformer2DModel`.
            timestep: times (B,) in [0, 1], for a time-conditioned model.
            given: name -> codes (B, *shape) of the given segments.
            prefix: what [`encode_prefix`] made of them, in place of `given`.
            masked: name -> (B, N) bool, N = prod(shape); logits are then computed at these positions only.

        Returns:
            [`VQDiTOutput`], or a tuple with its dict.

        Raises:
            ValueError: for an unknown segment or one on both sides, a wrong shape or dtype, or a code out of range.
        """
        if self.config.segments is None:
            if given is not None or prefix is not None or masked is not None:
                raise ValueError("given, prefix and masked need a model with segments; this one has segments=None")
            return super().forward(hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)
        if not isinstance(hidden_states, dict) or not hidden_states:
            raise ValueError(
                f"hidden_states must be a dict of segment names to codes, from {list(self.config.segments)}, "
                f"got {type(hidden_states).__name__}"
            )
        if given and prefix is not None:
            raise ValueError("give given or prefix, not both")

        # 1. Given segments
        if given:
            prefix = self.encode_prefix(given)
        both = set(hidden_states) & set(prefix.names if prefix is not None else ())
        if both:
            raise ValueError(f"the segments {sorted(both)} are given and generated at once")

        # 2. Generated segments
        codes = self._ordered(hidden_states, "hidden_states")
        names = list(codes)
        hidden, lengths = self._embed(codes)  # (B, N, D)
        if prefix is not None and len(prefix.keys[0]) != len(hidden):
            raise ValueError(f"the prefix has {len(prefix.keys[0])} samples, hidden_states {len(hidden)}")
        conditioning = self._conditioning(names, generated=True, timestep=timestep)
        for layer, block in enumerate(self.transformer_blocks):
            memory = (prefix.keys[layer], prefix.values[layer]) if prefix is not None else None
            hidden, _, _ = self._block(block, hidden, conditioning, lengths, memory)

        # 3. Heads
        modulation = self.adaln_out(conditioning)  # (1 or B, segments, 2D)
        sample = {}
        for index, (name, part) in enumerate(zip(names, hidden.split(lengths, dim=1), strict=True)):
            shift, scale = modulation[:, index : index + 1].chunk(2, dim=-1)  # (1 or B, 1, D)
            if masked is not None:
                where = masked[name]
                if len(shift) > 1:
                    shift, scale = (x.expand_as(part)[where] for x in (shift, scale))  # (M, D)
                else:
                    shift, scale = shift[0], scale[0]  # (1, D)
                part = part[where]  # (M, D)
            sample[name] = self.heads[name](torch.addcmul(shift, self.norm_out(part), 1 + scale))  # (.., K)
        return VQDiTOutput(sample=sample) if return_dict else (sample,)


def check_segments(segments: dict[str, dict[str, Any]]) -> None:
    """Raise a ValueError that names the segment whose vocabulary size or shape is missing or no positive number."""
    if not segments:
        raise ValueError("segments={} has no segment; use segments=None for continuous latents")
    for name, segment in segments.items():
        size, shape = segment.get("vocab_size"), segment.get("shape")
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"segments[{name!r}]: vocab_size={size!r} must be a positive integer")
        if not isinstance(shape, list | tuple) or len(shape) not in (1, 2) or any(n < 1 for n in shape):
            raise ValueError(f"segments[{name!r}]: shape={shape!r} must be [n] or [h, w] with positive numbers")
