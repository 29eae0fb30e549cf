"""Folders of pictures as tables."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .folder_files import FileKind, read_folder


def _extensions() -> set[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return {*ImageFolder.EXTENSIONS, ".avif"}


PICTURES = FileKind("picture", "image", _extensions)  # the column as datasets' own image folders call it


def read_image_folder(
    folder: str | Path,
    columns: Iterable[str] = (),
    *,
    output_dir: str | Path | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """The splits of a picture folder as datasets with an undecoded ``image`` column; arguments and errors as of
    [`~training.folder_files.read_folder`]."""
    from datasets import Image

    return read_folder(
        folder, PICTURES, Image(decode=False), columns, output_dir=output_dir, cache_dir=cache_dir, class_labels=True
    )
