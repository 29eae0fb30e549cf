"""How a script tells what went wrong."""

import dis
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.utils import logging


PACKAGE = Path(__file__).resolve().parents[1]
# Libraries whose OSErrors say which file, repository or program isn't there.
LOADERS = ("diffusers", "transformers", "huggingface_hub", "datasets", "subprocess")
# Modules whose other errors do: of what is no pipeline, Hub id or model of transformers.
CHECKS = ("diffusers.pipelines.pipeline_utils", "huggingface_hub.utils._validators", "transformers.models.auto.")


@contextmanager
def told_errors() -> Iterator[None]:
    """Tell what this package, or a script beside the one that runs, refuses by the error's sentence alone, as argparse
    tells those of flags, and exit with code 1: the sentence says all, and a launcher adds a traceback of its own. So
    are libraries' errors of models, files and programs that aren't there. Others, and with
    ``DIFFUSERS_VERBOSITY=debug`` all, keep their traceback."""
    try:
        yield
    except (ValueError, ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        if logging.get_verbosity() <= logging.DEBUG or not _is_told(error):
            raise
        script = Path(sys.argv[0])
        name = script.parent.name if script.stem == "__main__" else script.name
        print(f"{name}: error: {error}\n(DIFFUSERS_VERBOSITY=debug shows where it was raised.)", file=sys.stderr)
        sys.exit(1)  # which trackers take notice of


def _is_told(error: Exception) -> bool:
    """Whether a ``raise`` of ours made it, or a library's that looked for a model, or a program that has said itself
    why it failed. Python's own functions raise in the frame that calls them."""
    if isinstance(error, subprocess.CalledProcessError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_code[trace.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    module = trace.tb_frame.f_globals.get("__name__", "")
    if module.startswith(CHECKS) or (isinstance(error, OSError) and module.partition(".")[0] in LOADERS):
        return True
    raised = Path(trace.tb_frame.f_code.co_filename).resolve()
    return raised.is_file() and (raised.is_relative_to(PACKAGE) or raised.parent == Path(sys.argv[0]).resolve().parent)
