"""Types and ranges of the scripts' flags, and the parser that they share.

A value out of range is refused as argparse refuses one: with exit code 2 and a line that names the flag, the value and
what is accepted.
"""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import ImageFont

from .checks import check_integer, check_number, shown
from .redaction import known_secrets, without_secrets


# ---------------------------------------------------------------------------------------------------------------------
# Types of flags


def integer(low: int | None = None, high: int | None = None) -> Callable[[str], int]:
    """The type of a flag that takes an integer from `low` to `high`, both included; None is no bound."""
    return lambda text: _checked(check_integer, int, text, low, high)


def number(
    low: float | None = None, high: float | None = None, *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """The type of a flag that takes a finite number from `low` to `high`; `above` and `below` leave these out."""
    return lambda text: _checked(check_number, float, text, low, high, above=above, below=below)


def _checked(check: Callable, parse: Callable[[str], Any], text: str, *bounds: Any, **options: bool) -> Any:
    try:
        value = parse(text)
    except ValueError:
        value = text  # which the check refuses as it was given
    try:
        return check("value", value, *bounds, **options)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


positive_integer = integer(1)
non_negative_integer = integer(0)
positive_number = number(0, above=True)
non_negative_number = number(0)
share = number(0, 1)
decay = number(0, 1, below=True)
random_seed = integer(0, 2**32 - 1)  # what NumPy's generators take

# What Accelerate, FSDP and DeepSpeed put into the folder of a checkpoint.
_CHECKPOINT_FILES = (
    *("random_states_*.pkl", "optimizer.bin", "optimizer.pt", "scheduler.bin", "*_fsdp.bin", "*_fsdp_[0-9]*"),
    *("optimizer_*", "*.distcp", "mp_rank_*", "zero_to_fp32.py", "global_step*"),
)


def torch_device(text: str) -> str:
    """The type of a flag that takes a device of PyTorch that is there, such as ``cpu`` or ``cuda:1``."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device).cpu()
    except Exception as error:  # of any backend
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        known = ["cpu"] + [f"{accelerator}:{index}" for index in range(torch.accelerator.device_count())]
        reason = str(error).splitlines()[0]
        message = f"value={shown(text)} must be a device that is here, one of {known}: {reason}"
        raise argparse.ArgumentTypeError(message) from None
    return text


def font_file(text: str) -> str:
    """The type of a flag that takes a font file that Pillow can read."""
    try:
        ImageFont.truetype(text, 12)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"value={shown(text)} must be a font file, such as .ttf: {error}") from None
    return text


def output_path(text: str) -> Path:
    """The type of a flag that takes the path of what is written; an empty one would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path; give one, . for the working directory")
    return Path(text)


def model_name(text: str) -> str:
    """The type of a flag that takes a model: a Hub id or a folder, but not the folder of a training checkpoint."""
    folder = Path(text)
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{shown(text)} names no model: give a folder or a Hub id")
    if not os.path.isdir(text) or any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        return text
    if re.fullmatch(r"checkpoint-\d+", folder.resolve().name) or any(any(folder.glob(n)) for n in _CHECKPOINT_FILES):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is a training checkpoint, which a run resumes from, and not a model: give the run's "
            "output_dir, where the model is when the run has ended"
        )
    if any(folder.glob("pytorch_lora_weights*")):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is a LoRA, and not a model: give the pipeline that it was trained on"
        )
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Parsers


class _ArgumentParser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        # argparse of Python before 3.14 takes -1e-3 and -inf for flags, and says that a value is missing; any version
        # so takes a task that nothing is given to, as in --tasks "->image".
        self._negative_number_matcher = re.compile(r"-(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$|-(?:inf|nan)$|->")

    def format_help(self) -> str:
        """The help, with the default of each flag that has one and doesn't tell it."""
        for action in self._actions:
            nothing = any(action.default is one for one in (None, False, argparse.SUPPRESS)) or action.default == []
            if not nothing and "default" not in (action.help or "").lower():
                action.help = f"{action.help or ''} (default: %(default)s)".strip()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        super().error(without_secrets(message, known_secrets()))


def argument_parser(description: str, **kwargs: Any) -> argparse.ArgumentParser:
    """A script's parser. It takes no abbreviated flags, and its errors show no secret.

    An abbreviation would work today and mean another flag tomorrow, and one of ``--hub_token`` be overlooked where
    the command is shown.
    """
    return _ArgumentParser(description=description, **kwargs)


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace, unused: Mapping[str, str]) -> None:
    """End the program if a flag was set to another value than its default that has no say in what the program does.

    Args:
        unused: the flags that have none, by name, and why: ``"without --use_ema"``.
    """
    secrets = known_secrets(getattr(args, "hub_token", None))
    for name, why in unused.items():
        if (value := getattr(args, name)) != parser.get_default(name):
            parser.error(without_secrets(f"--{name}={shown(value)} has no effect {why}: leave it out", secrets))


def repository(text: str) -> str:
    """A repository's name on the Hub, such as ``user/model``."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(f"value={shown(text)} must be the name of a repository: {error}") from None
    return text


def hub_token(text: str) -> str:
    """A token of the Hub; it isn't shown."""
    if not text.strip() or not text.isascii():
        raise argparse.ArgumentTypeError("the token is empty, or has characters that no token has")
    return text
