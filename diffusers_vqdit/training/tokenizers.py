"""Tokenizers by name: a folder or Hub repository of their own, or a part of a pipeline's."""

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..pipelines.image_segment import ImageSegment
from ..pipelines.text_segment import TextSegment
from ..utils.token_ids import load_tokenizer_of_ids


def load_image_vq(name: str, *, cache_dir: str | None = None, **options) -> ImageVQModel:
    """The image tokenizer in a folder or Hub repository ([`~pipelines.image_segment.ImageSegment.load_tokenizer`])."""
    return ImageSegment.load_tokenizer(name, cache_dir=cache_dir, **options)[0]


def load_text_vq(name: str, *, cache_dir: str | None = None, **options) -> tuple[TextVQModel, PreTrainedTokenizerFast]:
    """The text tokenizer in a folder or Hub repository, and its `tokenizer`
    ([`~pipelines.text_segment.TextSegment.load_tokenizer`]).

    Raises:
        ValueError: if it has token ids alone.
    """
    model, tokenizer = TextSegment.load_tokenizer(name, cache_dir=cache_dir, **options)
    if tokenizer is None:
        raise ValueError(
            f"{name!r} has a tokenizer of token ids and no TextVQModel: give it as --text_tokenizer, for all texts"
        )
    return model, tokenizer


def load_text_tokenizer(name: str, *, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer of transformers whose ids are the codes of texts ([`~utils.token_ids.load_tokenizer_of_ids`])."""
    return load_tokenizer_of_ids(name, cache_dir, "text_tokenizer")
