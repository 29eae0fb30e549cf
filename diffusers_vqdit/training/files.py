"""Files that are written whole or not at all, whenever a run is killed and however full the disk is.

Everything is written in a hidden scratch folder inside the folder it is for, which is the one place that is certainly
on the same file system, brought to the disk (fsync), and renamed.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..utils.checks import shown
from ..utils.weight_files import check_finite, fsync, move_into_place


SCRATCH_PREFIX = ".tmp-diffusers-vqdit-"
CHECKPOINT_PREFIX = "checkpoint-"


class DiskFullError(OSError):
    """No space is left on the device; says what was being written, and which checkpoint is whole."""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders in `output_dir` that are called as checkpoints are, whole or not, by step."""
    found = [p for p in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


@contextmanager
def scratch_folder(parent: Path, name: str | None = None) -> Iterator[Path]:
    """A new hidden folder in `parent` until the end of the ``with`` block."""
    path = parent / f"{SCRATCH_PREFIX}{name or secrets.token_hex(4)}"
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder that must never be seen half removed."""
    with scratch_folder(path.parent) as scratch:
        path.rename(scratch / path.name)


@contextmanager
def full_disk_named(what: str, folder: Path) -> Iterator[None]:
    """Turn what the ``with`` block raises into a [`DiskFullError`] where the reason is that the disk is full.

    torch and safetensors say ``unexpected pos`` and the like then, so the disk is asked too.
    """
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if not says_full(error) and not _is_full(folder):
            raise
        raise full_disk_error(what, folder) from error


def full_disk_error(what: str, folder: Path) -> DiskFullError:
    found = checkpoints(folder)
    kept = f"{found[-1].name} is whole" if found else "there is no checkpoint yet"
    return DiskFullError(errno.ENOSPC, f"no space left on device while writing {what} in {folder}; {kept}")


def says_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, tells of a full disk or a quota that is used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_full(folder: Path) -> bool:
    try:
        with scratch_folder(folder) as scratch:
            (scratch / "probe").write_bytes(os.urandom(1 << 20))
            fsync(scratch / "probe")
    except OSError as error:
        return says_full(error)
    return False


def save_pretrained_atomically(model, folder: str | Path, **kwargs) -> list[str]:
    """`model.save_pretrained(folder, **kwargs)`, file by file in place of what was there, once all are whole.

    Args:
        model: a model, a pipeline or a tokenizer.
        folder: made if it isn't there.

    Returns:
        the paths that were written, relative to `folder`. Weights in `folder` that the new ones replace (shards,
        their index, another file format) are removed, for they might be loaded in their place.

    Raises:
        ValueError: if a weight is not finite; nothing is touched then.
        OSError: if the disk is full.
    """
    parts = model.components if hasattr(model, "components") else {type(model).__name__: model}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            check_finite(part.state_dict(), f"{name} is not saved")
    folder = Path(folder)
    with scratch_folder(folder) as scratch, full_disk_named(type(model).__name__, folder):
        model.save_pretrained(scratch, **kwargs)
        return move_into_place(scratch, folder)


def check_kind(output_dir: Path, folders: Sequence[str], files: Sequence[str]) -> None:
    """Raise a ValueError where a file stands in the place of a folder that the run will write, or the reverse."""
    for name in folders:
        if (output_dir / name).exists() and not (output_dir / name).is_dir():
            raise ValueError(
                f"output_dir={shown(str(output_dir))} has a file {name!r} where a folder is to be written"
            )
    for path in output_dir.glob(f"{CHECKPOINT_PREFIX}*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and not path.is_dir():
            raise ValueError(
                f"output_dir={shown(str(output_dir))} has a file {path.name!r} where a checkpoint may be written"
            )
    for name in files:
        if (output_dir / name).is_dir():
            raise ValueError(
                f"output_dir={shown(str(output_dir))} has a folder {name!r} where a file is to be written"
            )
