"""The codes that a transformer is trained on: a folder of them, or a dataset that is encoded at the start; and the
tokenizers that made them."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..models.multi_tokenizer import MultiTokenizerModel
from ..models.segment_layers import segment_patch
from ..pipelines.image_segment import ImageSegment
from ..pipelines.label_segment import LabelSegment, names_by_code
from ..pipelines.segment_base import ENCODERS, IMAGE, LABEL, LOWRES, TEXT, SegmentColumn
from ..pipelines.segment_processors import MODALITIES, entry_by_name, kind_of, modality_of
from ..pipelines.states_segment import TextStatesSegment
from ..pipelines.token_segment import TokenSegment
from ..tasks import parse_tasks
from ..utils.arguments import integer, non_negative_integer, positive_integer
from ..utils.buckets import check_bucket_steps
from .codes import CodeDataset
from .data import load_training_dataset
from .encoding import encode_dataset, tokenizer_fingerprints
from .image_arguments import add_image_arguments
from .segment_columns import (
    RESERVED,
    add_bucket_argument,
    add_segment_argument,
    add_text_arguments,
    audio_options,
    columns_of,
    load_tokenizers,
    missing_segments,
)
from .streaming_arguments import add_streaming_argument, check_streaming


NAMED = ("image_vq", "text_vq", "tokenizer", *ENCODERS)  # the pipeline's components that make codes, or states
OWN = ("image_vq", "text_vq", "text_encoder", "image_encoder")  # those that have a flag


logger = get_logger(__name__)


def add_codes_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags of the codes, or of the data to make them of, and return their group for the tasks."""
    data = parser.add_argument_group("data")
    data.add_argument("--codes_dir", help="Folder written by encode_dataset.py.")
    data.add_argument(
        "--dataset_name", help="Hub dataset, or files of it: a path, folder or pattern, to encode at the start."
    )
    data.add_argument("--dataset_config_name")
    add_streaming_argument(data)
    data.add_argument("--train_data_dir", help="Image folder with metadata.jsonl, to encode at the start.")
    data.add_argument("--image_column", default=IMAGE)
    data.add_argument("--caption_column", default=TEXT)
    data.add_argument("--prompt_columns", nargs="*", default=[], help="More wordings, used where the text is given.")
    data.add_argument("--label_column")
    add_segment_argument(data)
    add_text_arguments(data)
    data.add_argument(
        "--image_augmentations",
        type=non_negative_integer,
        default=0,
        help="Moved copies of each picture, used where it is given.",
    )
    data.add_argument(
        "--lowres_factor",
        type=integer(2),
        help="How many times smaller image_lowres is; by default as in the codes or the pretrained pipeline, or 2.",
    )
    add_image_arguments(
        data, resize_mode=None, default="By default as in the codes or the pretrained pipeline, or auto."
    )
    add_bucket_argument(data, "By default as in the codes or the pretrained pipeline, or squares.")
    data.add_argument("--max_train_samples", type=positive_integer)
    data.add_argument("--cache_dir")
    return data


