"""How a script tells what went wrong."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.utils import logging


PACKAGE = Path(__file__).resolve().parents[1]


@contextmanager
def told_errors() -> Iterator[None]:
    """Tell a ValueError that this package, or a script beside the one that runs, raises by its sentence alone, as
    argparse tells those of flags, and exit with code 1: the sentence says all, and a launcher adds a traceback of its
    own. Others, and with ``DIFFUSERS_VERBOSITY=debug`` these too, keep their traceback."""
    try:
        yield
    except ValueError as error:
        if logging.get_verbosity() <= logging.DEBUG or not _is_own(error):
            raise
        print(
            f"{Path(sys.argv[0]).name}: error: {error}\n(DIFFUSERS_VERBOSITY=debug shows where it was raised.)",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _is_own(error: ValueError) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    raised = Path(trace.tb_frame.f_code.co_filename).resolve()
    return raised.is_relative_to(PACKAGE) or raised.is_relative_to(Path(sys.argv[0]).resolve().parent)
