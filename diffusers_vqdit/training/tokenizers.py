"""Tokenizers by name: a folder or Hub repository of their own, or a part of a pipeline's."""

from transformers import PreTrainedTokenizerFast

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..pipelines.image_segment import ImageSegment
from ..pipelines.text_segment import TextSegment


def load_image_vq(name: str, *, cache_dir: str | None = None, **options) -> ImageVQModel:
    """The image tokenizer in a folder or Hub repository ([`~pipelines.image_segment.ImageSegment.load_tokenizer`])."""
    return ImageSegment.load_tokenizer(name, cache_dir=cache_dir, **options)[0]


def load_text_vq(name: str, *, cache_dir: str | None = None, **options) -> tuple[TextVQModel, PreTrainedTokenizerFast]:
    """The text tokenizer in a folder or Hub repository, and its `tokenizer`
    ([`~pipelines.text_segment.TextSegment.load_tokenizer`])."""
    return TextSegment.load_tokenizer(name, cache_dir=cache_dir, **options)