def check_source(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program unless one source of codes is given."""
    sources = [args.codes_dir, args.dataset_name, args.train_data_dir]
    if sum(source is not None for source in sources) != 1:
        parser.error("give one of --codes_dir, --dataset_name and --train_data_dir")
    check_streaming(parser, args)


def settle_reading(args: argparse.Namespace, parts: dict[str, Any], codes: CodeDataset | None) -> None:
    """How pictures are read, in `parts`, for the saved pipeline: as in the codes, or as the arguments say.

    Raises:
        ValueError: if these differ, or the pretrained pipeline knows low resolution by another factor.
    """
    given = {"lowres_factor": args.lowres_factor, "resize_mode": args.resize_mode}
    if codes is not None:
        found = {"lowres_factor": codes.lowres_factor, "resize_mode": codes.settings.get("resize_mode")}
        for name, value in found.items():
            if None not in (value, given[name]) and value != given[name]:
                raise ValueError(f"{name}={given[name]!r}, but the codes in {args.codes_dir!r} have {value!r}")
        given = found
    if LOWRES in known_segments(parts) and given["lowres_factor"] not in (None, parts["lowres_factor"]):
        raise ValueError(
            f"lowres_factor={given['lowres_factor']}, but the pretrained pipeline's is {parts['lowres_factor']}"
        )
    parts |= {name: value for name, value in given.items() if value is not None}


def known_segments(parts: Mapping[str, Any]) -> dict[str, dict]:
    """The segments of the pretrained transformer, none without one."""
    return parts["transformer"].config.segments if parts["transformer"] is not None else {}


def known_entry(parts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a segment of the pretrained pipeline is."""
    known = known_segments(parts)
    entry = parts["segments"].get(name) or entry_by_name(name, known, parts["labels"], parts["lowres_factor"])
    kind = MODALITIES[entry["modality"]]
    return entry if kind.tokenizer is None else {"tokenizer": kind.tokenizer, **entry}


def load_codes(
    args: argparse.Namespace, parts: dict[str, Any], segments: set[str], accelerator: Accelerator
) -> CodeDataset:
    """Read the folder of codes, after writing it from a dataset, by all processes, where that is what was given.

    Args:
        args: the script's arguments.
        parts: the pipeline's, to which the tokenizers of the codes are added where they are not named components.
        segments: those that are trained on.

    Raises:
        ValueError: if the codes are other tokenizers' than those there are, or a segment of ``--segment``
            would be made that no task names.
    """
    flags = [flag for flag in args.segment if flag.name in segments]
    if args.codes_dir is None and (unread := sorted({flag.name for flag in args.segment} - segments)):
        raise ValueError(f"--segment: {unread[0]!r} is in none of tasks={args.tasks!r}: leave it out")
    check_given_only(args, parts)
    available = _available(parts)
    own = {} if args.pretrained_model_name_or_path else {name: getattr(args, name) for name in OWN}
    paths = {(name, path): available[name] for name, path in own.items() if path}
    if "text_vq" in own and args.text_tokenizer:
        paths["text_vq", args.text_tokenizer] = parts["tokenizer"], None
    loaded = load_tokenizers(flags, paths, cache_dir=args.cache_dir)
    for flag in flags:
        kind = MODALITIES[flag.modality]
        component, beside = kind.tokenizer or "", kind.named_beside or ""
        if kind.given_only and flag.name in loaded and parts[component] is None:
            parts[component], parts[beside] = loaded[flag.name]
    available = _available(parts)
    available = loaded | available  # what the pretrained pipeline has under a name goes on
    if args.codes_dir is not None:
        codes = CodeDataset(args.codes_dir)
        for note in codes.notes:
            logger.warning(f"{args.codes_dir!r}, when it was encoded: {note}")
        _take_tokenizers(codes, parts, available, segments)
        codes.check_tokenizers(**{name: parts[name] for name in (*NAMED, "segment_tokenizers")})
        made_by = {codes.entries[name].get("tokenizer") for name in segments & set(codes.entries)}
        if missing := [name for name in NAMED if name in made_by and parts[name] is None]:
            needed = ", ".join(f"--{'text_' * (name == 'tokenizer')}{name}" for name in missing)
            logger.warning(
                f"the codes or states in {args.codes_dir!r} were made by {missing}, without which the saved pipeline "
                f"takes and gives these alone: give {needed}"
            )
        match_labels(parts, codes, segments)
        settle_reading(args, parts, codes)
        found = codes.settings.get("aspect_ratio_buckets")
        if args.aspect_ratio_buckets not in (None, found):
            raise ValueError(
                f"aspect_ratio_buckets={args.aspect_ratio_buckets}, but the codes in {args.codes_dir!r} have "
                f"{found or 'none'}: encode the data again with those that you want"
            )
        return codes
    settle_reading(args, parts, None)
    folder = args.output_dir / "codes"
    columns = segment_columns(args, parts, segments, loaded)
    if LABEL in segments and LABEL not in columns:
        raise ValueError(missing_segments(args.tasks, [LABEL], segments - {LABEL}))
    buckets = _settle_buckets(args, parts, segments, columns)
    dataset, options = _read_dataset(args, parts, segments, columns)
    for model, _ in available.values():
        if isinstance(model, torch.nn.Module):
            model.to(accelerator.device)
    if buckets is not None:
        options |= {"resolution": 0, "aspect_ratio_buckets": buckets}
    encode_dataset(dataset, folder, segments=columns, **options, resize_mode=parts["resize_mode"])
    codes = CodeDataset(folder)
    _take_tokenizers(codes, parts, available, segments)
    match_labels(parts, codes, segments)
    return codes


def check_given_only(args: argparse.Namespace, parts: Mapping[str, Any]) -> None:
    """See, before anything is encoded, that no task generates states of an encoder.

    Raises:
        ValueError: that names the task.
    """
    states = {flag.name for flag in args.segment if MODALITIES[flag.modality].given_only}
    states |= {TEXT} if parts["text_vq"] is None and parts["text_encoder"] is not None else set()
    for task, _ in parse_tasks(args.tasks):
        if wrong := sorted(states & set(task.generated)):
            raise ValueError(
                f"tasks={args.tasks!r}: {str(task)!r} generates {wrong}, but states of an encoder are given, never "
                "generated"
            )


def _settle_buckets(
    args: argparse.Namespace, parts: Mapping[str, Any], segments: set[str], columns: Mapping[str, SegmentColumn]
) -> list[list[int]] | None:
    """The buckets in pixels that pictures are sorted into: those of the flag, or of the pretrained pipeline.

    Raises:
        ValueError: if a picture segment of the pretrained pipeline is on another grid than the first bucket's, or a
            patch doesn't divide one.
    """
    buckets, known, patches = args.aspect_ratio_buckets, known_segments(parts), dict(getattr(args, "patch", ()))
    kinds = {name: MODALITIES[column.modality] for name, column in columns.items()}
    pictures = {name: columns[name].tokenizer for name, kind in kinds.items() if issubclass(kind, ImageSegment)}
    pictures = {name: None for name in {IMAGE, LOWRES} & segments - set(columns)} | pictures
    models = {name: model or parts["image_vq"] for name, model in pictures.items()}
    factors = {name: model.downsample_factor for name, model in models.items() if model is not None}
    for name, factor in factors.items():
        if buckets is None and name in known and (grids := known_entry(parts, name).get("buckets")):
            buckets = [[size * factor for size in grid] for grid in grids]
    for name, factor in factors.items() if buckets is not None else ():
        own = [size * factor for size in known[name]["shape"][:2]] if name in known else buckets[0]
        if buckets[0] != own:
            raise ValueError(
                f"aspect_ratio_buckets={buckets} must begin with {own}, the size of the pretrained pipeline's {name!r}"
            )
        patch = segment_patch(known, name)[:2] if name in known else patches.get(name, (1, 1))
        steps = [factor * size for size in patch[:2]]
        check_bucket_steps("aspect_ratio_buckets", buckets, steps, f"a position of {name!r}")
    return buckets


def segment_columns(
    args: argparse.Namespace, parts: dict[str, Any], segments: set[str], loaded: dict[str, tuple[Any, Any]]
) -> dict[str, SegmentColumn]:
    """The columns of ``--segment`` and of ``--label_column`` that are trained on.

    Raises:
        ValueError: if a segment of the pretrained pipeline would be made by another tokenizer.
    """
    known, available = known_segments(parts), _available(parts)
    flags = [(flag.name, flag.modality, flag.column) for flag in args.segment if flag.name in segments]
    said = {flag.name: audio_options(args) | flag.options for flag in args.segment}
    if LABEL in segments and args.label_column is not None:
        if LABEL in [name for name, *_ in flags]:
            raise ValueError(
                f"label_column={args.label_column!r}, but --segment makes {LABEL!r} too; give one of them"
            )
        flags.insert(0, (LABEL, modality_of(LabelSegment), args.label_column))
    prints = tokenizer_fingerprints({name: model for name, (model, _) in available.items()})
    columns = {}
    for name, modality, column in flags:
        model, beside = loaded.get(name, (None, None))
        title, options = None, said.get(name, {})
        if model is not None:
            # One that the pipeline has already goes by its name there.
            own = tokenizer_fingerprints({name: model})[name]
            title = next((one for one, value in prints.items() if value == own), None)
            if title is not None:
                model, beside = available[title]
        if name in known:
            entry = known_entry(parts, name)
            if entry["modality"] != modality:
                raise ValueError(f"--segment: {name!r} is a {entry['modality']} in the pretrained pipeline")
            if model is not None and title != entry["tokenizer"]:
                raise ValueError(
                    f"--segment: {name!r} is made by another tokenizer in the pretrained pipeline, which goes on; "
                    "leave the tokenizer out"
                )
            title = entry.get("tokenizer")
            model, beside = available.get(title or "", (None, None))
            options = kind_of(modality, title, "block_length" in known[name]).known_options(entry, known[name], model)
            _check_length(args, name, options)
        columns[name] = SegmentColumn(modality, column, model, beside, title, options=options)
    return columns


def _check_length(args: argparse.Namespace, name: str, options: Mapping[str, Any]) -> None:
    known = options.get("max_sequence_length")
    if known is not None and args.max_sequence_length not in (None, known):
        raise ValueError(
            f"max_sequence_length={args.max_sequence_length}, but the pretrained pipeline's {name!r} has {known}"
        )


def _read_dataset(
    args: argparse.Namespace, parts: dict[str, Any], segments: set[str], columns: dict[str, SegmentColumn]
) -> tuple[Any, dict[str, Any]]:
    """The dataset, and the arguments of [`encode_dataset`] for the flags of old."""
    texts = sorted(segments - set(RESERVED) - set(columns))
    image_column = args.image_column if {IMAGE, LOWRES} & segments - set(columns) else None
    caption_column = args.caption_column if texts or TEXT in segments - set(columns) else None
    prompt_columns = args.prompt_columns if caption_column is not None else []
    pictures, sounds, others = columns_of([flag for flag in args.segment if flag.name in columns])
    others += [args.label_column] if LABEL in columns and args.label_column is not None else []
    dataset = load_training_dataset(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        columns=[name for name in (caption_column, *others, *prompt_columns, *texts) if name is not None],
        image_column=[name for name in (image_column, *pictures) if name is not None],
        audio_column=sounds,
        max_samples=args.max_train_samples,
        cache_dir=args.cache_dir,
        output_dir=args.output_dir,
        streaming=args.streaming,
    )
    resolution, known, image_vq = 0, known_segments(parts), parts["image_vq"]
    if image_column is not None and image_vq is not None:
        resolution = image_vq.config.sample_size
        if IMAGE in known:
            resolution = known[IMAGE]["shape"][0] * image_vq.downsample_factor
    length = args.max_sequence_length
    if caption_column is not None and "channels" in known.get(TEXT, ()):
        options = TextStatesSegment.known_options({}, known[TEXT], None)
        _check_length(args, TEXT, options)
        length = options["max_sequence_length"]
    return dataset, {
        "resolution": resolution,
        "max_sequence_length": length,
        **{name: parts[name] for name in NAMED},
        "image_column": image_column,
        "caption_column": caption_column,
        "prompt_columns": prompt_columns,
        "text_columns": texts,
        "image_augmentations": args.image_augmentations,
        "lowres_factor": parts["lowres_factor"] if LOWRES in segments else None,
        "block_length": args.block_length,
        "max_text_length": args.max_text_length,
        "image_interpolation_mode": args.image_interpolation_mode,
        "dataloader_num_workers": args.dataloader_num_workers,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def _available(parts: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The tokenizers that there are, by name, with what stands beside them."""
    beside = {"image_vq": None, "text_vq": parts["tokenizer"]}
    beside |= {"text_encoder": parts["tokenizer_2"], "image_encoder": parts["feature_extractor"]}
    found = {name: (parts[name], beside[name]) for name in OWN}
    several = parts["segment_tokenizers"]
    if several is not None:
        found |= {name: (several.parts[name], several.beside.get(name)) for name in several.config.kinds}
    return found


def _take_tokenizers(
    codes: CodeDataset, parts: dict[str, Any], available: dict[str, tuple[Any, Any]], segments: set[str]
) -> None:
    """Put the codes' tokenizers that no named component holds into the pipeline's container, and call them in the
    entries as they are called here.

    Raises:
        ValueError: if there is none for a segment's codes.
    """
    models = {name: model for name, (model, _) in available.items()}
    prints = tokenizer_fingerprints({TokenSegment.tokenizer: parts[TokenSegment.tokenizer], **models})
    several = parts["segment_tokenizers"]
    titles = list(several.config.kinds) if several is not None else []
    shared = {codes.segments[name].get("shared_with", name) for name in segments & set(codes.segments)}
    for name in sorted((segments | shared) & set(codes.entries)):
        entry = codes.entries[name]
        title = entry.get("tokenizer")
        if title is None:
            continue
        wanted = codes.fingerprints.get(title)
        if wanted != prints.get(title) and (same := [one for one, value in prints.items() if value == wanted]):
            title = same[0]
            codes.entries[name] = {**entry, "tokenizer": title}
        if title in NAMED:  # which may be missing: without them, the pipeline takes and gives codes
            continue
        if title not in prints:
            given = "another one was given" if name in prints else "it isn't there"
            raise ValueError(
                f"the codes of {name!r} in {str(codes.folder)!r} were made by the tokenizer {title!r}, and {given}: "
                f"give it as --segment {name}={entry['modality']}:COLUMN:TOKENIZER, or encode the data again"
            )
        titles.append(title)
    if titles:
        beside = {title: available[title][1] for title in titles if available[title][1] is not None}
        parts["segment_tokenizers"] = MultiTokenizerModel({title: available[title][0] for title in titles}, beside)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def names_of_labels(entries: Mapping[str, Mapping[str, Any]], labels: list[str]) -> dict[str, list[str]]:
    """The names of all segments of labels that have some; `labels` are those of ``label`` where no entry says them."""
    found = {name: names_by_code(entry["names"]) for name, entry in entries.items() if entry.get("names")}
    return found if not labels else {LABEL: labels, **found}


def match_labels(parts: Mapping[str, Any], codes: CodeDataset, segments: set[str]) -> None:
    """Read the codes' labels as those of the pretrained transformer, by name; new ones come after them.

    Args:
        parts: of the pretrained pipeline, its ``"transformer"``, and its ``"segments"`` and ``"labels"`` as its config
            has them.
        codes: of a folder of an older version, whose index doesn't say what a segment is, or a newer one.
        segments: those that are trained on.
    """
    known, found = names_of_labels(parts["segments"], parts["labels"]), names_of_labels(codes.entries, codes.labels)
    own = known_segments(parts)
    for name in segments & set(known) & set(found) & set(own):
        size = own[name]["vocab_size"]
        older = name in parts["segments"] and name not in codes.entries
        if older:
            codes.entries[name] = dict(parts["segments"][name])
        new = [label for label in found[name] if label not in known[name]]
        if older or found[name] != [*known[name], *new] or codes.segments[name]["vocab_size"] < size:
            codes.rename_labels(name, found[name], [*known[name], *new], size)
