"""Work in numbered parts that all processes share, each of which is done once however often they are killed."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..utils.distributed import from_main_process, process_rank, wait_for_processes
from ..utils.fingerprints import file_sha256
from ..utils.weight_files import replacing_file


logger = logging.getLogger(__name__)

IDENTITY_FILE = "identity.json"


def make_parts(
    folder: Path, identity: str, count: int, make: Callable[[list[int]], Iterator[tuple[int, dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """Make so many parts in a folder of their own, each process some of them; all processes must call it.

    Parts that an earlier run has finished are taken as they are, if it was one of the same identity.

    Args:
        folder: for the parts' files; what else is in it is removed.
        identity: what the parts are made of.
        make: gives each of the numbered parts with what is to be known of it, once its files are whole: JSON values,
            with ``"files"``, the SHA-256 of each file by name.

    Returns:
        what is known of all parts, in order.
    """
    rank, world_size = process_rank()
    done: set[int] = set()
    if rank == 0:
        _begin(folder, identity)
        done = {number for number in range(count) if _is_whole(folder, number)}
        if done:
            logger.info(f"{len(done)} of {count} parts in {str(folder)!r} are there already")
    done = from_main_process(done)
    for number, entry in make([number for number in range(rank, count, world_size) if number not in done]):
        with replacing_file(folder / _name(number)) as unfinished:
            unfinished.write_text(json.dumps(entry), encoding="utf-8")
    wait_for_processes()
    entries = [json.loads((folder / _name(number)).read_bytes()) for number in range(count)]
    wait_for_processes()  # until all have read: the caller may take the parts away
    return entries


def _name(number: int) -> str:
    return f"part-{number:05d}.json"


def _begin(folder: Path, identity: str) -> None:
    """Empty the folder of parts of another identity."""
    path = folder / IDENTITY_FILE
    if folder.exists() and not (path.is_file() and path.read_bytes() == identity.encode()):
        if done := len(list(folder.glob("part-*.json"))):
            logger.warning(f"{done} parts in {str(folder)!r} are of other data, models or options: they are removed")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as unfinished:
        unfinished.write_bytes(identity.encode())


def _is_whole(folder: Path, number: int) -> bool:
    """Whether a part is there, with all of its files."""
    try:
        entry = json.loads((folder / _name(number)).read_bytes())
        return all(file_sha256(folder / name) == digest for name, digest in entry["files"].items())
    except (OSError, ValueError, KeyError):
        return False
