"""What a transformer over latents is trained on: pictures with captions and labels, read once, drawn for a batch."""

import argparse
from typing import Any

import torch

from ..models.text_vq import TextVQModel
from ..models.vae_latents import downsample_factor, latent_statistics, measure_latents
from ..pipelines.image_segment import ImageReader
from ..utils.buckets import check_resolution
from ..utils.distributed import from_main_process, process_rank
from ..utils.labels import encode_labels
from .caption_states import CaptionStates, cache_captions
from .checkpoints import fingerprint
from .columns import CaptionColumn, texts_in_order, warn_of_cut
from .data import load_training_dataset
from .image_dataset import ImageDataset
from .latent_loss import drawn_to_drop
from .picture_tensors import PictureTensors
from .row_stream import LISTED_FOLDER
from .streamed_images import StreamedImages


STATES_FILE = "caption_states.arrow"  # in a run's folder


def load_data(
    args: argparse.Namespace, parts: dict[str, Any]
) -> tuple[ImageDataset, dict[str, CaptionColumn], torch.Tensor | None, dict[int, str]]:
    """What is trained on: pictures; by row of the data their captions by column, and labels; the labels' names."""
    if args.caption_columns and parts["text_encoder"] is None:
        raise ValueError("caption_columns need --text_vq or --text_encoder, or a pretrained pipeline that has one")
    columns = [*args.caption_columns, *([args.label_column] if args.label_column else [])]
    dataset = load_training_dataset(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        columns=columns,
        image_column=args.image_column,
        max_samples=args.max_train_samples,
        cache_dir=args.cache_dir,
        output_dir=args.output_dir,
        streaming=args.streaming,
    )
    stream = None
    if args.streaming:
        stream = dataset
        dataset = stream.rows(args.output_dir / LISTED_FOLDER, columns, {args.image_column: ImageReader})
    vae, transformer = parts["vae"], parts["transformer"]
    resolution = args.resolution
    if resolution is None:
        size = vae.config.sample_size
        resolution = transformer.config.sample_size * downsample_factor(vae) if transformer is not None else size
    check_resolution(resolution, downsample_factor(vae))
    captions = {column: CaptionColumn(dataset, column) for column in args.caption_columns}
    if captions:
        ours = isinstance(parts["text_encoder"], TextVQModel)
        length = parts["text_encoder"].config.max_length if ours else parts["max_sequence_length"]
        warn_of_cut(
            texts_in_order(captions.values()),
            parts["tokenizer"],
            length,
            "max_length" if ours else "max_sequence_length",
        )
    labels, id2label = None, parts["id2label"]
    if args.label_column is not None:
        known = transformer.config.num_embeds_ada_norm if transformer is not None else 0
        feature, values = dataset.features[args.label_column], dataset[args.label_column]
        labels, id2label = encode_labels(values, args.label_column, feature, id2label, size=known, comma_names=True)
    options = {"resize_mode": parts["resize_mode"], "interpolation": args.image_interpolation_mode}
    options["channels"] = vae.config.in_channels
    reading = (dataset, args.image_column, resolution)
    images = ImageDataset(*reading, **options) if stream is None else StreamedImages(stream, *reading, **options)
    return images, captions, labels, id2label


def take_rows(
    rows: Any, captions: dict[str, CaptionColumn], labels: torch.Tensor | None
) -> tuple[dict[str, CaptionColumn], torch.Tensor | None]:
    """The captions and labels of some rows (N,) of the data."""
    captions = {name: column.take(rows) for name, column in captions.items()}
    return captions, labels[torch.as_tensor(rows)] if labels is not None else None


def data_identity(
    images: ImageDataset, captions: dict[str, CaptionColumn], labels: torch.Tensor | None
) -> dict[str, str]:
    """What tells the data from others, for the identity of a run."""
    if images.pictures is not None:
        return {"training data": fingerprint(images.pictures, captions, labels)}
    return {**images.identity(), "captions and labels": fingerprint(captions, labels)}


def settle_statistics(
    vae: torch.nn.Module, latents: PictureTensors, *, measure: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of latents (N, variants, C, h, w) as the VQ's config has them, on the CPU.

    Args:
        measure: take the latents' own statistics, and note them in the config, where it has none.
    """
    if measure and vae.config.latents_mean is None:
        # Those of one process, as the others may have encoded a little differently.
        chunks = (chunk.flatten(0, 1) for chunk in latents.chunks())
        measured = measure_latents(chunks) if process_rank()[0] == 0 else None
        mean, std = from_main_process(measured)
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    mean, deviation = (value.cpu() for value in latent_statistics(vae))
    return mean, deviation


def encode_captions_of(
    args: argparse.Namespace, parts: dict[str, Any], captions: dict[str, CaptionColumn], device: torch.device
) -> CaptionStates | None:
    """The states of all captions, on disk; None where there are none. All processes must call it. The text encoder
    isn't needed after that."""
    if not captions:
        return None
    encoder, length = parts["text_encoder"], parts["max_sequence_length"]
    return cache_captions(
        encoder,
        parts["tokenizer"],
        list(captions.values()),
        encoder.config.max_length if isinstance(encoder, TextVQModel) else length,
        args.states_file or args.output_dir / STATES_FILE,
        kept=args.states_file is not None,
        device=device,
    )


def draw_conditions(
    args: argparse.Namespace,
    null_label: int,
    states: CaptionStates | None,
    labels: torch.Tensor | None,
    rows: torch.Tensor,
    generator: list[torch.Generator],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The labels (B,) of a batch, `null_label` for none, and its captions' states, where there are some, each dropped
    on its own.

    So either alone, both and neither are trained.
    """
    drop = drawn_to_drop(len(rows), args.label_dropout, generator)
    class_labels = torch.full((len(rows),), null_label)
    if labels is not None:
        class_labels = torch.where(drop, null_label, labels[rows])
    if states is None:
        return class_labels, {}
    drawn = states.draw(rows, generator)
    drop = drawn_to_drop(len(rows), args.caption_dropout, generator)
    mask = torch.ones(drawn.states.shape[:2], dtype=torch.bool) if drawn.mask is None else drawn.mask
    return class_labels, {"encoder_hidden_states": drawn.states, "encoder_attention_mask": mask & ~drop[:, None]}
