"""Tokenizers by name: a folder or Hub repository of their own, or a part of a pipeline's."""

import logging

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..pipelines.image_segment import ImageSegment
from ..pipelines.text_segment import TextSegment
from ..utils.checks import shown
from ..utils.components import has_file
from ..utils.token_ids import add_end_token


logger = logging.getLogger(__name__)


def load_image_vq(name: str, *, cache_dir: str | None = None, **options) -> ImageVQModel:
    """The image tokenizer in a folder or Hub repository ([`~pipelines.image_segment.ImageSegment.load_tokenizer`])."""
    return ImageSegment.load_tokenizer(name, cache_dir=cache_dir, **options)[0]


def load_text_vq(name: str, *, cache_dir: str | None = None, **options) -> tuple[TextVQModel, PreTrainedTokenizerFast]:
    """The text tokenizer in a folder or Hub repository, and its `tokenizer`
    ([`~pipelines.text_segment.TextSegment.load_tokenizer`])."""
    return TextSegment.load_tokenizer(name, cache_dir=cache_dir, **options)


def load_text_tokenizer(name: str, *, cache_dir: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer of transformers whose ids are the codes of texts: a folder or Hub repository of its own, of a
    model's, or of a pipeline's. One without an end of texts gets it, with a warning.

    Raises:
        ValueError: if there is none.
    """
    folder = "tokenizer" if has_file(name, "tokenizer/tokenizer_config.json", cache_dir) else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=folder, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"text_tokenizer={shown(name)} has no tokenizer of transformers: {error}") from error
    if note := add_end_token(tokenizer):
        logger.warning(f"text_tokenizer={shown(name)}: {note}")
    return tokenizer
