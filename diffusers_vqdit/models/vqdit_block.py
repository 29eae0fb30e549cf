"""The block of the transformer over codes."""

import torch
import torch.nn as nn
from diffusers.models.attention import FeedForward

from .attention_processor import VQDiTAttention
from .layers import expand_segments, modulate


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
        hidden_states: torch.Tensor | None,
        conditioning: torch.Tensor,
        lengths: tuple[int, ...] = (),
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        keys_only: bool = False,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor:
        """Hidden states (B, N, D), and keys and values (B, N, heads, head_dim) of these positions.

        `conditioning` is (1 or B, segments, D); `lengths` are the segments' positions, N together;
        `image_rotary_emb` has the cosines and sines (N, head_dim) of a model with rotary positions; `attention_mask`
        is the attention's. `modulation` is what the block makes of the conditioning (1 or B, segments, 6D): all it
        returns where there are no hidden states.
        """
        if hidden_states is None:
            return self.adaln(conditioning)
        if modulation is None:
            modulation = self.adaln(conditioning)
        modulation = expand_segments(modulation, lengths)  # (1 or B, N, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        normed = modulate(self.norm1, hidden_states, shift1, scale1)  # (B, N, D)
        if keys_only:
            return hidden_states, *self.attn1.keys_and_values(normed, image_rotary_emb)
        attended, key, value = self.attn1(normed, prefix, image_rotary_emb, attention_mask)
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        normed = modulate(self.norm2, hidden_states, shift2, scale2)
        return torch.addcmul(hidden_states, gate2, self.ff(normed)), key, value
