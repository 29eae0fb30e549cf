"""The flags that all training scripts have, with the names of diffusers' own scripts."""

import argparse
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
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="0 clips nothing.")
    group.add_argument(
        "--max_skipped_steps",
        type=int,
        default=3,
        help="A step whose loss or gradients are not finite is skipped; so many in a row stop the run, 0 for never.",
    )
    group.add_argument("--use_ema", action="store_true")
    group.add_argument("--ema_decay", type=float, default=ema_decay)
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    return group


def add_transformer_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what only the training of transformers has."""
    group.add_argument("--scale_lr", action="store_true", help="Multiply the rate by devices and accumulation.")
    group.add_argument("--allow_tf32", action="store_true")
    group.add_argument("--compile", action="store_true", help="Compile the transformer's blocks (torch.compile).")


def add_keeping_arguments(parser: argparse.ArgumentParser, validation_steps: int = 500) -> argparse._ArgumentGroup:
    """Add the flags of checkpoints, validation, trackers and uploads, and return their group."""
    group = parser.add_argument_group("checkpoints, validation, tracking, publishing")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="0: at the end only.")
    group.add_argument("--checkpoints_total_limit", type=int, default=2, help="0 keeps all.")
    group.add_argument(
        "--resume_from_checkpoint", help="'latest', the name of a checkpoint in output_dir, or the path of another."
    )
    group.add_argument("--validation_steps", type=int, default=validation_steps, help="0: at the end only.")
    group.add_argument("--report_to", default="tensorboard", help="Tracker of Accelerate, or 'none'.")
    group.add_argument("--logging_dir", default="logs")
    add_publishing_arguments(group)
    return group
