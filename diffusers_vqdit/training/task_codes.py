"""The codes that a transformer is trained on: a folder of them, or pictures and captions encoded at the start."""

import argparse
from typing import Any

from accelerate import Accelerator

from .codes import RESERVED, CodeDataset, encode_dataset
from .columns import encode_labels
from .data import load_training_dataset


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
    known = parts["transformer"].config.segments if parts["transformer"] is not None else {}
    if "image_lowres" in known and given["lowres_factor"] not in (None, parts["lowres_factor"]):
        raise ValueError(
            f"lowres_factor={given['lowres_factor']}, but the pretrained pipeline's is {parts['lowres_factor']}"
        )
    parts |= {name: value for name, value in given.items() if value is not None}


def load_codes(
    args: argparse.Namespace, parts: dict[str, Any], segments: set[str], accelerator: Accelerator
) -> CodeDataset:
    """Read the folder of codes, after writing it from pictures and captions where that is what was given."""
    if args.codes_dir is not None:
        codes = CodeDataset(args.codes_dir)
        codes.check_tokenizers(parts["image_vq"], parts["text_vq"], parts["tokenizer"])
        known = parts["labels"]
        if "label" in segments and known and codes.labels[: len(known)] != known:
            raise ValueError(
                f"the codes in {args.codes_dir!r} have the labels {codes.labels}, but the pretrained pipeline has "
                f"{known}: theirs must come first, in their order; or give the data itself, not its codes"
            )
        settle_reading(args, parts, codes)
        return codes
    settle_reading(args, parts, None)
    text_columns = sorted(segments - set(RESERVED))
    image_column = args.image_column if segments & {"image", "image_lowres"} else None
    caption_column = args.caption_column if text_columns or "text" in segments else None
    label_column = args.label_column if "label" in segments else None
    prompt_columns = args.prompt_columns if caption_column is not None else []
    dataset = load_training_dataset(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        columns=[c for c in (caption_column, label_column, *prompt_columns, *text_columns) if c is not None],
        image_column=image_column,
        max_samples=args.max_train_samples,
        cache_dir=args.cache_dir,
        output_dir=args.output_dir,
    )
    folder = args.output_dir / "codes"
    if accelerator.is_main_process:
        labels = None
        if label_column is not None:
            # Names that a pretrained pipeline lacks come after its own.
            feature, known = dataset.features[label_column], dict(enumerate(parts["labels"]))
            labels = list(encode_labels(dataset[label_column], label_column, feature, known)[1].values())
        resolution = 0
        if image_column is not None and parts["image_vq"] is not None:
            known = parts["transformer"].config.segments if parts["transformer"] is not None else {}
            image_vq = parts["image_vq"]
            resolution = image_vq.config.sample_size
            if "image" in known:
                resolution = known["image"]["shape"][0] * image_vq.downsample_factor
        for name in ("image_vq", "text_vq"):
            if parts[name] is not None:
                parts[name].to(accelerator.device)
        encode_dataset(
            dataset,
            folder,
            resolution=resolution,
            image_vq=parts["image_vq"],
            text_vq=parts["text_vq"],
            tokenizer=parts["tokenizer"],
            image_column=image_column,
            caption_column=caption_column,
            prompt_columns=prompt_columns,
            text_columns=text_columns,
            label_column=label_column,
            labels=labels,
            image_augmentations=args.image_augmentations,
            lowres_factor=parts["lowres_factor"] if "image_lowres" in segments else None,
            resize_mode=parts["resize_mode"],
        )
    accelerator.wait_for_everyone()
    return CodeDataset(folder)
