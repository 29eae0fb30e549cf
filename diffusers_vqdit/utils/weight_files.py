"""Folders of weights: a save that replaces what was there, and checks of what is written and read."""

import errno
import os
import re
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError


# As diffusers, transformers and peft name them: `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`,
# `model-00001-of-00002.fp16.safetensors`, `model.safetensors.index.fp16.json`.
_WEIGHT_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_lora_weights|pytorch_model|model)(\.(?P<before>[^.]+?))?(-\d{5}-of-\d{5})?"
    r"(\.(?P<after>[^.]+))?\.(safetensors|bin|flashpack)(?P<index>\.index(\.(?P<of_index>[^.]+))?\.json)?"
)


def weight_file_of(name: str) -> tuple[str, str] | None:
    """The stem and the variant (``""`` for none) of a weight file, a shard or a shards' index; None for other files.

    transformers calls the same weights ``model`` in safetensors and ``pytorch_model`` in pickles: one stem here.
    """
    match = _WEIGHT_FILE.fullmatch(name)
    if match is None:
        return None
    stem = "model" if match["stem"] == "pytorch_model" else match["stem"]
    return stem, match["before"] or match["after"] or match["of_index"] or ""


def remove_replaced_weights(folder: Path, written: Iterable[Path]) -> list[Path]:
    """Remove the weight files that a save has replaced: others of the same stem and variant beside what was written.

    Left alone, an older file of another form, such as shards beside a whole file or ``.bin`` beside safetensors, would
    be loaded in place of the new one. Other variants and all other files stay.

    Args:
        folder: what was saved to; `written` lies in it or in its subfolders.
        written: the files of the new save, weights and others; their paths in `folder`, or absolute ones.

    Returns:
        what was removed.
    """
    written = {Path(folder, path).absolute() for path in written}
    kinds = {(path.parent, kind) for path in written if (kind := weight_file_of(path.name))}
    removed = []
    for parent in {parent for parent, _ in kinds}:
        for path in sorted(parent.iterdir()):
            if path not in written and path.is_file() and (parent, weight_file_of(path.name)) in kinds:
                path.unlink()
                removed.append(path)
    return removed


def fsync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # opens no folder, and no file for reading only, to flush it
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't, for folders
            raise
    finally:
        os.close(descriptor)


def new_file_mode(folder: Path) -> int:
    """The permissions that a new file in a folder gets, by the umask."""
    probe = folder / f".mode-{os.getpid()}-{threading.get_ident()}"
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()


def finish_file(path: Path, mode: int) -> None:
    """Bring a file to the disk, with the permissions of any new file; safetensors gives others none."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(OSError):  # some file systems have none
            path.chmod(mode)
    fsync(path)


def _synced_files(folder: Path) -> list[Path]:
    """The paths in a folder of all files below it, which are brought to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    mode = new_file_mode(folder)
    for path in files:
        finish_file(path, mode)
    return [path.relative_to(folder) for path in files]


def move_into_place(scratch: Path, folder: Path) -> list[str]:
    """Move all files below `scratch` into `folder` once they are on the disk; weights there that they replace go.

    Returns:
        the paths that were written, relative to `folder`.
    """
    files = _synced_files(scratch)
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        (scratch / file).replace(target)
    remove_replaced_weights(folder, files)
    for parent in {file.parent for file in files}:
        fsync(folder / parent)
    return [file.as_posix() for file in files]


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes the place of `path` once it is whole and on the disk.

    Raises:
        OSError: if it can't be written; names the file, and says that what it held is still whole.
    """
    unfinished = unfinished_path(path)
    try:
        yield unfinished
        finish_file(unfinished, new_file_mode(path.parent))
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}); what it held before is still whole") from error
    finally:
        unfinished.unlink(missing_ok=True)


def unfinished_path(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_dangling(path: str | os.PathLike) -> bool:
    """Whether a path is a link whose target is not there, of which systems say that it exists."""
    return os.path.islink(path) and not os.path.exists(path)


@contextmanager
def replacing_weights(folder: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to save to, whose files are moved into `folder` at the end, with [`remove_replaced_weights`].

    Whatever fails before that, `folder` stays as it was.

    Raises:
        ValueError: if `folder` is a file, or a link to what is not there.
        OSError: if it can't be written; the message says that what it held is still whole.
    """
    folder = Path(folder).absolute()
    if is_dangling(folder):
        raise ValueError(f"save_directory={str(folder)!r} is a link to what is not there; make that first")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory={str(folder)!r} is a file; give a folder, which may be a new one")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        try:
            yield Path(unfinished)
            _synced_files(Path(unfinished))
        except (OSError, SafetensorError) as error:
            raise OSError(f"{folder} could not be written ({error}); what it held before is still whole") from error
        except RuntimeError as error:
            if not any(words in str(error) for words in ("unexpected pos", "PytorchStreamWriter")):
                raise
            raise OSError(  # torch.save says no more
                f"{folder} could not be written, its disk is full, or a quota or limit of file sizes is reached "
                f"({error}); what it held before is still whole"
            ) from error
        move_into_place(Path(unfinished), folder)


