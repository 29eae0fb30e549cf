"""Tensors that are made of each picture of a dataset once, such as latents: in a file that says what they were made
from, where they are read by the row."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..utils.distributed import from_main_process, process_rank, wait_for_processes
from ..utils.fingerprints import file_sha256
from ..utils.weight_files import replacing_file
from .data import MAX_NAMED, try_rows
from .image_dataset import ImageDataset
from .parts import make_parts


logger = logging.getLogger(__name__)

DTYPES = {"F32": torch.float32, "F16": torch.float16}  # by their names in safetensors
BATCH_SIZE, PART_ROWS, CHUNK_ROWS = 64, 4096, 512


@dataclass(frozen=True)
class PictureTensors:
    """Tensors of pictures.

    Args:
        tensor: (N, *shape), in memory, or mapped into it from `path`, where what is asked for is read.
        rows: of the dataset, (N,), without those whose pictures can't be read.
        path: of the file, if there is one.
        name: of the tensor in it.
    """

    tensor: torch.Tensor
    rows: Any
    path: Path | None = None
    name: str = ""

    def chunks(self) -> Iterator[torch.Tensor]:
        """All of them, some rows at a time; what was read stays in no memory."""
        return iter(self.tensor.split(CHUNK_ROWS)) if self.path is None else read_chunks(self.path, self.name)


class _Readable(Dataset):
    """Of lists of rows the pictures (B, 3, H, W) uint8 that can be read, their rows, and what is wrong with others."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitem__(self, read: tuple[list[int], Any]) -> tuple[torch.Tensor | None, list[int], list[str]]:
        rows, files = read
        self.images.take_files(files)
        pictures, kept, problems = try_rows(self.images.decode, self.images.placed, rows)
        return torch.stack(pictures) if pictures else None, kept, problems


def encode_pictures(
    images: ImageDataset,
    encode: Callable[[torch.Tensor], torch.Tensor],
    path: Path,
    name: str,
    identity: Mapping[str, str],
    *,
    argument: str | None = None,
    num_workers: int = 0,
) -> PictureTensors:
    """What `encode` makes of pictures, read from a file if it is there and theirs, else written into it by all
    processes, which must call it. What was made before a run was killed is taken by the next.

    Args:
        encode: pictures (B, 3, H, W) uint8 to tensors (B, *shape) on the CPU.
        path: of the file.
        name: of the tensor in it.
        identity: what the tensors depend on.
        argument: what the user gave the path by; such a file isn't replaced by one of something else.
        num_workers: processes that decode.

    Raises:
        ValueError: if the user's own file is damaged or of something else, or no picture can be read.
    """
    problem = None
    if process_rank()[0] == 0 and path.is_file():
        try:
            check_tensor_file(path, name, identity, argument or "file")
        except ValueError as error:
            problem = str(error)
    problem = from_main_process(problem)
    if problem is not None and argument is not None:
        raise ValueError(problem)
    if problem is not None or not path.is_file():
        wait_for_processes()
        _encode_parts(images, encode, path, name, identity, num_workers)
    return PictureTensors(map_tensor(path, name), map_tensor(path, "rows").numpy(), path, name)


