"""A norm of each position on its own, for an encoder whose codes are to depend on what is near them."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class PositionNorm(nn.Module):
    """Layer norm over the channels of each position of a feature map (B, C, H, W), or (B, C, N) as attention has it.

    Group norm has one mean and variance for a whole picture, so that a patch gets other codes when anything far from
    it changes, or the picture's size does. This norm leaves them as they were, where the model has no attention.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps).movedim(-1, 1)


def replace_group_norms(model: nn.Module) -> None:
    """Put a [`PositionNorm`] in the place of each group norm of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, PositionNorm(child.num_channels, child.eps))
