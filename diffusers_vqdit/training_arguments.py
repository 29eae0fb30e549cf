"""The flags that all training scripts have, with the names of diffusers' own scripts."""

import argparse
import re
from pathlib import Path

from .hub.training_run import add_publishing_arguments


def add_training_arguments(
    parser: argparse.ArgumentParser,
    *,
    output_dir: str,
    train_batch_size: int,
    num_train_epochs: int,
    learning_rate: float,
    lr_scheduler: str,
    lr_warmup_steps: int,
    adam_beta2: float,
    adam_weight_decay: float,
    ema_decay: float,
) -> argparse._ArgumentGroup:
    """Add the flags of optimisation with a script's own defaults, and return their group for what else it has."""
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, default=Path(output_dir))
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--train_batch_size", type=int, default=train_batch_size, help="Samples per device and micro-batch."
    )
    group.add_argument("--num_train_epochs", type=int, default=num_train_epochs)
    group.add_argument("--max_train_steps", type=int, help="Optimizer steps; overrides num_train_epochs.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--learning_rate", type=float, default=learning_rate)
    group.add_argument("--lr_scheduler", default=lr_scheduler)
    group.add_argument("--lr_warmup_steps", type=int, default=lr_warmup_steps)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=adam_beta2)
    group.add_argument("--adam_weight_decay", type=float, default=adam_weight_decay)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument("--use_ema", action="store_true")
    group.add_argument("--ema_decay", type=float, default=ema_decay)
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    return group


def add_transformer_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what only the training of transformers has."""
    group.add_argument("--scale_lr", action="store_true", help="Multiply the rate by devices and accumulation.")
    group.add_argument("--allow_tf32", action="store_true")
    group.add_argument("--compile", action="store_true", help="Compile the transformer's blocks (torch.compile).")


def add_patch_argument(group: argparse._ArgumentGroup) -> None:
    """Add the codes a position of a new transformer over codes."""

    def parse(text: str) -> tuple[str, list[int]]:
        match = re.fullmatch(r"(\w+)=(\d+(?:x\d+){0,2})", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} must be a segment and its patch, such as image=2x2")
        return match[1], [int(size) for size in match[2].split("x")]

    group.add_argument(
        "--patch",
        action="append",
        type=parse,
        default=[],
        metavar="SEGMENT=HxW",
        help="Codes a position of a new transformer holds, such as image=2x2; once a segment. The segments that share "
        "its embeddings do as it does.",
    )


def with_patches(segments: dict[str, dict], patches: list[tuple[str, list[int]]]) -> dict[str, dict]:
    """The data's segments with the patches of ``--patch``.

    Raises:
        ValueError: for a patch of a segment that isn't there, or that uses another's embeddings.
    """
    own = [name for name, segment in segments.items() if "shared_with" not in segment]
    for name, patch in patches:
        if name not in own:
            raise ValueError(f"patch: {name!r} must be a segment with embeddings of its own, one of {own}")
        segments = {**segments, name: {**segments[name], "patch": patch}}
    return segments


def add_keeping_arguments(parser: argparse.ArgumentParser, validation_steps: int = 500) -> argparse._ArgumentGroup:
    """Add the flags of checkpoints, validation, trackers and uploads, and return their group."""
    group = parser.add_argument_group("checkpoints, validation, tracking, publishing")
    group.add_argument("--checkpointing_steps", type=int, default=500)
    group.add_argument("--checkpoints_total_limit", type=int, default=2)
    group.add_argument("--resume_from_checkpoint", help="'latest', or the name of a checkpoint in output_dir.")
    group.add_argument("--validation_steps", type=int, default=validation_steps)
    group.add_argument("--report_to", default="tensorboard", help="Tracker of Accelerate, or 'none'.")
    group.add_argument("--logging_dir", default="logs")
    add_publishing_arguments(group)
    return group
