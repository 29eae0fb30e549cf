"""Large files whose SHA-256 was compared once: known again by size and time of change, and not read at each start."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from ..utils.fingerprints import file_sha256
from ..utils.weight_files import replacing_file


VERIFIED_FILE = ".verified.json"
SETTLED = 2_000_000_000  # nanoseconds, the coarsest time stamps of file systems: a later change has another one


def changed_files(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """The names of a folder's files whose SHA-256 is not the one given.

    What was found whole is kept in `VERIFIED_FILE` beside the files, with its size and its time of change, where the
    folder can be written. A file that is as it was then is not read again.

    Args:
        digests: SHA-256 by name.
    """
    known = _read(folder / VERIFIED_FILE)
    found, changed = dict(known), []
    for name, digest in digests.items():
        before = (folder / name).stat()
        state = [before.st_size, before.st_mtime_ns, digest]
        if known.get(name) != state and file_sha256(folder / name) != digest:
            changed.append(name)
        elif time.time_ns() - before.st_mtime_ns > SETTLED:
            found[name] = state
    if found != known:
        try:
            with replacing_file(folder / VERIFIED_FILE) as unfinished:
                unfinished.write_text(json.dumps(found), encoding="utf-8")
        except OSError:  # then they are read again the next time
            pass
    return changed


def _read(path: Path) -> dict[str, list]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
