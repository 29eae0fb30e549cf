"""The table of modalities, and what a pipeline's config says of its segments."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.utils import logging

from ..models.multi_tokenizer import MultiTokenizerModel
from ..models.segment_layers import has_codebooks
from ..utils.checks import check_choice, shown
from .audio_segment import AudioSegment
from .codes_segment import CodesSegment
from .image_segment import ImageSegment, LowResolutionSegment
from .label_segment import LabelSegment, names_by_code
from .segment_base import IMAGE, LABEL, LOWRES, PROCESSORS, TEXT, SegmentProcessor
from .states_segment import ImageStatesSegment, TextStatesSegment
from .text_segment import TextSegment
from .token_segment import TokenSegment


_segments_logger = logging.get_logger(__name__)

# A new modality is a file with its classes, and a line here.
MODALITIES: dict[str, type[SegmentProcessor]] = {
    "image": ImageSegment,
    "text": TextSegment,
    "label": LabelSegment,
    "states": TextStatesSegment,
    "image_states": ImageStatesSegment,
    "codes": CodesSegment,
    "audio": AudioSegment,
}


def modality_of(kind: type[SegmentProcessor]) -> str:
    """The key of a class in the table."""
    return next(name for name, one in MODALITIES.items() if one is kind)


def kind_of(modality: str, tokenizer: str | None) -> type[SegmentProcessor]:
    """The class of a modality's segments whose codes are made by the component of this name."""
    kind = MODALITIES[modality]
    return TokenSegment if kind is TextSegment and tokenizer == TokenSegment.tokenizer else kind


def entry_by_name(name: str, segments: Mapping[str, Any], labels: list[str], lowres_factor: int) -> dict[str, Any]:
    """What a segment is in a checkpoint that doesn't say it: known by its name and by its grid of positions."""
    if "channels" in segments[name]:
        return {"modality": modality_of(TextStatesSegment)}
    if name == LABEL:
        return {"modality": modality_of(LabelSegment), "names": labels}
    ndim = len(segments[name]["shape"]) - has_codebooks(segments, name)
    if ndim > ImageSegment.ndims[0]:
        return {"modality": modality_of(CodesSegment)}
    if ndim == ImageSegment.ndims[0]:
        lowres = {"lowres_of": IMAGE, "factor": lowres_factor} if name == LOWRES else {}
        return {"modality": modality_of(ImageSegment), **lowres}
    made_by = {"tokenizer": TokenSegment.tokenizer} if "block_length" in segments[name] else {}
    return {"modality": modality_of(TextSegment), **made_by}


def output_by_name(passed: Mapping[str, Any], blanks: list[str], repainted: bool) -> str:
    """What is generated from what was passed where the tasks don't tell: a text for a picture or a text with blanks,
    else a picture."""
    return TEXT if not repainted and (IMAGE in passed or TEXT in blanks) else IMAGE


def check_code_segments(segments: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A transformer's segments, of which there must be some."""
    if not segments:
        raise ValueError("transformer has no segments; VQDiTLatentPipeline is for those with segments=None")
    return segments


def check_segment_entries(
    entries: Any, segments: Mapping[str, Any], components: Sequence[str] | None = None
) -> dict[str, dict]:
    """The entries of a pipeline's config, as they are saved: a copy.

    Args:
        entries: by segment: ``"modality"``, a key of `MODALITIES`; ``"tokenizer"``, the name of the component that
            makes its codes, by default the modality's; and the modality's options.
        segments: the transformer's.
        components: names of those that a tokenizer can be, None where they are not known yet.

    Raises:
        ValueError: for what doesn't fit, by name.
    """
    if not isinstance(entries, Mapping):
        raise ValueError(f"segments={shown(entries)} must be a dict of dicts by segment, or None")
    checked = {}
    for name, entry in entries.items():
        where = f"segments[{name!r}]"
        if name not in segments:
            raise ValueError(f"segments has {shown(name)}, but the transformer has {sorted(segments)}")
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}={shown(entry)} must be a dict with 'modality'")
        modality = check_choice(f"{where}['modality']", entry.get("modality"), list(MODALITIES))
        kind = MODALITIES[modality]
        for option in entry:
            tokenized = () if kind.tokenizer is None else ("tokenizer",)
            check_choice(f"{where}: the option", option, ("modality", *tokenized, *kind.options))
        entry = dict(entry)
        if kind.tokenizer is not None:
            blocks = kind is TextSegment and "block_length" in segments[name]
            tokenizer = entry.setdefault("tokenizer", TokenSegment.tokenizer if blocks else kind.tokenizer)
            if components is not None:
                check_choice(f"{where}['tokenizer']", tokenizer, components)
            elif not isinstance(tokenizer, str) or not tokenizer.isidentifier():
                raise ValueError(f"{where}['tokenizer']={shown(tokenizer)} must be a tokenizer's name")
        checked[name] = kind_of(modality, entry.get("tokenizer")).check_entry(where, entry, name, segments)
    return checked


