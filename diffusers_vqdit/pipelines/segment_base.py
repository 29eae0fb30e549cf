"""What a segment is, beside its codes: the base of the classes that make codes of values and values of codes.

A modality is a file with two of them: a [`SegmentProcessor`] for pipelines, and a [`ColumnReader`] that makes a
segment's codes of a dataset's column; and a line of `MODALITIES`.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Self

import torch

from ..models.segment_layers import has_codebooks
from ..utils.checks import shown


# The segments that arguments of their own are for; all others are passed by name.
TEXT, IMAGE, LABEL = "text", "image", "label"
PROMPT = "prompt"
ARGUMENTS = {PROMPT: TEXT, "image": IMAGE, "class_labels": LABEL}
# Small pictures of IMAGE, in a checkpoint that doesn't say what its segments are.
LOWRES = "image_lowres"
# The components of encoders, whose states are given, and what stands beside each.
ENCODERS = ("text_encoder", "tokenizer_2", "image_encoder", "feature_extractor")
# Ends the name of the column with what [`ColumnReader.measure`] says of another's files.
MEASURED = " measured"
# What a pipeline has beside its components to tokenize with.
PROCESSORS = ("image_processor", "pixel_processor")


@dataclass
class EncodedValue:
    """A value as codes, and what it tells of a generated one.

    Args:
        codes: int64 (B * tiles, *shape), the vocabulary size where unknown; or floats, the states (B, n, channels) of
            an encoder.
        finishes: name of the generated segment that `finish` makes values of.
        finish: values of generated codes, `(codes, repeats, output_type)`, in place of the segment's ``decode``;
            `repeats` samples were drawn for each value.
        tiles: how many samples stand for one value.
        mask: (B, n), zero at the padding of states or of texts of any length; None where nothing is.
    """

    codes: torch.Tensor
    finishes: str | None = None
    finish: Callable[[torch.LongTensor, int, str], Any] | None = None
    tiles: int = 1
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class SegmentColumn:
    """A segment of a dataset: its modality, its column, and what makes its codes.

    Args:
        modality: a key of `MODALITIES`.
        column: the column that it is made from.
        tokenizer: the model that makes its codes; None for the one that the modality takes by default, or where it
            needs none.
        beside: what stands beside the tokenizer: a text's tokenizer of transformers, a feature extractor.
        tokenizer_name: what the tokenizer is called; by default as a component, or as the first of its segments.
        prompt_columns: columns of more values, used where the segment is given; None for no such variants.
        options: the modality's, such as a label's ``"names"`` or a picture's ``"resolution"``.
    """

    modality: str
    column: str
    tokenizer: Any = None
    beside: Any = None
    tokenizer_name: str | None = None
    prompt_columns: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class ColumnReader(ABC):
    """One column of a dataset, to be encoded. Made before any work, when it checks all that can be checked then.

    Args:
        dataset: a `datasets.Dataset`.
        column: the column's name.
        tokenizer: the model that makes the codes, or None.
        beside: what stands beside it, or None.
        options: those of [`SegmentColumn`] and of [`~training.codes.encode_dataset`]; each reader takes its own, by
            keyword-only arguments.

    Attributes:
        vocab_size (`int`): codes are in [0, vocab_size).
        shape (`list[int]`, *optional*): of a value's grid of codes, where it is known before the first are made.
        entry (`dict`): options of the segment's entry that the column tells, such as a label's names.
        geometry (`dict`): what the transformer's config has of the segment beside these, such as a ``"block_length"``,
            with which codes have a length of their own, up to `shape`.
        notes (`list[str]`): warnings of what was found, to be shown before the work begins.
        has_variants (`bool`): whether some value has several codes, of which one is drawn each time.
        settings (`dict`): how values are read, where that is to be known.
        num_groups (`int`): of a column that sorts the rows into groups, whose codes have other shapes; 0 of another.
        group (`int`): that of the rows which are read and encoded now.
        state_channels (`int`, *optional*): of an encoder's states, which the values become in place of codes.
        measure (`Callable`, *optional*): what must be known of each file before the first is encoded. Of a stream,
            whose files are missing in `dataset`, it stands there in a column of the same name with `MEASURED`.
    """

    feature: str | None = None  # of `datasets`, which the column is cast to, undecoded
    measure: Callable[[Any], float] | None = None
    shape: list[int] | None = None
    num_groups = 0
    group = 0
    state_channels: int | None = None  # of states, where these are made in place of codes

    def __init__(self, dataset: Any, column: str, tokenizer: Any = None, beside: Any = None, **options: Any) -> None:
        self.column, self.tokenizer, self.beside = column, tokenizer, beside
        self.dataset = dataset.select_columns(column)  # the others need not be read
        if self.feature is not None:
            self.dataset = self.cast(self.dataset, column)
        self.entry: dict[str, Any] = {}
        self.geometry: dict[str, Any] = {}
        self.notes: list[str] = []
        self.has_variants = False
        self.settings: dict[str, Any] = {}

    @classmethod
    def takes(cls) -> set[str]:
        """The names of its options: the keyword-only arguments of its ``__init__`` and of those that it extends."""
        makers = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
        parameters = [one for maker in makers for one in inspect.signature(maker).parameters.values()]
        return {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}

    @classmethod
    def cast(cls, dataset: Any, column: str) -> Any:
        """The dataset with the column as one of `feature`, undecoded.

        Raises:
            ValueError: that names the column and its type, if it can't be one.
        """
        datasets = import_module("datasets")  # of training alone: an import would be asked of all who draw
        kind, feature = getattr(datasets, str(cls.feature)), dataset.features[column]
        if isinstance(feature, kind) and not feature.decode:
            return dataset
        try:
            return dataset.cast_column(column, kind(decode=False))
        except Exception as error:  # of Arrow
            raise ValueError(f"column {column!r} of {feature} can't be one of {cls.feature}: {error}") from error

    def values(self) -> Iterator[Any]:
        """All values as the dataset has them, some rows at a time: they may be more than fit into memory."""
        for batch in self.dataset.iter(1000):
            yield from batch[self.column]

    @property
    def vocab_size(self) -> int:
        """Number of codes."""
        return self.tokenizer.num_codes

    @property
    def reads(self) -> tuple:
        """Readers with an equal one read the same values, which are then read once."""
        return type(self), self.column

    def is_cut(self, row: int) -> bool:
        """Whether reading the value of a row loses a part of it that its owner may miss."""
        return False

    def group_of(self, row: int) -> int:
        """The group that a row's value belongs to, in [0, num_groups)."""
        return 0

    @abstractmethod
    def read(self, row: int) -> Any:
        """A row's value. What it raises leaves the row out, with a warning."""

    def lengthen(self, others: Sequence[Self]) -> None:  # noqa: B027
        """Take the shape that columns of the same tokenizer can share, if it has one to choose; `others` are all of
        them, this one too."""

    @abstractmethod
    def digest(self, values: list) -> bytes:
        """What tells these values from others, for the fingerprint of the data."""

    @abstractmethod
    def encode(self, values: list, batch_size: int) -> list[Any]:
        """Codes (V, *shape) of each value, on the CPU; V > 1 where it has variants, of which one is drawn. Or a list
        of V states (n, channels), float16."""

    def moved(self, values: list, batch_size: int) -> list[list[torch.LongTensor]]:
        """Codes (1, *shape) of changed copies of each value, for use where it is given."""
        return []

    def placed(self, row: int) -> str:
        """Where a row's value is, for a warning."""
        return f"in row {row}"


