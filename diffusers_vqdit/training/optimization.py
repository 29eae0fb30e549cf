"""Which weights are decayed, averaged, dropped out; the model inside its wrappers."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, *, without: Iterable[torch.nn.Parameter] = ()
) -> list[dict]:
    """Weight decay for matrices only; embeddings, norms and biases have none.

    Args:
        without: parameters that are another optimizer's.
    """
    others = {id(parameter) for parameter in without}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in others:
            (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@contextmanager
def averaged_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Give parameters their moving averages until the end of the ``with`` block; without an EMA nothing changes."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def tokenizer_learning_rate(block_out_channels: Sequence[int], num_codes: int) -> float:
    """Adam's learning rate for an image tokenizer from scratch: 2e-3 up to f4, 5e-4 at f8, 2.5e-4 at f16; in inverse
    proportion to the width beyond 96 channels (Yang et al. 2022, muP); half beyond 2,048 codes, of which each is found
    in fewer vectors. Found with batches of 4 to 32 crops, see docs/image_tokenizer.md; at f16, 512 channels and 16,384
    codes it is a quarter of what the public ones have with batches of hundreds.

    Args:
        block_out_channels: of `ImageVQModel`, from the first level to the last.
        num_codes: of its codebook.
    """
    factor = 2 ** (len(block_out_channels) - 1)
    rate = (2e-3 if factor <= 4 else 4e-3 / factor) * min(1.0, 96 / max(block_out_channels))
    return rate if num_codes <= 2048 else rate / 2


def set_dropout(model: ModelMixin, dropout: float) -> None:
    """Give a loaded model another dropout rate, in all its dropout layers and in its config."""
    model.register_to_config(dropout=dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel or torch.compile: Accelerate's ``unwrap_model``, for losses too, which
    know no accelerator."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def transformer_learning_rate(hidden_size: int, *, pretrained: bool) -> float:
    """The learning rate for a transformer over codes: 1e-3 from scratch. A pretrained one learns a few new pictures
    in as few steps as it can, so at 2e-3, and in inverse proportion to its width beyond 256."""
    return 2e-3 * min(1.0, 256 / hidden_size) if pretrained else 1e-3