def check_segment_tokenizers(several: Any, components: Sequence[str]) -> list[str]:
    """The names of a container's tokenizers, none of which may be one of the pipeline's `components`.

    Raises:
        ValueError: for a clash, or what is no container.
    """
    if several is None:
        return []
    if MultiTokenizerModel.__name__ not in {kind.__name__ for kind in type(several).__mro__}:  # or a repository's own
        raise ValueError(f"segment_tokenizers is {type(several).__name__}; put it into a MultiTokenizerModel, by name")
    if clash := sorted({*components, *PROCESSORS} & set(several.tokenizers)):
        raise ValueError(f"segment_tokenizers has {clash}, which components of the pipeline are called")
    return list(several.tokenizers)


def warn_of_tokenizers(components: Sequence[str], tokenizers: Sequence[str], entries: Mapping[str, dict]) -> None:
    """Tokenizers of a container that no segment has would be missed where its codes are decoded by another one, and
    those of a container that is left out where values are encoded."""
    used = {entry["tokenizer"] for entry in entries.values() if "tokenizer" in entry}
    if missing := sorted(used - {*components, *tokenizers}):
        _segments_logger.warning(
            f"segments name the tokenizers {missing}, which are not there: their segments are codes only "
            '(output_type="latent") until segment_tokenizers has them'
        )
    if unused := sorted(set(tokenizers) - used):
        _segments_logger.warning(
            f"segment_tokenizers has {unused}, which no entry of segments names, so that they are not used. To make a "
            "pipeline of another's components, pass segments=pipe.config.segments too"
        )


def check_label_names(
    id2label: Any, labels: Any, entries: Mapping[str, dict], segments: Mapping[str, Any]
) -> list[str]:
    """The names of the segment ``label``, which may stand in its entry or in an argument of their own, of two names,
    with a warning where they stand in none.

    Raises:
        ValueError: if these differ, or are more than the transformer's codes.
    """
    said = {"id2label": id2label, "labels": labels, "segments": entries.get(LABEL, {}).get("names")}
    found = {argument: names_by_code(names) for argument, names in said.items() if names}
    argument, labels = next(iter(found.items()), ("labels", []))
    for other, names in found.items():
        if names != labels:
            raise ValueError(f"{argument}={shown(labels)} are not those of {other}, {shown(names)}")
    if not labels and LABEL in segments and LABEL not in entries:
        _segments_logger.warning(
            "the transformer generates labels, but their names were not passed, so that labels are numbers. To make a "
            "pipeline of another's components, pass id2label=pipe.config.id2label too"
        )
    size = segments[LABEL]["vocab_size"] if LABEL in segments else len(labels)
    if len(labels) > size:
        raise ValueError(f"{argument}={shown(labels)} are {len(labels)}, but the transformer has codes for {size}")
    return labels


def make_segment(name: str, entry: Mapping[str, Any], **options: Any) -> SegmentProcessor:
    """The processor of a segment by its entry; `options` are those that [`SegmentProcessor`] has besides."""
    kind = kind_of(entry["modality"], entry.get("tokenizer"))
    kind = LowResolutionSegment if "lowres_of" in entry else kind
    return kind(name, entry, **options)
