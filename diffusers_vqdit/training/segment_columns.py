"""Which columns of a dataset become which segments: the scripts' flags, as one [`SegmentColumn`] a segment."""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..pipelines.audio_segment import MAX_AUDIO_LENGTH
from ..pipelines.codes_segment import CodesSegment
from ..pipelines.image_segment import ImageSegment
from ..pipelines.label_segment import LabelSegment
from ..pipelines.segment_base import ENCODERS, IMAGE, LABEL, LOWRES, PROCESSORS, TEXT, SegmentColumn
from ..pipelines.segment_processors import MODALITIES, kind_of, modality_of
from ..pipelines.states_segment import ImageStatesSegment, TextStatesSegment
from ..pipelines.text_segment import TextSegment
from ..tasks import SEGMENT_NAME
from ..utils.arguments import model_name, positive_integer, positive_number
from ..utils.buckets import check_buckets
from ..utils.checks import check_choice, check_module_name, shown
from ..utils.token_ids import makes_token_ids
from .code_files import SUFFIXES
from .table_files import loading


# Segments that have flags of their own, by which their codes are made.
OWN_FLAGS = {IMAGE: "--image_vq", LOWRES: "--image_vq", TEXT: "--text_vq", LABEL: "--label_column"}
RESERVED = tuple(OWN_FLAGS)


def missing_segments(tasks: str, missing: Iterable[str], there: Iterable[str]) -> str:
    """What is said of segments of ``--tasks`` that nothing makes, where there are others."""
    missing = sorted(missing)
    flag = OWN_FLAGS.get(missing[0], f"--segment {missing[0]}=MODALITY:COLUMN")
    return (
        f"tasks={tasks!r} need the segments {missing}; the data has {sorted(there)}. Say what the others are made "
        f"from: {flag}"
    )


class SegmentFlag(NamedTuple):
    """What ``--segment NAME=MODALITY:COLUMN[:TOKENIZER]`` says."""

    name: str
    modality: str
    column: str
    tokenizer: str | None = None
    grid: tuple[int, ...] | None = None  # of ready codes
    num_codes: int | None = None

    @property
    def flag(self) -> str:
        """The flag that says it."""
        return "--code_columns" if self.modality == modality_of(CodesSegment) else "--segment"

    @property
    def options(self) -> dict[str, Any]:
        """The reader's."""
        return {name: value for name, value in (("grid", self.grid), ("num_codes", self.num_codes)) if value}

    def __str__(self) -> str:
        grid, size = "x".join(map(str, self.grid or ())), str(self.num_codes or "")
        return f"{self.name}={':'.join(part for part in (*self[1:4], grid, size) if part)}"


def segment_flag(text: str) -> SegmentFlag:
    """The type of ``--segment``."""
    name, equals, rest = text.partition("=")
    modality, *parts = rest.split(":", 2)
    if not equals or not parts or not all(parts) or not SEGMENT_NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(
            f"value={shown(text)} must be NAME=MODALITY:COLUMN or NAME=MODALITY:COLUMN:TOKENIZER, with a name of "
            "letters, digits and underscores"
        )
    try:
        check_module_name(f"value={shown(text)}", name)
        check_choice(f"value={shown(text)}: the modality", modality, list(MODALITIES))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if MODALITIES[modality].tokenizer is None and len(parts) > 1:
        raise argparse.ArgumentTypeError(f"value={shown(text)} has a tokenizer, which a {modality} doesn't need")
    return SegmentFlag(name, modality, parts[0], model_name(parts[1]) if len(parts) > 1 else None)


def add_segment_argument(group: argparse._ActionsContainer) -> None:
    """Add ``--segment``, which may be given several times."""
    group.add_argument(
        "--segment",
        type=segment_flag,
        action="append",
        default=[],
        metavar="NAME=MODALITY:COLUMN[:TOKENIZER]",
        help=f"A segment of any name, and the column it is made from; the modality is one of {', '.join(MODALITIES)}. "
        "The tokenizer or encoder is a folder or a Hub id; without, that of --image_vq, --text_vq, --text_encoder or "
        "--image_encoder. Of a text it may be a tokenizer of transformers, whose ids are then the codes. May be given "
        "several times.",
    )
    group.add_argument(
        "--code_columns",
        type=code_column,
        action="extend",
        nargs="+",
        dest="segment",
        metavar="NAME[=COLUMN[:SHAPE[:SIZE]]]",
        help="Segments of ready codes, which need no tokenizer, and their columns: nested lists of integers, or flat "
        "ones with their SHAPE, such as 4x16x16. SIZE is how many codes there are; without, those in the data.",
    )
    group.add_argument(
        "--max_audio_length",
        type=positive_number,
        default=MAX_AUDIO_LENGTH,
        help="Of sounds: seconds at most. Longer ones are cut, and counted in a warning.",
    )
    group.add_argument(
        "--audio_codebooks",
        type=positive_integer,
        help="Of sounds: codes a frame, the first so many that the codec makes; by default all.",
    )


