"""Training low-rank matrices (LoRA) beside a pipeline's frozen transformer, and saving them."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..utils.arguments import positive_integer, share
from ..utils.checks import shown
from ..utils.weight_files import check_finite
from .files import full_disk_named, move_into_place, scratch_folder


LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of LoRA."""
    lora = parser.add_argument_group("LoRA, in place of training all weights")
    lora.add_argument(
        "--rank", type=positive_integer, help="Rank of the LoRA matrices. Without it all weights are trained."
    )
    lora.add_argument(
        "--lora_alpha", type=positive_integer, help="Scale of the LoRA, alpha / rank; by default alpha is the rank."
    )
    lora.add_argument("--lora_dropout", type=share, default=0.0)
    lora.add_argument("--lora_layers", nargs="+", default=LORA_LAYERS, help="Linear layers that get LoRA matrices.")


def check_lora_layers(transformer: VQDiTTransformer2DModel, layers: Sequence[str]) -> None:
    """Raise a ValueError that names a layer of ``--lora_layers`` that no linear layer of the transformer is called."""
    linear = [name for name, part in transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    for layer in layers:
        found = [name for name, _ in transformer.named_modules() if name == layer or name.endswith(f".{layer}")]
        if not found or not set(found) <= set(linear):
            there = dict.fromkeys(re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in linear)
            raise ValueError(f"lora_layers has {shown(layer)}, which must be linear layers, some of {list(there)}")


def add_lora(transformer: VQDiTTransformer2DModel, args: argparse.Namespace) -> None:
    """Freeze the transformer and give it the trained matrices of `args.rank`."""
    from peft import LoraConfig

    transformer.requires_grad_(False)
    alpha = args.lora_alpha or args.rank
    transformer.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=alpha, lora_dropout=args.lora_dropout, target_modules=args.lora_layers)
    )


def save_lora(transformer: VQDiTTransformer2DModel, folder: Path) -> list[str]:
    """Write the LoRA as diffusers' pipelines load it, in place of an earlier one once it is whole; names the file."""
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(transformer)
    check_finite(layers, "the LoRA is not saved")
    with scratch_folder(folder) as scratch, full_disk_named("the LoRA", folder):
        VQDiTPipeline.save_lora_weights(
            scratch,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
        return move_into_place(scratch, folder)
