"""Tokenizers by name: a folder or Hub repository of their own, or a part of a pipeline's."""

import os
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError, HFValidationError
from transformers import PreTrainedTokenizerFast

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel


def load_image_vq(name: str, *, cache_dir: str | None = None, **options) -> ImageVQModel:
    """The image tokenizer in a folder or Hub repository: its own, a pipeline's, or a subfolder such as
    ``user/model/image_vq``."""
    source, folder = _find(name, "image_vq", cache_dir)
    return ImageVQModel.from_pretrained(source, subfolder=folder or None, cache_dir=cache_dir, **options)


def load_text_vq(name: str, *, cache_dir: str | None = None, **options) -> tuple[TextVQModel, PreTrainedTokenizerFast]:
    """The text tokenizer in a folder or Hub repository, named as in [`load_image_vq`], and its `tokenizer`, which
    stands in the model's folder or, in a pipeline, beside it.

    Raises:
        ValueError: if there is a model without a tokenizer.
    """
    source, folder = _find(name, "text_vq", cache_dir)
    model = TextVQModel.from_pretrained(source, subfolder=folder or None, cache_dir=cache_dir, **options)
    local = Path(source)
    if not folder and local.is_dir() and not (local / "tokenizer").is_dir():
        source, folder = str(local.resolve().parent), local.resolve().name  # a pipeline's folder
    for place in dict.fromkeys([_join(folder, "tokenizer"), _join(os.path.dirname(folder), "tokenizer")]):
        if _has(source, f"{place}/tokenizer_config.json", cache_dir):
            return model, PreTrainedTokenizerFast.from_pretrained(source, subfolder=place, cache_dir=cache_dir)
    raise ValueError(f"text_vq={name!r} has no tokenizer, neither in its folder nor beside it")


def _find(name: str, component: str, cache_dir: str | None) -> tuple[str, str]:
    """Folder or repository, and the subfolder in it."""
    name = str(name)
    if os.path.isdir(name) or name.count("/") < 1:
        source, folder = name, ""
    else:
        owner, repository, *rest = name.split("/")
        source, folder = f"{owner}/{repository}", "/".join(rest)
    below = _join(folder, component)
    # A model of its own has a config beside its weights; a pipeline has one below.
    if not _has(source, _join(folder, "config.json"), cache_dir) and _has(source, f"{below}/config.json", cache_dir):
        folder = below
    return source, folder


def _has(source: str, file: str, cache_dir: str | None) -> bool:
    if os.path.isdir(source):
        return (Path(source) / file).is_file()
    try:
        hf_hub_download(source, file, cache_dir=cache_dir)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return False  # what is wrong with the repository, from_pretrained tells
    return True


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
