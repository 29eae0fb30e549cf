"""A norm of each position on its own, for an encoder whose codes are to depend on what is near them."""

import torch
import torch.nn as nn


class PositionNorm(nn.LayerNorm):
    """Layer norm over the channels C of each position of features (B, C, H, W), or (B, C, N) as attention has them.

    Group norm has one mean and variance for a whole picture, so that a patch gets other codes when anything far from
    it changes, or the picture's size does. This norm leaves them as they were, where the model has no attention.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def replace_group_norms(model: nn.Module) -> None:
    """Put a [`PositionNorm`] with new weights in the place of each group norm of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, PositionNorm(child.num_channels, child.eps))
