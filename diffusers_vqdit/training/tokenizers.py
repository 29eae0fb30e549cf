"""Tokenizers by name: a folder or Hub repository of their own, or a part of a pipeline's."""

from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..pipelines.audio_codecs import load_audio_codec
from ..pipelines.image_segment import ImageSegment
from ..pipelines.text_segment import TextSegment
from ..utils.checks import shown
from ..utils.token_ids import load_tokenizer_of_ids
from .table_files import loading


def load_image_vq(
    name: str, *, argument: str = "image_vq", cache_dir: str | None = None, **options: Any
) -> ImageVQModel:
    """The image tokenizer in a folder or Hub repository ([`~pipelines.image_segment.ImageSegment.load_tokenizer`]).

    Raises:
        ValueError: naming the argument, if it can't be loaded.
    """
    with loading(f"{argument}={shown(name)} is no image tokenizer that can be loaded"):
        return ImageSegment.load_tokenizer(name, cache_dir=cache_dir, **options)[0]


def load_text_vq(
    name: str, *, argument: str = "text_vq", cache_dir: str | None = None, **options: Any
) -> tuple[TextVQModel, PreTrainedTokenizerFast]:
    """The text tokenizer in a folder or Hub repository, and its `tokenizer`
    ([`~pipelines.text_segment.TextSegment.load_tokenizer`]).

    Raises:
        ValueError: naming the argument, if it can't be loaded; or if it has token ids alone.
    """
    with loading(f"{argument}={shown(name)} is no text tokenizer that can be loaded"):
        model, tokenizer = TextSegment.load_tokenizer(name, cache_dir=cache_dir, **options)
    if tokenizer is None:
        raise ValueError(
            f"{name!r} has a tokenizer of token ids and no TextVQModel: give it as --text_tokenizer, for all texts"
        )
    return model, tokenizer


def load_codec(name: str, *, argument: str, cache_dir: str | None = None, frozen: bool = True) -> tuple[Any, Any]:
    """The audio codec in a folder or Hub repository, and its feature extractor
    ([`~pipelines.audio_codecs.load_audio_codec`]).

    Raises:
        ValueError: naming the argument, if it can't be loaded.
    """
    with loading(f"{argument}={shown(name)} is no audio codec that can be loaded"):
        return load_audio_codec(name, cache_dir, frozen=frozen)


def load_text_tokenizer(name: str, *, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer of transformers whose ids are the codes of texts ([`~utils.token_ids.load_tokenizer_of_ids`])."""
    return load_tokenizer_of_ids(name, cache_dir, "text_tokenizer")
