"""Attention of the diffusion transformer: every processor here goes through diffusers' choice of backends."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb


class DiTAttnProcessor:
    """`AttnProcessor2_0` as DiT uses it (self-attention), which obeys ``set_attention_backend`` and takes a prefix.

    Stock DiT's own processor calls PyTorch's attention directly, so that a chosen backend is silently ignored.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """New hidden states (B, N, D). DiT's blocks pass no encoder states.

        `prefix` has the keys and values (B, S, heads, head_dim) of S more positions to see, before the N own ones;
        `attention_mask` (B, 1, 1 or N, S + N) is false where nothing may be seen.
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1))  # (B, N, heads, head_dim)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if prefix is not None:
            key = torch.cat([prefix[0], key], dim=1)  # (B, S + N, heads, head_dim)
            value = torch.cat([prefix[1], value], dim=1)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2, 3).to(query.dtype)))


class VQDiTAttnProcessor:
    """Attention of a side's positions to the prefix and to themselves, through diffusers' choice of backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "VQDiTAttention",
        hidden_states: torch.Tensor,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the new hidden states (B, N, D), and keys and values (B, N, heads, head_dim) of these positions.

        `prefix` has keys and values (R, S, heads, head_dim) for the first R rows; the other rows see none.
        `image_rotary_emb` has the cosines and sines (N, head_dim) of these positions; None rotates nothing.
        `attention_mask`, (R, 1, 1 or N, S + N) with a prefix and else (B, 1, 1 or N, N), is false where nothing is
        seen.
        """
        hidden_states = autocast(hidden_states)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = normalize(attn.norm_q, query.unflatten(-1, (-1, attn.head_dim)))  # (B, N, heads, head_dim)
        key = normalize(attn.norm_k, key.unflatten(-1, (-1, attn.head_dim)))
        query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)
        value = value.unflatten(-1, (-1, attn.head_dim))
        if prefix is None:
            hidden_states = self._attend(query, key, value, attention_mask)
        else:
            rows = len(prefix[0])
            all_keys = torch.cat([prefix[0], key[:rows]], dim=1)  # (R, S + N, heads, head_dim)
            all_values = torch.cat([prefix[1], value[:rows]], dim=1)
            hidden_states = self._attend(query[:rows], all_keys, all_values, attention_mask)
            if rows < len(query):
                hidden_states = torch.cat([hidden_states, self._attend(query[rows:], key[rows:], value[rows:])])
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](hidden_states)), key, value

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


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
        self,
        hidden_states: torch.Tensor,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.processor(self, hidden_states, prefix, image_rotary_emb, attention_mask)

    def keys_and_values(
        self, hidden_states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values alone: all that the last layer's prefix is for."""
        hidden_states = autocast(hidden_states)
        if self.fused_projections:
            _, key, value = self.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            key, value = self.to_k(hidden_states), self.to_v(hidden_states)
        key = rotate(normalize(self.norm_k, key.unflatten(-1, (-1, self.head_dim))), image_rotary_emb)
        return key, value.unflatten(-1, (-1, self.head_dim))


def autocast(x: torch.Tensor) -> torch.Tensor:
    """States in the type that autocast gives to linear layers, once for all that take them; else as they are."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def normalize(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """RMS norm in the type of `x`: backends want one type for queries, keys and values, and PyTorch has one kernel for
    it where autocast's weights in float32 take seven."""
    if norm.weight.dtype == x.dtype or norm.weight.device != x.device:  # offloaded ones come with the module's call
        return norm(x).to(x.dtype)
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Queries or keys (B, N, heads, head_dim), rotated by cosines and sines (N, head_dim), or (B, N, head_dim) where
    the rows are of other positions; None rotates nothing."""
    if rotary is None:
        return x
    if rotary[0].ndim == 3:
        flat = (rotary[0].flatten(0, 1), rotary[1].flatten(0, 1))
        return apply_rotary_emb(x.flatten(0, 1)[None], flat, sequence_dim=1)[0].view_as(x)
    return apply_rotary_emb(x, rotary, sequence_dim=1)
