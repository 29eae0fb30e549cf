"""The flags that all training scripts have, with the names of diffusers' own scripts."""

import argparse
import re
from pathlib import Path

from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType

from ..utils.arguments import (
    decay,
    model_name,
    non_negative_integer,
    non_negative_number,
    output_path,
    positive_integer,
    positive_number,
    random_seed,
)
from ..utils.checks import check_choice
from ..utils.redaction import known_secrets, without_secrets
from .publish import add_publishing_arguments


# Without the one that needs rules, which no flag gives.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]


def add_training_arguments(
    parser: argparse.ArgumentParser,
    *,
    output_dir: str,
    train_batch_size: int,
    num_train_epochs: int,
    learning_rate: float | None,
    lr_scheduler: str,
    lr_warmup_steps: int | None,
    adam_beta2: float,
    adam_weight_decay: float,
    ema_decay: float | None,
) -> argparse._ArgumentGroup:
    """Add the flags of optimisation with a script's own defaults, and return their group for what else it has."""
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=output_path, default=Path(output_dir))
    group.add_argument("--seed", type=random_seed, default=0)
    group.add_argument(
        "--train_batch_size",
        type=positive_integer,
        default=train_batch_size,
        help="Samples per device and micro-batch.",
    )
    group.add_argument("--num_train_epochs", type=positive_integer, default=num_train_epochs)
    group.add_argument("--max_train_steps", type=positive_integer, help="Optimizer steps; overrides num_train_epochs.")
    group.add_argument("--gradient_accumulation_steps", type=positive_integer, default=1)
    group.add_argument("--gradient_checkpointing", action="store_true")
    by_width = None if learning_rate is not None else "By default what suits the model's size."
    group.add_argument("--learning_rate", type=non_negative_number, default=learning_rate, help=by_width)
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default=lr_scheduler)
    by_steps = None if lr_warmup_steps is not None else "By default a twentieth of the steps, at most 200."
    group.add_argument("--lr_warmup_steps", type=non_negative_integer, default=lr_warmup_steps, help=by_steps)
    group.add_argument(
        "--lr_num_cycles", type=positive_integer, default=1, help="How often cosine_with_restarts begins."
    )
    group.add_argument("--lr_power", type=positive_number, default=1.0, help="Of the polynomial schedule.")
    group.add_argument("--adam_beta1", type=decay, default=0.9)
    group.add_argument("--adam_beta2", type=decay, default=adam_beta2)
    group.add_argument("--adam_weight_decay", type=non_negative_number, default=adam_weight_decay)
    group.add_argument("--adam_epsilon", type=positive_number, default=1e-8)
    group.add_argument(
        "--max_grad_norm", type=non_negative_number, default=1.0, help="Longer gradients are scaled to it; 0: never."
    )
    group.add_argument(
        "--max_skipped_steps",
        type=non_negative_integer,
        default=3,
        help="A step whose loss or gradients are not finite is skipped; so many in a row stop the run, 0 for never.",
    )
    group.add_argument("--use_ema", action="store_true")
    by_steps = None if ema_decay is not None else "By default averages over a fifth of the steps, at most 0.999."
    group.add_argument("--ema_decay", type=decay, default=ema_decay, help=by_steps)
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    group.add_argument("--compile", action="store_true", help="Compile the model's blocks (torch.compile).")
    return group


def add_transformer_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what only the training of transformers has."""
    group.add_argument("--scale_lr", action="store_true", help="Multiply the rate by devices and accumulation.")
    group.add_argument("--allow_tf32", action="store_true")


def add_model_arguments(group: argparse._ArgumentGroup, pretrained: str, **size: int) -> None:
    """Add what is trained: a pretrained one, which `pretrained` describes, or a new one of `size` by default over an
    image tokenizer."""
    group.add_argument("--pretrained_model_name_or_path", type=model_name, help=f"{pretrained}: a folder or a Hub id.")
    group.add_argument(
        "--image_vq",
        type=model_name,
        help="ImageVQModel for training from scratch: a folder or a Hub id of its own or of a pipeline.",
    )
    for name in ("num_layers", "num_attention_heads", "attention_head_dim"):
        group.add_argument(f"--{name}", type=positive_integer, default=size[name])


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


def tracker(text: str) -> str:
    """The type of a flag that takes a tracker of Accelerate by its name."""
    names = ["none", "all", *(kind.value for kind in LoggerType if kind is not LoggerType.ALL)]
    try:
        return check_choice("value", text, names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_keeping_arguments(parser: argparse.ArgumentParser, validation_steps: int = 500) -> argparse._ArgumentGroup:
    """Add the flags of checkpoints, validation, trackers and uploads, and return their group."""
    group = parser.add_argument_group("checkpoints, validation, tracking, publishing")
    group.add_argument(
        "--checkpointing_steps",
        type=non_negative_integer,
        default=500,
        help="Steps between checkpoints; 0: at the end only.",
    )
    group.add_argument(
        "--checkpoints_total_limit",
        type=non_negative_integer,
        default=2,
        help="How many checkpoints are kept, the newest; 0: all.",
    )
    group.add_argument(
        "--resume_from_checkpoint", help="'latest', the name of a checkpoint in output_dir, or the path of another."
    )
    group.add_argument(
        "--validation_steps",
        type=non_negative_integer,
        default=validation_steps,
        help="Steps between validations; 0: at the end only.",
    )
    group.add_argument("--report_to", type=tracker, default="tensorboard", help="Tracker of Accelerate, or 'none'.")
    group.add_argument("--logging_dir", default="logs")
    group.add_argument(
        "--peak_tflops",
        type=positive_number,
        help="Of one device, for the utilisation (mfu) in the trackers; known of common GPUs in half precision.",
    )
    add_publishing_arguments(group)
    return group


def add_validation_prompts_argument(group: argparse._ActionsContainer) -> None:
    """Add ``--validation_prompts`` of pipelines whose texts are of segments ([`~training.validation.passing`])."""
    group.add_argument(
        "--validation_prompts",
        nargs="*",
        default=[],
        metavar="[SEGMENT=]TEXT",
        help="Texts to draw from; of a segment with a name of its own by this name.",
    )


def tracker_config(args: argparse.Namespace) -> dict[str, int | float | str | bool]:
    """The arguments of a run as every tracker takes them: TensorBoard refuses lists, paths and None.

    Without the Hub's token and other secrets, which others would read in the tracker.
    """
    secrets = known_secrets(args.hub_token)
    kept = {name: value for name, value in vars(args).items() if name != "hub_token"}
    return {n: v if isinstance(v, int | float) else without_secrets(str(v), secrets) for n, v in kept.items()}