def audio_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of columns of sounds."""
    return {name: getattr(args, name) for name in ("max_audio_length", "audio_codebooks")}


def add_encoder_arguments(group: argparse._ActionsContainer) -> None:
    """Add the flags of frozen encoders, whose states are given."""
    group.add_argument(
        "--text_encoder",
        type=model_name,
        help="Frozen text encoder of transformers, for --segment NAME=states:COLUMN; without --text_vq for captions.",
    )
    group.add_argument(
        "--image_encoder",
        type=model_name,
        help="Frozen vision encoder of transformers, for --segment NAME=image_states:COLUMN.",
    )


def load_encoders(args: argparse.Namespace) -> dict[str, Any]:
    """The encoders of the flags, with what stands beside each, by component; None where there is none."""
    found: dict[str, Any] = dict.fromkeys(ENCODERS)
    for kind in (TextStatesSegment, ImageStatesSegment):
        if name := getattr(args, kind.tokenizer):
            found[kind.tokenizer], found[kind.named_beside] = kind.load_tokenizer(name, cache_dir=args.cache_dir)
    return found


def is_taken(args: argparse.Namespace, maker: str) -> bool:
    """Whether a segment of ``--segment`` is made by what a flag names, such as ``image_vq``."""
    component = TextSegment.tokenizer if maker == "text_tokenizer" else maker
    made = (None, getattr(args, maker))
    return any(MODALITIES[flag.modality].tokenizer == component and flag.tokenizer in made for flag in args.segment)


def has_captions(args: argparse.Namespace) -> bool:
    """Whether captions become codes, or states where ``--segment`` makes none."""
    states = modality_of(TextStatesSegment)
    return bool(
        args.text_vq
        or args.text_tokenizer
        or args.text_encoder
        and all(flag.modality != states for flag in args.segment)
    )


def code_column(text: str) -> SegmentFlag:
    """The type of ``--code_columns``."""
    match = re.fullmatch(r"(\w+)(?:=([^:]+))?(?::(\d+(?:x\d+){0,2}))?(?::(\d+))?", text)
    if match is None or not SEGMENT_NAME.fullmatch(match[1]):
        raise argparse.ArgumentTypeError(
            f"value={shown(text)} must be NAME, NAME=COLUMN, NAME=COLUMN:SHAPE or NAME=COLUMN:SHAPE:SIZE, such as "
            "video=codes:4x16x16:1024"
        )
    grid = tuple(int(size) for size in match[3].split("x")) if match[3] else None
    size = int(match[4]) if match[4] else None
    if 0 in (*(grid or ()), size):
        raise argparse.ArgumentTypeError(f"value={shown(text)} must have a shape and a size of positive integers")
    try:
        check_module_name(f"value={shown(text)}", match[1])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return SegmentFlag(match[1], modality_of(CodesSegment), match[2] or match[1], None, grid, size)


def picture_sizes(text: str) -> list[list[int]]:
    """The type of ``--sizes``: heights and widths in the format of ``--aspect_ratio_buckets``."""
    pairs = [part.split(",") for part in text.strip().removesuffix(";").split(";")]
    if not all(len(pair) == 2 and all(re.fullmatch(r" *\d+ *", size) for size in pair) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"value={shown(text)} must be pairs of height,width in pixels, such as '32,32;24,40;40,24'"
        )
    return [[int(size) for size in pair] for pair in pairs]


def bucket_sizes(text: str) -> list[list[int]]:
    """The type of ``--aspect_ratio_buckets``, in the format of diffusers' DreamBooth scripts."""
    try:
        return check_buckets(f"value={shown(text)}", picture_sizes(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_bucket_argument(group: argparse._ActionsContainer, default: str) -> None:
    """Add ``--aspect_ratio_buckets``.

    Args:
        default: what happens without it, for the help.
    """
    group.add_argument(
        "--aspect_ratio_buckets",
        type=bucket_sizes,
        metavar="HEIGHT,WIDTH;...",
        help="Sizes in pixels, such as '32,32;24,40;40,24': each picture is made to the one nearest in aspect ratio, "
        f"and a batch is of one of them. The first is drawn where no size is asked for. {default}",
    )


def add_text_tokenizer_argument(group: argparse._ActionsContainer) -> None:
    """Add ``--text_tokenizer``, for texts whose codes are token ids."""
    group.add_argument(
        "--text_tokenizer",
        type=model_name,
        help="A tokenizer of transformers whose ids are the codes of texts, of any length: a folder or a Hub id, in "
        "place of --text_vq.",
    )


def add_text_arguments(group: argparse._ActionsContainer) -> None:
    """Add the flags that say how texts become token ids, or an encoder's states."""
    group.add_argument(
        "--block_length",
        type=positive_integer,
        default=16,
        help="Of texts that are token ids: tokens that are generated together, each block given those before it.",
    )
    group.add_argument(
        "--max_text_length",
        type=positive_integer,
        default=512,
        help="Of such texts: tokens at most. Longer texts are cut, and counted in a warning.",
    )
    group.add_argument(
        "--max_sequence_length",
        type=positive_integer,
        help="Tokens of a text for its encoder; by default as many as it takes, 512 at most.",
    )


def columns_of(flags: Sequence[SegmentFlag]) -> tuple[list[str], list[str], list[str]]:
    """The columns of flags that hold pictures, those that hold sounds, and the others.

    Raises:
        ValueError: for a segment that two flags make.
    """
    names = [flag.name for flag in flags]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--segment: {twice[0]!r} is given twice; each names one segment")
    features = {flag.column: MODALITIES[flag.modality].reader.feature for flag in flags}
    pictures, sounds = ([name for name, kind in features.items() if kind == one] for one in ("Image", "Audio"))
    return pictures, sounds, [name for name in features if name not in (*pictures, *sounds)]


def load_tokenizers(
    flags: Iterable[SegmentFlag], known: Mapping[tuple[str, str], Any], *, cache_dir: str | None = None
) -> dict[str, tuple[Any, Any]]:
    """The tokenizers that flags name, by segment, each loaded once, with what stands beside it.

    Args:
        flags: from ``--segment``.
        known: tokenizers that are there already, by the component's name and that of the folder or repository: a
            pipeline's has several.
    """
    loaded, found = dict(known), {}
    for flag in flags:
        if flag.tokenizer is None:
            continue
        kind = MODALITIES[flag.modality]
        place = (kind.tokenizer or kind.noun, flag.tokenizer)
        if place not in loaded:
            said = f"{flag.name}={flag.modality}:{flag.column}:{flag.tokenizer}"
            with loading(f"--segment {said}: its tokenizer or encoder can't be loaded"):
                model, beside = kind.load_tokenizer(flag.tokenizer, cache_dir=cache_dir)
            loaded[place] = model if makes_token_ids(model) else model.eval(), beside
        found[flag.name] = loaded[place]
    return found


def columns_of_flags(
    *,
    resolution: int,
    image_vq: Any,
    text_vq: Any,
    tokenizer: Any,
    text_encoder: Any,
    image_column: str | None,
    caption_column: str | None,
    prompt_columns: Sequence[str] | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
    labels: Sequence[str] | None,
    lowres_factor: int | None,
    segments: Mapping[str, SegmentColumn] | None,
) -> dict[str, SegmentColumn]:
    """All segments of [`~training.encoding.encode_dataset`]'s arguments, in the order of their codes on disk.

    Raises:
        ValueError: if there are none, or one lacks what it needs.
    """
    text_columns, segments = list(text_columns or []), dict(segments or {})
    if image_column is None and caption_column is None and not segments:
        raise ValueError("give image_column, caption_column or both: there is nothing to encode")
    if image_column is not None and image_vq is None:
        raise ValueError(f"image_column={image_column!r} needs image_vq")
    encoded = text_vq is None and tokenizer is None and text_encoder is not None
    if caption_column is not None and not encoded and tokenizer is None:
        raise ValueError(f"caption_column={caption_column!r} needs text_vq and tokenizer, or text_encoder")
    if text_columns and caption_column is None:
        raise ValueError(f"text_columns={text_columns!r} need caption_column: they share the codes of its segment")
    for title in text_columns:
        if title in RESERVED or title == caption_column:
            raise ValueError(f"text_columns={text_columns!r}: {title!r} can't name a segment of its own")
    if lowres_factor is not None and (image_column is None or lowres_factor < 2 or resolution % lowres_factor):
        raise ValueError(f"lowres_factor={lowres_factor} needs image_column, and must divide {resolution}")

    found: dict[str, SegmentColumn] = {}
    if image_column is not None:
        picture = SegmentColumn(modality_of(ImageSegment), image_column, image_vq, options={"resolution": resolution})
        found[IMAGE] = picture
        if lowres_factor is not None:
            lowres = {**picture.options, "lowres_of": IMAGE, "factor": lowres_factor}
            found[LOWRES] = replace(picture, options=lowres)
    if caption_column is not None:
        text = SegmentColumn(modality_of(TextSegment), caption_column, text_vq, tokenizer)
        text = SegmentColumn(modality_of(TextStatesSegment), caption_column) if encoded else text
        found[TEXT] = replace(text, prompt_columns=tuple(prompt_columns or ()))
        found |= {column: replace(text, column=column) for column in text_columns}
    if label_column is not None:
        options = {} if labels is None else {"names": list(labels)}
        found[LABEL] = SegmentColumn(modality_of(LabelSegment), label_column, options=options)
    for name, column in segments.items():
        if name in found:
            raise ValueError(f"segments has {name!r}, which another argument makes too")
        if not isinstance(column, SegmentColumn) or not SEGMENT_NAME.fullmatch(str(name)):
            raise ValueError(f"segments[{name!r}]={shown(column)} must be a SegmentColumn, by a name of letters")
        found[name] = column
    for name in found:
        check_module_name("segments", name)
        if taken := [f"{name}{suffix}" for suffix in SUFFIXES if suffix and f"{name}{suffix}" in found]:
            raise ValueError(f"segments has {name!r}, and {taken[0]!r}, what its variants are called")
    return found


def name_tokenizers(
    columns: Mapping[str, SegmentColumn], named: Mapping[str, Any]
) -> tuple[dict[str, SegmentColumn], dict[str, Any]]:
    """The columns with their tokenizers and the names of these, and the tokenizers that are used by name.

    Args:
        columns: by segment.
        named: the components of these names, None for those that there aren't.

    Raises:
        ValueError: if a segment's tokenizer is missing, or isn't needed.
    """
    found: dict[str, SegmentColumn] = {}
    used: dict[str, Any] = {}
    for name, column in columns.items():
        kind = MODALITIES[check_choice(f"segments[{name!r}]: the modality", column.modality, list(MODALITIES))]
        if kind.tokenizer is None:
            if column.tokenizer is not None:
                raise ValueError(f"segments[{name!r}] has a tokenizer, which a {kind.noun} doesn't need")
            found[name] = column
            continue
        model = column.tokenizer
        if model is None:
            known_as = column.tokenizer_name if column.tokenizer_name in named else None
            places = [known_as] if known_as else [kind.tokenizer, kind.tokenizer_alone]
            model = next((named[place] for place in places if place and named.get(place) is not None), None)
        if model is None and column.tokenizer_name is None:  # as others of its kind have it, if these share one
            others = [one for one in columns.values() if one.modality == column.modality]
            makers = [(one.tokenizer or named.get(one.tokenizer_name or ""), one) for one in others]
            if len({id(maker) for maker, _ in makers if maker is not None}) == 1:
                model, lender = next((maker, one) for maker, one in makers if maker is not None)
                beside = next((one.beside for one in others if one.beside is not None), None)
                column = replace(column, tokenizer_name=lender.tokenizer_name, beside=column.beside or beside)
        if model is None:
            default = f", or {kind.tokenizer}" if kind.tokenizer else ""
            raise ValueError(f"segments[{name!r}] needs a tokenizer that makes codes of its {kind.noun}s{default}")
        known = next((one for one, other in {**named, **used}.items() if other is model), None)
        free = kind.given_only and {**named, **used}.get(kind.tokenizer) is None  # the component of encoders
        title = known or column.tokenizer_name or (kind.tokenizer if free else name)
        if known is None and title in {*named, *used, *PROCESSORS} and not (free and title == kind.tokenizer):
            raise ValueError(f"segments[{name!r}]: its tokenizer can't be called {title!r}, as another component is")
        used[title] = model
        kind = kind_of(column.modality, title, makes_token_ids(model))
        beside, place = column.beside, kind.place_beside(title)
        if place is not None:
            beside = {**named, **used}.get(place) if beside is None else beside
            if beside is None:
                raise ValueError(f"segments[{name!r}]: its tokenizer needs a {kind.named_beside} beside it")
            used[place] = beside
        found[name] = replace(column, tokenizer=model, tokenizer_name=title, beside=beside)
    order = [*(name for name in named if name in used), *(name for name in used if name not in named)]
    return found, {name: used[name] for name in order}
