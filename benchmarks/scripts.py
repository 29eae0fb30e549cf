"""How a benchmark runs the scripts of ``training/``."""

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent


def run_script(name: str, flags: dict[str, Any], more: Sequence[str] = (), launched: bool = False) -> float:
    """Run a script, and return the minutes of CPU time that it and its processes took.

    Args:
        name: of the script, without its ending.
        flags: name -> value; one that is True is said without a value.
        more: further words of the command line.
        launched: by ``accelerate launch``, as the README does.
    """
    command = [sys.executable, *(["-m", "accelerate.commands.launch"] if launched else [])]
    command.append(str(ROOT / "training" / f"{name}.py"))
    for flag, value in flags.items():
        command += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *more], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
