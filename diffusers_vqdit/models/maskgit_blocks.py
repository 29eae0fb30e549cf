"""Encoder and decoder of MaskGIT's VQGAN (Chang et al. 2022, section 3.1): the stock blocks can't express them.

It has no attention, pools where VQGAN has strided convolutions, has as many residual blocks in the decoder as in the
encoder, and convolutions without a bias.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .config_checks import check_blocks


class MaskGITResnetBlock(nn.Module):
    """Residual block whose shortcut, where the width changes, is a projection of the block's *output*.

    So y = h + W h with h = conv(silu(norm(conv(silu(norm(x)))))), and x itself is dropped: a slip of the original code
    that its checkpoints were trained with.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        else:
            self.conv_shortcut = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        residual = hidden_states
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))  # (B, C_out, H, W)
        hidden_states = self.conv2(F.silu(self.norm2(hidden_states)))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(hidden_states)
        return hidden_states + residual


def _resnets(in_channels: int, out_channels: int, count: int, norm_num_groups: int) -> nn.Sequential:
    widths = [in_channels] + [out_channels] * count
    return nn.Sequential(
        *(MaskGITResnetBlock(a, b, norm_num_groups) for a, b in zip(widths[:-1], widths[1:], strict=True))
    )


class MaskGITDownBlock2D(nn.Module):
    """Residual blocks, then the mean of 2 x 2 pixels unless it is the last."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, norm_num_groups: int, add_downsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, norm_num_groups)
        self.add_downsample = add_downsample

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) to (B, C_out, H/2, W/2)."""
        hidden_states = self.resnets(hidden_states)
        return F.avg_pool2d(hidden_states, 2) if self.add_downsample else hidden_states


class MaskGITUpBlock2D(nn.Module):
    """Residual blocks, then nearest-neighbour upsampling and a convolution unless it is the last."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, norm_num_groups: int, add_upsample: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, norm_num_groups)
        self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1) if add_upsample else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C_in, H, W) to (B, C_out, 2H, 2W)."""
        hidden_states = self.resnets(hidden_states)
        if self.upsample_conv is not None:
            hidden_states = self.upsample_conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        return hidden_states


class MaskGITEncoder(nn.Module):
    """Pictures to latents.

    Args:
        in_channels: channels of the pictures.
        out_channels: channels of the latents.
        block_out_channels: width of each level; each level but the last halves the side.
        layers_per_block: residual blocks of each level and of the middle.
        norm_num_groups: groups of the group norms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
    ) -> None:
        check_blocks(block_out_channels, layers_per_block, norm_num_groups, in_channels, out_channels)
        super().__init__()
        last = block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1, bias=False)
        widths = [block_out_channels[0], *block_out_channels]
        self.down_blocks = nn.ModuleList(
            MaskGITDownBlock2D(
                widths[i], widths[i + 1], layers_per_block, norm_num_groups, i < len(block_out_channels) - 1
            )
            for i in range(len(block_out_channels))
        )
        self.mid_block = _resnets(last, last, layers_per_block, norm_num_groups)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, out_channels, 1)
        self.gradient_checkpointing = False

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, D, h, w)."""
        sample = self.conv_in(sample)
        for block in [*self.down_blocks, self.mid_block]:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                sample = self._gradient_checkpointing_func(block, sample)
            else:
                sample = block(sample)
        return self.conv_out(F.silu(self.conv_norm_out(sample)))


class MaskGITDecoder(nn.Module):
    """Latents to pictures; the arguments are [`MaskGITEncoder`]'s, `in_channels` being the latents'."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
    ) -> None:
        check_blocks(block_out_channels, layers_per_block, norm_num_groups, in_channels, out_channels)
        super().__init__()
        last = block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, last, 3, padding=1)
        self.mid_block = _resnets(last, last, layers_per_block, norm_num_groups)
        widths = [last, *reversed(block_out_channels)]
        self.up_blocks = nn.ModuleList(
            MaskGITUpBlock2D(
                widths[i], widths[i + 1], layers_per_block, norm_num_groups, i < len(block_out_channels) - 1
            )
            for i in range(len(block_out_channels))
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """(B, D, h, w) to (B, C, H, W); `latent_embeds` is there for the spatial norms of others and must be None."""
        if latent_embeds is not None:
            raise ValueError("latent_embeds must be None: MaskGIT's blocks have no spatial norm")
        sample = self.conv_in(sample)
        for block in [self.mid_block, *self.up_blocks]:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                sample = self._gradient_checkpointing_func(block, sample)
            else:
                sample = block(sample)
        return self.conv_out(F.silu(self.conv_norm_out(sample)))