def check_finite(tensors: Mapping[str, torch.Tensor], owner: str) -> None:
    """Raise a ValueError that names the first of an owner's tensors with NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.device.type == "meta":
            raise ValueError(
                f"{owner}: {name!r} has no values, as its weights are offloaded; load or save them without offloading "
                "(pipe.remove_all_hooks(), no device_map to disk)"
            )
        tensor = tensor.detach()
        low, high = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()  # NaN, if there is one
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"{owner}: {name!r} holds NaN or infinity; its weights are of no use")


def check_weights(
    expected: Mapping[str, torch.Tensor], files: Iterable[tuple[str, Mapping[str, torch.Tensor]]], *, shapes: bool
) -> None:
    """Compare the weights of a checkpoint with what a model of its config has.

    Args:
        expected: the model's own tensors; of these, only names, shapes and dtypes are read.
        files: names and tensors of the checkpoint's files.
        shapes: whether shapes must agree.

    Raises:
        ValueError: that names the file and the tensor, if one is missing, has another shape or kind of number, or
            isn't finite.
    """
    missing, names = dict.fromkeys(expected), []
    for file, tensors in files:
        names.append(str(file))
        for name, tensor in tensors.items():
            own = expected.get(name)
            if own is None:
                continue
            missing.pop(name, None)
            if shapes and tensor.shape != own.shape:
                raise ValueError(
                    f"{file}: {name!r} has shape {tuple(tensor.shape)}, but by the config it must have "
                    f"{tuple(own.shape)}"
                )
            if _kind(tensor) != _kind(own):
                raise ValueError(f"{file}: {name!r} is {tensor.dtype}, but must be a {_kind(own)} tensor")
        check_finite({name: tensors[name] for name in tensors.keys() & expected.keys()}, str(file))
    if missing:
        some = ", ".join(map(repr, list(missing)[:4])) + (", ..." if len(missing) > 4 else "")
        raise ValueError(
            f"{', '.join(names)}: {len(missing)} of the {len(expected)} tensors that the config asks for are missing: "
            f"{some}; the weights are another model's or not whole, or the config isn't theirs"
        )


def check_converted(expected: Mapping[str, torch.Tensor], converted: Mapping[str, torch.Tensor], kind: str) -> None:
    """Raise a ValueError unless converted weights are a model's, name by name and shape by shape.

    Args:
        expected: the model's own tensors, of which names and shapes are read.
        converted: those of another code base, under our names.
        kind: what the message calls the model.
    """
    problems = [f"{name} is missing" for name in expected if name not in converted]
    problems += [f"{name} is not part of the architecture" for name in converted if name not in expected]
    problems += [
        f"{name} must have shape {tuple(own.shape)}, got {tuple(converted[name].shape)}"
        for name, own in expected.items()
        if name in converted and converted[name].shape != own.shape
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"the checkpoint is not a whole {kind} that the diffusers blocks can express (names after conversion): "
            f"{'; '.join(problems[:4])}{more}"
        )


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_floating_point():
        return "floating-point"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype == torch.bool else "integer"
