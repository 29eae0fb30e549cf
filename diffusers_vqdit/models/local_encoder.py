"""An image encoder whose codes depend on their own pixels and a narrow margin, not on the whole picture."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Encoder


class PositionwiseGroupNorm(nn.GroupNorm):
    """Group normalization of each position on its own: statistics over a group's channels, not over space."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        positions = hidden_states.permute(0, 2, 3, 1).reshape(-1, channels)  # (B * H * W, C)
        positions = F.group_norm(positions, self.num_groups, self.weight, self.bias, self.eps)
        return positions.view(batch, height, width, channels).permute(0, 3, 1, 2)  # (B, C, H, W)


def make_local(encoder: Encoder) -> None:
    """Narrow the receptive field of a diffusers `Encoder`, in place; its weights are new.

    Stock encoders tell each code about the whole picture, by norms over space and by 3 x 3 convolutions at the coarse
    levels: the same patch then has different codes in different pictures, and a model of the codes must learn each of
    them. Here norms see one position, and below the full resolution only the downsampling looks at neighbours. With
    one layer per block and a downsampling of 4, a code sees 13 x 13 pixels.
    """
    if any(attention is not None for attention in encoder.mid_block.attentions):
        raise ValueError("local_encoder=True needs mid_block_add_attention=False: attention sees the whole picture")
    coarse = [block.resnets for block in encoder.down_blocks[1:]] + [encoder.mid_block, encoder.conv_out]
    pointwise = {id(module) for part in coarse for module in part.modules() if isinstance(module, nn.Conv2d)}
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                norm = PositionwiseGroupNorm(child.num_groups, child.num_channels, eps=child.eps)
                setattr(parent, name, norm)
            elif id(child) in pointwise:
                setattr(parent, name, nn.Conv2d(child.in_channels, child.out_channels, kernel_size=1))
