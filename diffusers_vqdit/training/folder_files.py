"""Folders of files as tables: which files are read, and what is left out and why."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .file_lists import FileList, ending, path_key, sorted_paths, sorted_texts
from .folder_metadata import METADATA_FILES, FirstFew, described_files, first_of, read_metadata
from .folder_tables import ClassFolders, Sample, folder_tables


logger = logging.getLogger(__name__)

# What a folder that a script wrote has in it: a pipeline, a LoRA, codes.
_RUN_FILES = ("model_index.json", "pytorch_lora_weights.safetensors", "segments.json")
# Tables of samples, files among them; and what may be one, or stand beside files and say something else.
_TABLES = {".parquet", ".arrow", ".tar", ".lance"}
_TEXT_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".py", ".zip", ".h5"}
# Nobody takes these for pictures or sounds.
_NOTES = {".md", ".txt", ".ini", ".db"}
_FOLDER, _LINKED_FOLDER, _FILE, _OTHER = "dlf-"  # what an entry of a folder is


@dataclass(frozen=True)
class FileKind:
    """What a folder's files are.

    Args:
        noun: for messages.
        column: of the tables, that they become.
        extensions: the endings of their names, with the dot and in small letters.
    """

    noun: str
    column: str
    extensions: Callable[[], set[str]]


class _Walk(Iterable[str]):
    """The paths of the files of a kind below a folder, folder by folder, each of which is read once; what else is
    found there is known when it has ended."""

    def __init__(self, folder: Path, kind: FileKind, output: Path | None, cache_dir: str | os.PathLike | None) -> None:
        self.folder, self.output, self.cache_dir = folder, output, cache_dir
        self.extensions = kind.extensions()
        self.metadata: list[Path] = []
        self.own: list[Path] = []
        self.odd, self.others = FirstFew(), FirstFew()

    def __iter__(self) -> Iterator[str]:
        seen: set[tuple[int, int]] = set()
        folders, links = [self.folder], list[Path]()
        while folders or links:
            # Links last, so that a folder is read under its own name where it has one here.
            here = folders.pop() if folders else links.pop(0)
            identity = os.stat(here).st_dev, os.stat(here).st_ino
            if identity in seen:
                continue
            seen.add(identity)
            is_run = _is_run(here)
            if here != self.folder and (is_run or here.resolve() == self.output):
                self.own.append(here)
                continue
            try:
                entries = sorted_texts(_entries(here), self.cache_dir)
            except PermissionError:
                self.odd.add(here)
                continue
            for name, kind in (entry.split("\0") for entry in entries):
                if kind not in (_FOLDER, _LINKED_FOLDER):
                    if self._is_wanted(here, name, kind == _FILE, is_run):
                        yield os.path.join(here, name)
                # The samples of a run whose output folder is the data folder.
                elif (is_run or here.resolve() == self.output) and _is_written(here / name):
                    self.own.append(here / name)
                else:
                    (folders if kind == _FOLDER else links).append(here / name)

    def _is_wanted(self, here: Path, name: str, is_regular: bool, is_run: bool) -> bool:
        """Whether a file is one; others are noted."""
        suffix = ending(name)
        if suffix in self.extensions:
            if not is_regular:
                self.odd.add(here / name)
            return is_regular
        if name in METADATA_FILES and is_regular:
            self.metadata.append(here / name)
        elif suffix not in _NOTES and not is_run:
            self.others.add(here / name)
        return False


def _entries(folder: Path) -> Iterator[str]:
    """The names in a folder that are not hidden, each with what it is."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                kind = _LINKED_FOLDER if entry.is_symlink() else _FOLDER
            else:
                kind = _FILE if os.path.isfile(entry.path) else _OTHER
            yield f"{entry.name}\0{kind}"


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def list_files(
    folder: Path,
    kind: FileKind,
    output_dir: Path | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[FileList[str], list[Path]]:
    """The files of a kind below a folder, by their endings, and the metadata files, both sorted as paths are.

    Hidden files and folders are left out, and each folder is read once, however many links lead to it. Folders that a
    training run wrote, `output_dir` among them, and files of other endings are left out with a warning.
    """
    walk = _Walk(folder, kind, output_dir.resolve() if output_dir is not None else None, cache_dir)
    files = FileList(sorted_paths(walk, cache_dir), cache_dir)
    if walk.others.count:
        logger.warning(
            f"left out {walk.others.count} files in {str(folder)!r} that don't end as {kind.noun}s' names do: "
            f"{first_of(walk.others.items)}"
        )
    if walk.odd.count:
        logger.warning(
            f"left out {walk.odd.count} paths that are no regular files or folders to read: {first_of(walk.odd.items)}"
        )
    if walk.own:
        below = (name for path in walk.own for name in files_below(path))
        count = sum(ending(name) in walk.extensions for name in below)
        logger.warning(
            f"left out {len(walk.own)} folders in {str(folder)!r} that training runs wrote, with {count} "
            f"{kind.noun}s: {first_of(walk.own)}"
        )
    return files, sorted(walk.metadata)


def files_below(folder: Path, leave_out: Callable[[str], bool] | None = None) -> Iterator[str]:
    """The paths of what is below a folder and is no folder itself, one at a time; each folder is entered once, however
    many links lead to it, but those that are to be left out or can't be read."""
    folders, seen = [str(folder)], set[tuple[int, int]]()
    while folders:
        here = folders.pop()
        try:
            identity = os.stat(here).st_dev, os.stat(here).st_ino
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(here) as entries:
                for entry in entries:
                    if not _is_folder(entry):
                        yield entry.path
                    elif leave_out is None or not leave_out(entry.path):
                        folders.append(entry.path)
        except OSError:
            continue


def _is_hidden(path: str) -> bool:
    return os.path.basename(path).startswith(".")


def kind_of_folder(
    folder: Path, kinds: Sequence[FileKind], columns: Iterable[str] = (), output_dir: Path | None = None
) -> FileKind | None:
    """Of which kind the files of a folder are that [`read_folder`] can read: there are such, neither tables with some
    in them nor more tables of texts than files, but for their metadata and what scripts wrote. None of other folders.

    Of several kinds it is the one whose column alone is among `columns`; or that of the file which the metadata name
    first; or that of which there are the most, of as many the first.
    """
    output = None if output_dir is None else output_dir.resolve()
    endings = {kind: kind.extensions() for kind in kinds}
    counts, texts, metadata = dict.fromkeys(kinds, 0), 0, list[str]()

    def left_out(path: str) -> bool:
        return _is_hidden(path) or _is_run(Path(path)) or Path(path).resolve() == output

    for path in files_below(folder, left_out):
        place, name = os.path.split(path)
        if name in METADATA_FILES or name in _RUN_FILES:
            metadata += [path] if name in METADATA_FILES else []
            continue
        suffix = ending(name)
        if suffix in _TABLES and not _is_run(Path(place)):
            return None
        for kind, its in endings.items():
            counts[kind] += suffix in its
        texts += suffix in _TEXT_TABLES
    there = [kind for kind in kinds if counts[kind]]
    if not there or sum(counts.values()) < texts:
        return None
    asked = [kind for kind in there if kind.column in columns]
    if len(there) > 1 and len(asked) != 1 and metadata:
        own = min(metadata, key=lambda path: (path.count(os.sep), path))
        _, row = next(read_metadata(Path(own), FirstFew()), (0, {}))
        asked = [kind for kind in there if ending(str(row.get("file_name"))) in endings[kind]]
    return asked[0] if len(asked) == 1 else max(there, key=lambda kind: counts[kind])


def _is_run(folder: Path) -> bool:
    """Whether a training run of this package, or diffusers' `save_pretrained`, wrote the folder."""
    if any((folder / name).is_file() for name in _RUN_FILES):
        return True
    try:
        if "_class_name" in json.loads((folder / "config.json").read_bytes()):
            return True
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    try:
        with os.scandir(folder) as entries:
            checkpoints = [entry.path for entry in entries if re.fullmatch(r"checkpoint-\d+", entry.name)]
    except OSError:
        return False
    return any(any(Path(path).glob("*.safetensors")) for path in checkpoints)


def _is_written(folder: Path) -> bool:
    return folder.name in ("samples", "logs", "codes") or _is_run(folder) or folder.name.startswith("checkpoint-")


def read_folder(
    folder: str | Path,
    kind: FileKind,
    feature: Any,
    columns: Iterable[str] = (),
    *,
    output_dir: str | Path | None = None,
    cache_dir: str | os.PathLike | None = None,
    class_labels: bool = False,
) -> dict[str, Any]:
    """The splits of a folder as datasets with a column of its files.

    With ``metadata.jsonl``, ``.csv`` or ``.parquet``, in it or below, each row with a ``file_name`` is a sample, and
    its other fields are columns. Without, all files are, and where they lie in class folders of one depth these
    are the column ``label``. Folders called train, test or validation at the top are splits if all files lie in
    such folders; else there is one split, ``train``. Names of files mean nothing.

    Args:
        folder: the folder.
        kind: of files.
        feature: the column's, of `datasets`.
        columns: which columns must be usable.
        output_dir: the folder that the run will write, which is left out.
        cache_dir: where the tables are, in files that have no names; by default the cache of `datasets`.
        class_labels: whether labels are numbers with names (`datasets.ClassLabel`), and not texts.

    Raises:
        ValueError: if there is no file of the kind, no row with one, or one of `columns` mixes types.
    """
    folder = Path(os.path.abspath(folder))
    files, metadata = list_files(folder, kind, Path(output_dir) if output_dir is not None else None, cache_dir)
    if not files and not metadata:
        raise ValueError(f"there are no {kind.noun}s in {str(folder)!r}{_archives(folder)}")
    samples: Iterable[Sample]
    if metadata:
        samples, classes = _described(folder, files, metadata, kind, cache_dir), list[str]()
    else:
        samples = ClassFolders(folder, files)
        classes = samples.classes if class_labels else []
    options: dict[str, Any] = {"classes": classes, "columns": list(columns), "cache_dir": cache_dir}
    return folder_tables(folder, samples, kind.column, feature, **options)


def _described(
    folder: Path, files: FileList[str], metadata: list[Path], kind: FileKind, cache_dir: str | os.PathLike | None
) -> FileList[Sample]:
    """The files that metadata rows name, and the rows; tells what was left out."""
    for path in metadata:
        if beside := [other.name for other in metadata if other.parent == path.parent and other != path]:
            raise ValueError(f"{str(path.parent)!r} has both {path.name} and {beside[0]}; keep one of them")
    samples = FileList(described_files(folder, files, metadata, kind.column), cache_dir)
    if not samples:
        raise ValueError(f"none of the rows of {first_of(metadata)} names a {kind.noun}: there is nothing to read")
    named, unnamed = sorted_paths((path for path, _ in samples), cache_dir), FirstFew()
    name = next(named, None)
    for file in files:  # which are in the same order
        while name is not None and path_key(name) < path_key(file):
            name = next(named, None)
        if file != name:
            unnamed.add(file)
    if unnamed.count:
        logger.warning(
            f"left out {unnamed.count} of {len(files)} {kind.noun}s in {str(folder)!r} that no metadata row names: "
            f"{first_of([os.path.relpath(file, folder) for file in unnamed.items])}"
        )
    return samples


def _archives(folder: Path) -> str:
    endings = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
    archives = [os.path.basename(name) for name in files_below(folder) if name.lower().endswith(endings)]
    return f"; unpack {first_of(sorted(archives))}" if archives else ""
