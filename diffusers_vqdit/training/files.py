"""Files that are written whole or not at all, whenever a run is killed and however full the disk is.

Everything is written in a hidden scratch folder inside the folder it is for, which is the one place that is certainly
on the same file system, brought to the disk (fsync), and renamed.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..utils.checks import shown
from ..utils.hub import TOKENIZER_FILES
from ..utils.weight_files import check_finite, fsync, move_into_place, unfinished_path, weight_file_of


try:
    import resource  # not on Windows
except ImportError:
    resource = None  # type: ignore[assignment]

SCRATCH_PREFIX = ".tmp-diffusers-vqdit-"
CHECKPOINT_PREFIX = "checkpoint-"


# What a disk is called that takes no more, and what it is that is used up.
_FULL = {
    errno.ENOSPC: ("no space left on device", ""),
    errno.EDQUOT: ("no space left on device", " (the quota is used up)"),
    errno.EFBIG: ("file too large", " (the limit of the size of files, ulimit -f, is reached)"),
}


class DiskFullError(OSError):
    """No space, quota or size of files is left; says what was being written, and which checkpoint is whole."""


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
        number = full_disk_number(error) or _ask_disk(folder)
        if number is None:
            raise
        raise full_disk_error(number, what, folder) from error


def full_disk_error(number: int, what: str, folder: Path, kept: str | None = None) -> DiskFullError:
    found = checkpoints(folder)
    kept = kept or (f"{found[-1].name} is whole" if found else "there is no checkpoint yet")
    full, why = _FULL[number]
    return DiskFullError(number, f"{full} while writing {what} in {folder}{why}; {kept}")


def full_disk_number(error: BaseException | None) -> int | None:
    """The number of the error that there is no more space, quota or size of files, where that led to an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.errno
        for number in _FULL:
            if os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def _ask_disk(folder: Path) -> int | None:
    try:
        with scratch_folder(folder) as scratch:
            (scratch / "probe").write_bytes(os.urandom(1 << 20))
            fsync(scratch / "probe")
    except OSError as error:
        return full_disk_number(error)
    # A limit of the size of files stops at just that size.
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource is not None else -1
    written = (path for scratch in folder.glob(f"{SCRATCH_PREFIX}*") for path in scratch.rglob("*") if path.is_file())
    return errno.EFBIG if limit > 0 and any(path.stat().st_size >= limit for path in written) else None


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
    """Raise a ValueError where something stands in the place of what the run will write, or may not be written to.

    Args:
        folders: paths in `output_dir`, or of other folders. Of the files that are to be written in them, those of
            models, tokenizers, codes and samples are looked at, too.
    """
    named = f"output_dir={shown(str(output_dir))}"
    for name in folders:
        path = output_dir / name
        # A link to nothing is in the way, too.
        place = next(place for place in (path, *path.parents) if os.path.lexists(place))
        if not place.is_dir():
            place = place.relative_to(output_dir) if place.is_relative_to(output_dir) else place
            raise ValueError(f"{named} has a file {str(place)!r} where a folder is to be written")
        _check_writable(named, place, str(name))
        if place == path:
            files = [*files, *(f"{name}/{one.name}" for one in path.iterdir() if _is_written(one.name))]
    files = [*files, *(path.name for path in output_dir.iterdir() if _is_written(path.name))]
    for path in output_dir.glob(f"{CHECKPOINT_PREFIX}*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and not path.is_dir():
            raise ValueError(f"{named} has a file {path.name!r} where a checkpoint may be written")
    for name in files:
        path = output_dir / name
        if path.is_dir():
            raise ValueError(f"{named} has a folder {name!r} where a file is to be written")
        if os.path.lexists(path):
            if not path.is_file():
                raise ValueError(f"{named} has {name!r}, which is no regular file, where a file is to be written")
            _check_writable(named, path, name)


def _check_writable(named: str, path: Path, name: str) -> None:
    if not os.access(path, os.W_OK):
        raise ValueError(f"{named} has {name!r}, which can't be written: {os.strerror(errno.EACCES)}")


def _is_written(name: str) -> bool:
    """Whether a file of a model, a tokenizer, codes or samples is called so."""
    return (
        name in TOKENIZER_FILES
        or name in ("config.json", "scheduler_config.json", "generation_config.json", "segments.json")
        or weight_file_of(name) is not None
        or re.fullmatch(r"(step-)?\d+(-\d+)?\.(png|wav|txt)|codes-\d+\.parquet", name) is not None
    )


def check_output_file(argument: str, path: Path, suffix: str = "") -> None:
    """Make the folder of a file that the end of a program writes, and try to write there, before anything else.

    Args:
        argument: the name of the argument that gave the path.
        suffix: what the path must end in, such as ``".png"``.

    Raises:
        ValueError: if the file has another suffix, is a folder or not a regular file, or can't be written.
    """
    named = f"{argument}={shown(str(path))}"
    if path.suffix.lower() != suffix and suffix:
        raise ValueError(f"{named} must end in {suffix}")
    try:
        if os.path.lexists(path) and not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{named} is no regular file; give one, or the path of a new one")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_path(path)
        try:
            unfinished.write_bytes(bytes(1 << 12))
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{named} can't be written: {error.strerror or error} ({error.filename or path})") from error
