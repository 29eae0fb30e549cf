"""Muon (Jordan et al. 2024) for the matrices of a transformer's blocks beside AdamW for all else, as one optimizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..models.transformer_vqdit import VQDiTTransformer2DModel
from .checkpoints import read_manifest


SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_muon(accelerator: Accelerator, *, resumed: bool = False) -> None:
    """Refuse, before the work, what Muon can't be trained with.

    Args:
        resumed: whether the run that goes on had Muon, in place of which it takes no other.

    Raises:
        ValueError: if this version of PyTorch has no Muon, or Accelerate is set up with an engine that shards.
    """
    begun, other = ("the run began with ", "") if resumed else ("", ", or give --optimizer adamw")
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"{begun}optimizer='muon', which needs torch 2.9 or later, this is {torch.__version__}: update it{other}"
        )
    kind = accelerator.distributed_type
    if kind in SHARDING:
        raise ValueError(
            f"{begun}optimizer='muon', which needs whole matrices, but distributed_type={kind.value!r} shards what is "
            f"trained: start with training/accelerate_configs/multi_gpu.yaml, for one{other}"
        )


def default_optimizer(
    accelerator: Accelerator, checkpoint: Path | None, pretrained: VQDiTTransformer2DModel | None
) -> str:
    """The optimizer where ``--optimizer`` gives none: that of the run that goes on; Muon where no transformer was
    pretrained, this PyTorch has it and no engine shards its matrices; AdamW else.

    Raises:
        ValueError: if the run that goes on had Muon, and it can't be trained with here ([`check_muon`]).
    """
    if checkpoint is None:
        trainable = hasattr(torch.optim, "Muon") and accelerator.distributed_type not in SHARDING
        return "muon" if trainable and pretrained is None else "adamw"
    kept = read_manifest(checkpoint).identity.get("optimizer", "adamw")
    if kept == "muon":
        check_muon(accelerator, resumed=True)
    return kept


def block_matrices(transformer: VQDiTTransformer2DModel) -> list[torch.nn.Parameter]:
    """The trained matrices of all blocks' attention and feed-forward; not adaLN's, which see no hidden states."""
    parts = [part for block in transformer.transformer_blocks for part in (block.attn1, block.ff)]
    return [weight for part in parts for weight in part.parameters() if weight.ndim == 2 and weight.requires_grad]


class MuonAdamW(torch.optim.Optimizer):
    """PyTorch's Muon over some matrices and an AdamW over other parameters, with one state dict.

    The first of the `param_groups` is Muon's, the others are AdamW's: a schedule, a scaler or Accelerate has them all.
    Muon's steps are scaled to the RMS of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training"), and so take
    its learning rate and weight decay. Parameters without gradients stay as they are.

    Args:
        matrices: the parameters (rows, columns) of Muon.
        adamw: over all others, none of `matrices`.
        lr, weight_decay: Muon's.
    """

    def __init__(
        self, matrices: list[torch.nn.Parameter], adamw: torch.optim.AdamW, *, lr: float, weight_decay: float
    ) -> None:
        self._adamw = adamw
        self._muon = torch.optim.Muon(
            [{"params": matrices}], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        # A polynomial schedule asks for the default rate.
        super().__init__([*self._muon.param_groups, *adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        # Both step over groups and states that are this optimizer's own.
        self._muon.__setstate__({"state": self.state, "param_groups": self.param_groups[:1]})
        self._adamw.__setstate__({"state": self.state, "param_groups": self.param_groups[1:]})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave.

        Raises:
            ValueError: if it is another optimizer's.
        """
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError("optimizer='muon' can't go on from another optimizer's state: give --optimizer adamw")
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with both, and return the loss of `closure`, where it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss
