"""How a training script starts: whether as many processes run as its launcher was asked for, and Accelerate."""

import logging
import os
import sys
from pathlib import PurePath

import psutil
import torch


logger = logging.getLogger(__name__)


def asked_processes(command: list[str]) -> int | None:
    """The number of processes that a command line of ``accelerate launch`` asks for, by flag or by config file.

    Args:
        command: the words of any program's command line.

    Returns:
        None if it isn't one of ``accelerate launch``, or leaves the number to it.
    """
    names = [PurePath(word).name.removesuffix(".exe") for word in command]
    for index, name in enumerate(names):
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            start = index + 1
        elif name in ("accelerate", "accelerate.commands.accelerate_cli") and "launch" in names[index + 1 : index + 2]:
            start = index + 2
        else:
            continue
        from accelerate.commands.config.config_args import default_config_file, load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        asked = launch_command_parser().parse_known_args(command[start:])[0]
        if asked.num_processes is not None:
            return asked.num_processes
        # As `accelerate launch` itself reads it.
        if asked.config_file is not None or (os.path.isfile(default_config_file) and not asked.cpu):
            return load_config_from_file(asked.config_file).num_processes
        return None
    return None


def check_launch() -> None:
    """See that as many processes train together as were asked for; called before Accelerate is set up.

    Where ``torchrun`` has started several on a machine without an accelerator, Accelerate is told to use the CPUs: it
    would take each of them for a run of its own. Where ``accelerate launch`` was asked for several and has started
    one, as it does on CPUs, a warning says so.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if not torch.accelerator.is_available():
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        return
    try:
        asked = asked_processes(psutil.Process().parent().cmdline())
    except (psutil.Error, AttributeError, OSError, SystemExit, ValueError):
        return  # no parent that can be asked, or not one of `accelerate launch` after all
    if asked is not None and asked > 1:
        logger.warning(
            f"accelerate launch was asked for {asked} processes, but one runs: it starts several for several GPUs "
            f"only. The global batch is {asked} times smaller than was meant. For {asked} processes on this machine: "
            f"torchrun --nproc_per_node {asked} {sys.argv[0]} ..."
        )
