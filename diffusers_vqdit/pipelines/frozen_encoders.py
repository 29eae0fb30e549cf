"""Frozen encoders of transformers: loading them, and the states that they make of texts and of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from ..models.config_checks import MAX_CODES
from ..models.text_vq import TextVQModel
from ..utils.checks import check_integer, shown
from ..utils.components import find_beside, find_component, has_file
from ..utils.texts import tokenize_to_length


# One of which every tokenizer has
VOCABULARY_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
)
MAX_SEQUENCE_LENGTH = 512  # where neither the encoder nor its tokenizer says less


def load_text_encoder(name: str, cache_dir: str | None = None) -> tuple[Any, Any]:
    """The text encoder in a folder or Hub repository and its tokenizer: its own, a pipeline's (``text_encoder``, or
    another that is named, such as ``user/model/text_encoder_2``), or the text side of CLIP and the like.

    A decoder (GPT-2, Qwen, ...) is a text encoder too: its last hidden states. A tokenizer without a token for padding
    gets that of the end.

    Raises:
        ValueError: if there is no tokenizer.
    """
    source, folder = find_component(name, "text_encoder", cache_dir)
    options = {"subfolder": folder, "cache_dir": cache_dir}
    config = AutoConfig.from_pretrained(source, **options)
    config = getattr(config, "text_config", config)
    known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    encoder = (AutoModelForTextEncoding if known else AutoModel).from_pretrained(source, config=config, **options)
    number = (folder or Path(source).name).rpartition("text_encoder")[2]  # of the second of a pipeline "_2"
    beside = [f"tokenizer{number}"]
    if not number and find_beside(source, folder, "text_encoder_2", "config.json", cache_dir) is None:
        beside.insert(0, "tokenizer_2")  # of a VQDiTPipeline, whose `tokenizer` is its text_vq's
    place = _own_or_beside(source, folder, beside, VOCABULARY_FILES, cache_dir)
    if place is None:  # where transformers makes some an empty one
        raise ValueError(f"text_encoder={name!r} has no tokenizer, neither in its folder nor beside it")
    tokenizer = AutoTokenizer.from_pretrained(place[0], subfolder=place[1], cache_dir=cache_dir)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return encoder.eval().requires_grad_(False), tokenizer


def load_image_encoder(name: str, cache_dir: str | None = None) -> tuple[Any, Any]:
    """The vision encoder in a folder or Hub repository and its feature extractor: its own, a pipeline's
    (``image_encoder`` there), or the vision side of CLIP and the like.

    Raises:
        ValueError: if there is no feature extractor.
    """
    source, folder = find_component(name, "image_encoder", cache_dir)
    options = {"subfolder": folder, "cache_dir": cache_dir}
    config = AutoConfig.from_pretrained(source, **options)
    config = getattr(config, "vision_config", config)
    encoder = AutoModel.from_pretrained(source, config=config, **options)
    file = "preprocessor_config.json"
    place = _own_or_beside(source, folder, ["feature_extractor"], [file], cache_dir)
    if place is None:
        raise ValueError(
            f"image_encoder={name!r} has no feature extractor ({file}), neither in its folder nor beside it"
        )
    processor = AutoImageProcessor.from_pretrained(place[0], subfolder=place[1], cache_dir=cache_dir)
    return encoder.eval().requires_grad_(False), processor


def _own_or_beside(
    source: str, folder: str, beside: Sequence[str], files: Sequence[str], cache_dir: str | None
) -> tuple[str, str] | None:
    """Where one of some files is: in a model's own folder, or in one of those beside it."""
    if any(has_file(source, f"{folder}/{file}" if folder else file, cache_dir) for file in files):
        return source, folder
    places = (find_beside(source, folder, name, file, cache_dir) for name in beside for file in files)
    return next((place for place in places if place is not None), None)


def state_channels(encoder: PreTrainedModel) -> int:
    """Channels of an encoder's states."""
    config = encoder.config
    return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]


def check_sequence_length(length: Any, encoder: Any, tokenizer: Any) -> int:
    """`length` as ``max_sequence_length`` of a text encoder; None is the most tokens that it takes, or
    `MAX_SEQUENCE_LENGTH` where that is more or nothing says it.

    Raises:
        ValueError: if it is no positive integer, or more than the encoder has positions for.
    """
    positions = getattr(encoder.config, "max_position_embeddings", None)  # None: relative ones
    limit = min(tokenizer.model_max_length, positions or MAX_CODES)
    if length is None:
        return min(limit, MAX_SEQUENCE_LENGTH)
    return check_integer("max_sequence_length", length, 1, limit if positions else MAX_CODES)


@torch.no_grad()
def encode_texts_to_states(
    encoder: Any, tokenizer: Any, texts: list[str], length: int, device: torch.device
) -> tuple[torch.Tensor, torch.BoolTensor, list[int]]:
    """Last hidden states (B, S, C) of texts, in the encoder's dtype, S tokens of the longest; which of them count
    (B, S), the first of each row; and how many tokens each text has uncut.

    What is padding has no say: a text's states are those that it has alone.

    Raises:
        ValueError: if none of the texts has a token, as empty ones where the tokenizer adds none.
    """
    ids, mask, counts = tokenize_to_length(tokenizer, texts, length, "longest")
    if not ids.shape[1]:
        raise ValueError(f"the text {shown(texts[0])} has no tokens; this text encoder's tokenizer adds none to it")
    ids, mask = ids.to(device), mask.to(device)
    return encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool(), counts


def encode_captions(
    encoder: Any, tokenizer: Any, texts: list[str], length: int, device: torch.device
) -> tuple[torch.Tensor, torch.BoolTensor, list[int]]:
    """[`encode_texts_to_states`] by an encoder of transformers, or by a [`TextVQModel`], whose states are those of its
    codes."""
    if not isinstance(encoder, TextVQModel):
        return encode_texts_to_states(encoder, tokenizer, texts, length, device)
    ids, mask, counts = tokenize_to_length(tokenizer, texts, length)
    return *encoder.encode_states(ids.to(device), mask.to(device)), counts


def pixel_size(encoder: Any, feature_extractor: Any) -> tuple[int, int]:
    """Height and width of the pictures that a vision encoder sees."""
    for name in ("crop_size", "size"):
        size = dict(getattr(feature_extractor, name, None) or {})
        if {"height", "width"} <= set(size):
            return size["height"], size["width"]
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
    size = encoder.config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


@torch.no_grad()
def encode_images_to_states(
    encoder: Any, feature_extractor: Any, pixels: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Last hidden states (B, S, C), in the encoder's dtype, of pictures (B, 3, H, W) in [0, 1], of its size."""
    ready = {"do_resize": False, "do_center_crop": False, "do_rescale": False}
    inputs = feature_extractor(images=list(pixels.cpu()), return_tensors="pt", **ready).pixel_values
    states = encoder(pixel_values=inputs.to(device, encoder.dtype)).last_hidden_state
    return states if states.ndim == 3 else states.flatten(2).transpose(1, 2)  # of a convolutional one, (B, C, h, w)
