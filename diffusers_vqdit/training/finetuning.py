"""A pretrained transformer, made to fit the segments, labels and tasks of other data, and what is asked of it."""

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from diffusers import DiTTransformer2DModel

from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..pipelines.segment_base import IMAGE, TEXT
from ..utils.checks import check_integer


def extend_transformer(
    transformer: VQDiTTransformer2DModel,
    segments: dict[str, dict],
    labels: Mapping[str, Sequence[str]],
    tasks: Sequence[str],
    *,
    lora: bool = False,
    newly_bucketed: Collection[str] = (),
) -> VQDiTTransformer2DModel:
    """The transformer with what the data has beside its own: more labels, segments, tasks, grids.

    Args:
        segments: the data's, by name, as the transformer's config has them.
        labels: the names of the data's labels by segment, the transformer's own first.
        lora: whether only a LoRA is trained, which can't add labels or segments.
        newly_bucketed: segments that the data have on several grids, and the transformer on one or not at all. They
            get centered positions where the data's are; on the transformer's one grid this changes nothing. New
            segments have the data's, or those of the transformer's own segment that they share with and begin as.

    Raises:
        ValueError: if a segment differs from the transformer's own, or a LoRA would have to add one.
    """
    known = transformer.config.segments
    for name, names in labels.items():
        if name not in known or name not in segments or len(names) <= known[name]["vocab_size"]:
            continue
        if lora:
            raise ValueError(
                f"the labels {list(names[known[name]['vocab_size'] :])} are new to the pipeline; a LoRA can't add "
                "them: drop --rank"
            )
        transformer = transformer.with_vocab_size(name, len(names))
        known = transformer.config.segments
    check_same_segments(transformer, segments)
    if new := {name: segment for name, segment in segments.items() if name not in known}:
        if lora:
            raise ValueError(f"the segments {sorted(new)} are new to the pipeline; a LoRA can't add them: drop --rank")
        transformer = transformer.with_segments(new)
    own, known_tasks = dict(transformer.config.segments), list(transformer.config.tasks or [])
    for name in () if lora else newly_bucketed:  # a LoRA's base stays as it is
        if segments[name].get("centered_positions", False):
            own[name] = {**own[name], "centered_positions": True}
    for name in new:
        table = own.get(own[name].get("shared_with"))
        if table is not None and own[name]["shared_with"] in known and len(table["shape"]) == len(own[name]["shape"]):
            rest = {key: value for key, value in own[name].items() if key != "centered_positions"}
            own[name] = rest | {key: value for key, value in table.items() if key == "centered_positions"}
    known_tasks += [task for task in tasks if task not in known_tasks]
    transformer.register_to_config(segments=own, tasks=known_tasks)
    return transformer


def extend_entries(
    known: Mapping[str, dict[str, Any]], read: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The entries of a pipeline's segments with those of the data, and the segments that get their first buckets.

    A segment that is known on several grids goes on to be, where the data have one of them alone.
    """
    several = {name: one["buckets"] for name, one in known.items() if len(one.get("buckets", ())) > 1}
    first, entries = set(), dict(known)
    for name, entry in read.items():
        entries[name] = entry
        if len(entry.get("buckets", ())) > 1:
            first |= {name} - set(several)
        elif name in several and entry["modality"] == known[name]["modality"]:
            entries[name] = {**entry, "buckets": several[name]}
    return entries, first


def check_new_patches(
    transformer: VQDiTTransformer2DModel | None, patches: Sequence[tuple[str, Sequence[int]]], segments: Iterable[str]
) -> None:
    """See, before anything is encoded, that ``--patch`` is of one of the tasks' segments, or one whose embeddings they
    may share, and changes none of a pretrained transformer.

    Raises:
        ValueError: that names the segment.
    """
    known = {} if transformer is None else transformer.config.segments
    there = {*segments, *known, IMAGE, TEXT}
    for name, patch in patches:
        if name not in there:
            raise ValueError(f"patch: {name!r} must be one of {sorted(there)}")
        own = known.get(name, {}).get("patch")
        if name in known and list(patch) != own:
            raise ValueError(
                f"--patch {name}={'x'.join(map(str, patch))} is of a new transformer; the pretrained one has "
                f"{own or 'no patch'} for {name!r}, which stays: leave it out"
            )


def check_same_segments(transformer: VQDiTTransformer2DModel, segments: Mapping[str, dict]) -> None:
    """Raise a ValueError unless the data's `segments` are as the transformer's own of these names, where it has them.

    The transformer keeps its own patch, of which the data says nothing, and its own kind of positions.
    """
    known = transformer.config.segments
    for name, segment in segments.items():
        segment = {key: value for key, value in segment.items() if key != "centered_positions"}
        kept = ("patch", "separate_codebooks", "centered_positions")
        own = {key: known[name][key] for key in kept if key in known.get(name, ())}
        # One of blocks has codes of any length.
        any_length = {"shape": known[name]["shape"]} if "block_length" in known.get(name, ()) else {}
        if name in known and {**own, **segment, **any_length} != known[name]:
            raise ValueError(
                f"segment {name!r} is {segment} in the data but {known[name]} in the pretrained transformer"
            )


def as_trainable(transformer: DiTTransformer2DModel) -> VQDiTTransformer2DModel:
    """Our model with the weights of a stock one, as diffusers' `DiTPipeline` has it, and the same outputs."""
    if isinstance(transformer, VQDiTTransformer2DModel):
        return transformer
    ours = VQDiTTransformer2DModel.from_config(transformer.config)
    ours.load_state_dict(transformer.state_dict())
    return ours.share_embedder() if ours._embedders_are_equal() else ours


def check_layers(args: argparse.Namespace, transformer: VQDiTTransformer2DModel | None) -> None:
    """See, before the latents are made, that the flags fit the pretrained transformer, or the new one."""
    layers = args.num_layers
    if transformer is not None:
        layers = len(transformer.transformer_blocks)
        if (transformer.config.out_channels == 2 * transformer.config.in_channels) != args.learn_sigma:
            raise ValueError(f"learn_sigma={args.learn_sigma} is not what the pretrained transformer has")
    if args.alignment_encoder is not None:
        check_integer("alignment_layer", args.alignment_layer, 1, layers)