def _encode_parts(
    images: ImageDataset, encode: Callable, path: Path, name: str, identity: Mapping[str, str], num_workers: int
) -> None:
    folder = path.parent / f".unfinished-{path.name}"
    make = partial(_make_parts, images, encode, folder, name, num_workers)
    digest = hashlib.sha256(json.dumps([dict(identity), PART_ROWS]).encode()).hexdigest()
    parts = make_parts(folder, digest, -(-len(images) // PART_ROWS), make)
    if process_rank()[0] == 0:
        rows = [row for part in parts for row in part["rows"]]
        if not rows:
            raise ValueError(f"column {images.image_column!r}: none of the {len(images)} pictures could be read")
        if skipped := len(images) - len(rows):
            logger.warning(f"skipped {skipped} of {len(images)} pictures that could not be read")
        path.unlink(missing_ok=True)
        _join(path, name, [(folder / file, part) for part in parts for file in part["files"]], rows, identity)
        shutil.rmtree(folder)
    wait_for_processes()


def _make_parts(
    images: ImageDataset, encode: Callable, folder: Path, name: str, num_workers: int, parts: list[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    batches = {
        part: torch.arange(part * PART_ROWS, min((part + 1) * PART_ROWS, len(images))).split(BATCH_SIZE)
        for part in parts
    }
    loader = iter(
        DataLoader(
            _Readable(images),
            batch_size=None,
            sampler=images.with_files([rows.tolist() for own in batches.values() for rows in own]),
            num_workers=num_workers,
            collate_fn=_as_they_are,
            generator=torch.Generator(),  # else it draws from that of the models' weights
        )
    )
    told = 0
    total = sum(len(rows) for own in batches.values() for rows in own)
    progress = tqdm(total=total, desc=name.capitalize(), unit=" images", disable=process_rank()[0] > 0)
    for part, own in batches.items():
        rows: list[int] = []
        shape: list[int] = []
        file, dtype = folder / f"{part:05d}.bin", ""
        with replacing_file(file) as unfinished, open(unfinished, "wb") as sink:
            for batch in own:
                pictures, kept, problems = next(loader)
                progress.update(len(batch))
                for problem in problems[: max(0, MAX_NAMED - told)]:
                    logger.warning(f"skipped picture {problem}")
                told += len(problems)
                rows += kept
                if pictures is not None:
                    made = encode(pictures)
                    shape, dtype = list(made.shape[1:]), next(k for k, kind in DTYPES.items() if kind == made.dtype)
                    sink.write(made.contiguous().numpy())
        yield part, {"files": {file.name: file_sha256(file)}, "rows": rows, "shape": shape, "dtype": dtype}
    progress.close()


def _as_they_are(read: tuple) -> tuple:
    return read


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _join(
    path: Path,
    name: str,
    files: Sequence[tuple[Path, Mapping[str, Any]]],
    rows: list[int],
    identity: Mapping[str, str],
) -> None:
    """Write the file of safetensors that has the tensors of all files, one after the other, and their rows."""
    dtype, shape = next((part["dtype"], [len(rows), *part["shape"]]) for _, part in files if part["rows"])
    digest = hashlib.sha256(f"{DTYPES[dtype]} {tuple(shape)}".encode())
    for file, _ in files:
        _copy(file, digest.update)
    size = sum(file.stat().st_size for file, _ in files)
    numbers = np.array(rows, np.int64)
    header = {
        "__metadata__": {**identity, name: digest.hexdigest()},
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]},
        "rows": {"dtype": "I64", "shape": [len(rows)], "data_offsets": [size, size + numbers.nbytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing_file(path) as unfinished, open(unfinished, "wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for file, _ in files:
            _copy(file, sink.write)
        sink.write(numbers.tobytes())


def _copy(file: Path, take: Callable[[bytes], Any]) -> None:
    with open(file, "rb") as source:
        while block := source.read(1 << 20):
            take(block)


@contextmanager
def opened_tensors(path: Path, argument: str) -> Iterator[Any]:
    """A file of safetensors.

    Raises:
        ValueError: that names it by `argument`, if it is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError) as error:
        kind = argument.removesuffix("_file")
        raise ValueError(
            f"{argument}={str(path)!r} is damaged, or no file of {kind} ({error}); delete it or name another"
        ) from error


def check_tensor_file(path: Path, name: str, identity: Mapping[str, str], argument: str) -> None:
    """See that a file's tensor is whole, and of what it is to be of.

    Raises:
        ValueError: that says what is wrong, and names the file by `argument`.
    """
    named = f"{argument}={str(path)!r}"
    with opened_tensors(path, argument) as file:
        metadata = file.metadata() or {}
        known = file.get_slice(name).get_dtype() in DTYPES
    if name not in metadata:
        raise ValueError(
            f"{named} is from an older version, and doesn't say what it was made from; delete it or name another"
        )
    # Another resolution makes other pictures; the reason is named alone.
    differing = [key for key in identity if metadata.get(key) != identity[key]]
    if "resolution" in differing:
        differing = [key for key in differing if key != "pictures"]
    if differing:
        raise ValueError(f"{named} was made with other {' and '.join(differing)}; delete it or name another")
    if not known or metadata[name] != _digest(path, name):
        raise ValueError(f"{named} is damaged: its {name}' SHA-256 is not the one in it; delete it or name another")


def _place(path: Path, name: str) -> tuple[int, np.dtype, list[int]]:
    """Where a tensor begins in a file of safetensors, its type and its shape."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        one = json.loads(file.read(size))[name]
    kind = {"F32": np.float32, "F16": np.float16, "I64": np.int64}[one["dtype"]]
    return 8 + size + one["data_offsets"][0], np.dtype(kind), one["shape"]


def map_tensor(path: Path, name: str) -> torch.Tensor:
    """A tensor of a file of safetensors, mapped into memory: only what is asked for is read."""
    start, dtype, shape = _place(path, name)
    return torch.from_numpy(np.memmap(path, dtype, "c", start, tuple(shape)))


def read_chunks(path: Path, name: str) -> Iterator[torch.Tensor]:
    """A tensor of a file of safetensors, some rows at a time, without mapping it."""
    start, dtype, (count, *shape) = _place(path, name)
    size = int(np.prod(shape))
    for first in range(0, count, CHUNK_ROWS):
        rows = min(CHUNK_ROWS, count - first)
        chunk = np.fromfile(path, dtype, rows * size, offset=start + first * size * dtype.itemsize)
        yield torch.from_numpy(chunk.reshape(rows, *shape))


def _digest(path: Path, name: str) -> str:
    """The tensor's [`~utils.fingerprints.tensor_sha256`]."""
    _, dtype, shape = _place(path, name)
    kind = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}[dtype]
    digest = hashlib.sha256(f"{kind} {tuple(shape)}".encode())
    for chunk in read_chunks(path, name):
        digest.update(chunk.numpy())
    return digest.hexdigest()
