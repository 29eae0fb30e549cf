"""Models whose parameters Accelerate shards over the processes (FSDP2): whole ones of them, for what needs the whole.

Between steps a process has a part of each parameter only, a `DTensor`. All processes must gather together; what is
saved or drawn from is a copy of the model on the main process.
"""

import argparse
import copy
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor

from .optimization import averaged_weights, unwrap


logger = logging.getLogger(__name__)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether what Accelerate prepares has its parameters sharded."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_unsharded(accelerator: Accelerator) -> None:
    """Refuse the engines that a tokenizer isn't trained with.

    Raises:
        ValueError: if Accelerate is set up with one.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"distributed_type={kind.value!r} is for transformers: a tokenizer's codebook and a discriminator are "
            "trained whole on every process. Start with training/accelerate_configs/multi_gpu.yaml, for one"
        )


def prepare_sharding(args: argparse.Namespace, accelerator: Accelerator, model: torch.nn.Module) -> None:
    """What must be done before Accelerate shards a model: its blocks are named as units, and a whole copy is kept on
    the main process for [`whole_model`]. DeepSpeed is told the script's arguments. Else nothing is done.

    Raises:
        ValueError: if Accelerate is set up with the first version of FSDP.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {"train_micro_batch_size_per_gpu": args.train_batch_size, "gradient_clipping": args.max_grad_norm}
    if not is_sharded(accelerator):
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.is_main_process:
            logger.warning(
                "FSDP was asked for, but nothing is sharded: Accelerate shards on accelerators alone. Each process "
                "has the whole model"
            )
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version={plugin.fsdp_version} must be 2, as in training/accelerate_configs/fsdp2.yaml")
    if plugin.transformer_cls_names_to_wrap is None:
        blocks = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or []}
        # Accelerate refuses names of blocks that the model hasn't. Blocks of the denoiser of latents aren't called as
        # a whole alone, as a unit must be: it is one unit.
        units = {type(part).__name__ for part in model.modules() if not hasattr(part, "keys_and_values")}
        plugin.transformer_cls_names_to_wrap = sorted(units & blocks)
    if accelerator.is_main_process:
        # Not by the module's own __setattr__: it is no part of the model.
        model.__dict__["whole_copy"] = copy.deepcopy(model)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor in place of the part of it that a process has; all processes must ask for it together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on all processes, in the dtype of `other`, and sharded as that is."""
    value = value.to(other.dtype)
    return distribute_tensor(value, other.device_mesh, other.placements) if isinstance(other, DTensor) else value


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model without its wrappers, of whole tensors; all processes must ask for it together."""
    return {name: whole(value.detach()) for name, value in unwrap(model).state_dict().items()}


def whole_model(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module | None:
    """A model without its wrappers and, where it is sharded, the main process's copy with the weights of now.

    Where it is sharded, all processes must call this together; None on those that have no copy.
    """
    if not is_sharded(accelerator):
        return unwrap(model)
    state = whole_state(model)
    if not accelerator.is_main_process:
        return None
    copied = unwrap(model).__dict__["whole_copy"]
    copied.load_state_dict(state)
    return copied.to(accelerator.device)


@contextmanager
def evaluated(
    accelerator: Accelerator,
    model: torch.nn.Module,
    ema: EMAModel | None = None,
    parameters: Iterable[torch.nn.Parameter] = (),
) -> Iterator[Any]:
    """A trained model in evaluation mode, with its averaged weights, until the end of the ``with`` block: whole, on
    the main process. The others, which all must come here too, get None.

    Args:
        model: as Accelerate prepared it.
        ema, parameters: the moving averages, if there are any, and what they are of.
    """
    sharded = is_sharded(accelerator)
    if not sharded and not accelerator.is_main_process:
        yield None
        return
    with averaged_weights(ema, parameters):
        found = whole_model(accelerator, model)
        training = found is not None and found.training
        if found is not None:
            found.eval()
        try:
            yield found
        finally:
            if found is not None:
                found.train(training)


def clip_gradients(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    max_norm: float,
) -> torch.Tensor:
    """Scale the gradients of an optimizer's parameters to `max_norm` where they are longer; the norm before, of all
    processes' parts together."""
    if accelerator.scaler is not None and accelerator.distributed_type is not DistributedType.FSDP:
        # Accelerate's own clipping takes fp16's scale off the gradients of all optimizers, and so twice off those of
        # one that steps after another and has gathered them over several batches. (In a step in which the first
        # changes the scale, the second's earlier batches still count by the old one.)
        accelerator.unscale_gradients(optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    # DeepSpeed clips by itself, and knows a number, or none before its first step.
    return whole(norm) if isinstance(norm, torch.Tensor) else torch.tensor(float(norm or 0.0))