class SegmentProcessor(ABC):
    """Encodes and decodes one segment's values. Holds nothing that a call changes.

    Args:
        name: of the segment.
        entry: what the pipeline's config says of it, without ``"modality"``: ``"tokenizer"``, and the modality's
            options.
        geometry: what the transformer's config says of it: ``"vocab_size"`` or ``"channels"``, and ``"shape"``.
        components: the pipeline's components that tokenize, by name, None for those that it lacks, with the
            tokenizers of its `MultiTokenizerModel`; and its ``image_processor`` and ``pixel_processor``.
        resize_mode: how pictures are read that are not of the grid's aspect ratio.
        device: tells where codes go; asked when they are made, as diffusers looks through all layers for it.
    """

    options: tuple[str, ...] = ()
    ndims: tuple[int, ...] = (1, 2)  # of the grid of codes; the second is with residual codes of a position
    tokenizer_alone: str | None = None  # the component that makes its codes where there is no `tokenizer`
    tokenizer: str | None = None  # the component where the entry names none; "": it must name one; None: needs none
    named_beside: str | None = None  # the component beside that one
    reader: type[ColumnReader]  # of a dataset's column
    noun = "value"  # for messages
    output_field = ""  # of the pipeline's output, where it has one
    given_only = False  # whether it has states of an encoder, and no codes
    given_field: str | None = None  # that of the output which its values would be of, where they are given only
    takes_mask = False  # whether a mask says what of a value is unknown
    continues = False  # whether a value that is generated, too, is its beginning
    tiled = False  # whether a value is made of several samples
    any_shape = True  # whether codes of other shapes than the training's can be generated
    has_size = False  # whether a value has a height and a width, which may be chosen
    has_length = False  # whether a value has a length of its own
    takes_integers = False  # whether a value may be an array of integers that are no codes
    # How it is generated by default
    guidance_scale = 1.0
    num_inference_steps: int | None = 16  # None: as many as there are codes
    temperature: float | None = None  # where something is given; None: the scheduler's
    how_to_pass = "it is given or generated"  # where a segment is both passed and generated

    @property
    def kind(self) -> str:
        """The field of a pipeline's output that its values are of, or would be if they weren't given only; "" of
        codes."""
        return self.given_field or self.output_field

    def __init__(
        self,
        name: str,
        entry: Mapping[str, Any],
        geometry: Mapping[str, Any],
        components: Mapping[str, Any],
        resize_mode: str,
        device: Callable[[], torch.device],
    ) -> None:
        self.name, self.entry, self.resize_mode, self.device = name, entry, resize_mode, device
        self.vocab_size, self.channels = geometry.get("vocab_size", 0), geometry.get("channels", 0)
        self.shape = tuple(geometry["shape"])
        self.block_length: int | None = geometry.get("block_length")
        self.components = components
        self.argument = next((a for a, segment in ARGUMENTS.items() if segment == name), f"inputs[{name!r}]")

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the components that it can't do without."""
        tokenizer = self.entry.get("tokenizer", self.tokenizer)
        if tokenizer is None:
            return ()
        place = self.place_beside(tokenizer)
        return (tokenizer,) if place is None else (tokenizer, place)

    @property
    def vq(self) -> Any:
        """The component that makes its codes."""
        return self.components[self.needs[0]]

    @property
    def beside(self) -> Any:
        """What stands beside it."""
        return self.components[self.needs[1]]

    @classmethod
    def place_beside(cls, tokenizer: str) -> str | None:
        """The name under which components have what stands beside a tokenizer: the modality's own component has it in
        another, and those of a [`MultiTokenizerModel`] bring theirs."""
        if cls.named_beside in (None, tokenizer):  # which then makes the codes itself
            return None
        return cls.named_beside if tokenizer == cls.tokenizer else f"{tokenizer}.tokenizer"

    @classmethod
    def load_tokenizer(cls, name: str, *, cache_dir: str | None = None, **options: Any) -> tuple[Any, Any]:
        """The model in a folder or Hub repository that makes codes of such values, and what stands beside it or None.

        Raises:
            ValueError: if the modality has no tokenizers.
        """
        raise ValueError(f"{name!r} can't be a tokenizer of {cls.noun}s, which need none")

    @classmethod
    def check_entry(cls, where: str, entry: dict[str, Any], name: str, segments: Mapping[str, Any]) -> dict[str, Any]:
        """An entry of the config as it is saved; `segments` are the transformer's.

        Raises:
            ValueError: for an option that doesn't fit.
        """
        if "block_length" in segments[name]:
            raise ValueError(
                f"{where}: the transformer has {name!r} with a block_length, which is for token ids: "
                "{'modality': 'text', 'tokenizer': 'tokenizer'}"
            )
        shape, residual = segments[name]["shape"], cls.tokenizer is not None and has_codebooks(segments, name)
        if ("channels" in segments[name]) != cls.given_only:
            has = ("codes", "states of an encoder")["channels" in segments[name]]
            raise ValueError(f"{where}['modality']={entry['modality']!r}: the transformer has {name!r} as {has}")
        if len(shape) not in cls.ndims or cls.tokenizer is not None and len(shape) > cls.ndims[0] and not residual:
            raise ValueError(
                f"{where}['modality']={entry['modality']!r} needs a grid of {' or '.join(map(str, cls.ndims))} "
                f"dimensions, but the transformer has {name!r} of shape {list(shape)}"
            )
        return entry

    @classmethod
    def known_options(cls, entry: Mapping[str, Any], geometry: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Options of the reader of a column whose segment a pipeline has already, so that codes fit what it has."""
        return {}

    @property
    def buckets(self) -> list[list[int]]:
        """Grids of the aspect ratios that were trained on, where there were several."""
        return []

    def bucket_of(self, values: list) -> list[int]:
        """The grid of `buckets` that values belong to, where there are some."""
        raise NotImplementedError(f"a {self.noun} has no aspect ratio")

    def shape_of(self, height: int | None, width: int | None, patch: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the codes of values of a size in pixels, where values have one; None for that of the training.

        Raises:
            ValueError: unless it is a multiple of what a position covers.
        """
        return self.shape

    @abstractmethod
    def read(self, value: Any) -> list:
        """One or several values as a list that is checked, before any work.

        Raises:
            ValueError: naming the argument.
        """

    def read_negative(self, value: Any) -> list:
        """One or several values to be guided away from, as [`read`] gives them."""
        return self.read(value)

    def check_single(self, values: list) -> None:  # noqa: B027
        """Raise a ValueError for values, as [`read`] gives them, that would be several samples each."""

    @abstractmethod
    def encode(self, values: Any) -> torch.Tensor:
        """Codes (B, *shape) of values."""

    @abstractmethod
    def decode(self, codes: torch.LongTensor, output_type: str = "pil") -> Any:
        """Values of codes (B, *shape)."""

    def fields(self, value: Any) -> dict[str, Any]:
        """The fields of the pipeline's output that a generated value fills."""
        return {self.output_field: value} if self.output_field else {}

    def encode_given(self, values: list) -> EncodedValue:
        """Codes of values that others are generated from."""
        return EncodedValue(self.encode(values))

    def given_codes(self, codes: torch.LongTensor) -> EncodedValue:
        """Ready codes (B, *shape) of such values."""
        return EncodedValue(codes)

    def encode_partial(self, values: list, mask_image: torch.Tensor | None = None) -> EncodedValue:
        """Codes of values that are generated, of which a part is known.

        Raises:
            ValueError: for a modality whose values are known whole or not at all.
        """
        raise ValueError(
            f"{self.argument} is a {self.noun}, of which no part can be filled in: it is given or generated"
        )

    def read_mask(self, mask_image: Any, values: list) -> torch.Tensor:
        """Masks for `values`, ones where they are unknown.

        Raises:
            ValueError: for what is no mask of theirs.
        """
        raise ValueError(f"mask_image is no mask of {self.argument}, a {self.noun}")

    @property
    def blank(self) -> str | None:
        """What stands for one token of a text to fill in, where something does."""
        return None

    def has_blanks(self, value: Any) -> bool:
        """Whether a value itself asks to be filled in."""
        blank, texts = self.blank, value if isinstance(value, list) else [value]
        return blank is not None and any(isinstance(text, str) and blank in text for text in texts)

    def check_whole(self, argument: str, value: Any) -> None:
        """Raise a ValueError, which names the argument, where a value asks to be filled in that is taken as it is."""
        if self.has_blanks(value):
            raise ValueError(
                f"{argument}={shown(value)} has {self.blank}, which is for what is to be filled in: here the whole "
                f"{self.noun} is known"
            )


def bucket_shape(shape: Sequence[int], entry: Mapping[str, Any], bucket: int) -> list[int]:
    """The shape of a segment's codes in one of the buckets of its entry; of one without buckets its own shape."""
    return [*entry["buckets"][bucket], *shape[2:]] if "buckets" in entry else list(shape)


def forget_positions(
    codes: torch.LongTensor, other: torch.LongTensor, touched: torch.BoolTensor, mask_token_id: int
) -> torch.LongTensor:
    """Codes (B, *grid), or (B, *grid, q) of q a position, with all those masked of the positions that are touched
    (B, *grid) or have other codes in `other`."""
    changed = (codes != other).reshape(*touched.shape, -1).any(-1)  # (B, *grid)
    unknown = touched | changed
    return codes.masked_fill(unknown.view(*unknown.shape, *[1] * (codes.ndim - unknown.ndim)), mask_token_id)
