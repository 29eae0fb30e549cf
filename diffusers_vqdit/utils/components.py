"""A component by name: a folder or Hub repository of its own, or a part of a pipeline's."""

import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .checks import shown


def find_component(name: str, component: str, cache_dir: str | None = None) -> tuple[str, str]:
    """Where a model is: the folder or repository, and the subfolder in it.

    Args:
        name: a folder, ``user/model``, or a subfolder such as ``user/model/image_vq``.
        component: its name, where that is a pipeline's.

    Raises:
        ValueError: if there is no such folder, and no repository can have the name.
    """
    name = str(name)
    if os.path.isdir(name) or name.count("/") < 1:
        source, folder = name, ""
    else:
        owner, repository, *rest = name.split("/")
        source, folder = f"{owner}/{repository}", "/".join(rest)
    if not os.path.isdir(name):
        try:
            validate_repo_id(source)
        except HFValidationError as error:
            raise ValueError(f"{shown(name)} is no folder that is there, and no repository's name: {error}") from error
        if os.path.isdir(source):
            raise ValueError(f"{shown(name)} is no folder that is there: {shown(source)} has no folder {folder!r}")
    below = _below(folder, component)
    # A model of its own has a config beside its weights; a pipeline has one below.
    own = has_file(source, _below(folder, "config.json"), cache_dir)
    return source, below if not own and has_file(source, f"{below}/config.json", cache_dir) else folder


def find_beside(
    source: str, folder: str, component: str, file: str, cache_dir: str | None = None
) -> tuple[str, str] | None:
    """Where that is what stands in a model's folder or, in a pipeline, beside it: as [`find_component`] gives it.

    Args:
        component: its name.
        file: one that it has.
    """
    local = Path(source)
    if not folder and local.is_dir() and not (local / component).is_dir():
        source, folder = str(local.resolve().parent), local.resolve().name  # a pipeline's folder
    for place in dict.fromkeys([_below(folder, component), _below(os.path.dirname(folder), component)]):
        if has_file(source, f"{place}/{file}", cache_dir):
            return source, place
    return None


def has_file(source: str, file: str, cache_dir: str | None) -> bool:
    """Whether a folder or Hub repository has a file."""
    if os.path.isdir(source):
        return (Path(source) / file).is_file()
    try:
        hf_hub_download(source, file, cache_dir=cache_dir)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return False  # what is wrong with the repository, from_pretrained tells
    return True


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
