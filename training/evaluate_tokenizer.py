#!/usr/bin/env python
"""Measure an image tokenizer: PSNR, SSIM, code usage, perplexity, and the Frechet distance of its reconstructions; or
a text tokenizer: the share of captions that come back exactly, code usage and perplexity; or an audio codec: how far
the spectrograms of what comes back are, code usage and perplexity, and what a recogniser hears.

    accelerate launch training/evaluate.py --tokenizer model_cards/vqdit-emoji-32 --subfolder image_vq
    python training/evaluate.py --tokenizer model_cards/vqdit-emoji-32 --subfolder text_vq \
        --caption_columns text text_zh
    python training/evaluate.py --tokenizer model_cards/audio-vq-speech --dataset_name outputs/speech.parquet \
        --language en --recognise

``training/evaluate.py`` hands over to this script where ``--tokenizer`` is given. The pictures are shared between the
processes. The Frechet distance needs features: ``--features inception`` for those of published figures
(torch-fidelity, which downloads its weights), or any vision backbone of transformers, whose figures compare with one
another only.
"""

import argparse
import json
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from datasets import Audio

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training.columns import CaptionColumn, Texts
from diffusers_vqdit.training.data import decoded_batches, load_training_dataset
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.frechet_distance import inception_features
from diffusers_vqdit.training.image_losses import BackboneFeatures
from diffusers_vqdit.training.launch import check_launch
from diffusers_vqdit.training.table_files import loading
from diffusers_vqdit.training.tokenizer_metrics import (
    measure_audio_tokenizer,
    measure_image_tokenizer,
    measure_text_tokenizer,
)
from diffusers_vqdit.training.tokenizers import load_codec, load_text_vq
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.utils.arguments import argument_parser, model_name, output_path, positive_integer, refuse_unused
from diffusers_vqdit.utils.checks import shown
from diffusers_vqdit.utils.sounds import read_sound
from diffusers_vqdit.utils.told_errors import told_errors


def make_parser() -> argparse.ArgumentParser:
    parser = argument_parser("Measure an image or a text tokenizer, or an audio codec.")
    parser.add_argument(
        "--tokenizer",
        type=model_name,
        required=True,
        help="ImageVQModel, VQModel, TextVQModel, or an audio codec: a folder or a Hub id.",
    )
    parser.add_argument("--subfolder", help="Of the tokenizer in a pipeline's folder.")
    parser.add_argument(
        "--dataset_name", help="Hub dataset, or files of it: a path, folder or pattern; by default the emoji dataset."
    )
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--train_data_dir", help="Image folder.")
    parser.add_argument("--split", default="test")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_columns", nargs="+", default=["text"], help="Of a text tokenizer.")
    parser.add_argument("--audio_column", default="audio", help="Of an audio codec.")
    parser.add_argument("--language", help="The sounds of which the column of this name says so; by default all.")
    parser.add_argument(
        "--recognise",
        action="store_true",
        help="Whether pocketsphinx tells the sounds, English speech, by the first of --caption_columns: originals, "
        "round trips, and those with a quarter and half of the codes drawn at random.",
    )
    parser.add_argument("--resolution", type=positive_integer, help="By default the tokenizer's sample_size.")
    parser.add_argument("--max_samples", type=positive_integer)
    parser.add_argument("--batch_size", type=positive_integer, default=64, help="Of each process.")
    parser.add_argument("--features", help="'inception', or a vision model of transformers: a Hub id or a folder.")
    parser.add_argument(
        "--features_image_size", type=positive_integer, help="Side that pictures are resized to for that model."
    )
    parser.add_argument("--output_file", type=output_path, help="JSON file for the figures.")
    return parser


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(input_args)
    refuse_unused_arguments(parser, args)
    if args.dataset_name is None and args.train_data_dir is None:
        args.dataset_name = "training/data/emoji.parquet"
    return args


def measure_texts(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, float]:
    name = args.tokenizer if args.subfolder is None else f"{args.tokenizer}/{args.subfolder}"
    model, tokenizer = load_text_vq(name, argument="tokenizer")
    dataset = load_training_dataset(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        split=args.split,
        columns=args.caption_columns,
        max_samples=args.max_samples,
    )
    captions = {column: Texts([CaptionColumn(dataset, column)]) for column in args.caption_columns}
    return measure_text_tokenizer(model.to(accelerator.device), tokenizer, captions, args.batch_size)


def measure_sounds(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, float]:
    name = args.tokenizer if args.subfolder is None else f"{args.tokenizer}/{args.subfolder}"
    codec, extractor = load_codec(name, argument="tokenizer")
    captions, languages = args.caption_columns[:1] * args.recognise, ["language"] * (args.language is not None)
    dataset = load_training_dataset(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        split=args.split,
        columns=[*captions, *languages],
        audio_column=args.audio_column,
    )
    rows = range(len(dataset))
    if args.language is not None:
        rows = [row for row, spoken in enumerate(dataset["language"]) if spoken == args.language]
        if not rows:
            raise ValueError(
                f"language={args.language!r} is of no row; there are {sorted(map(str, set(dataset['language'])))}"
            )
    dataset = dataset.select(rows[: args.max_samples])
    values = dataset.select_columns(args.audio_column).cast_column(args.audio_column, Audio(decode=False))
    sounds = (read_sound(row[args.audio_column], extractor.sampling_rate) for row in values)  # one after the other
    said = list(dataset[captions[0]]) if captions else None
    return measure_audio_tokenizer(codec.to(accelerator.device), extractor, sounds, said)


def measure_images(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, float]:
    model = ImageVQModel.from_pretrained(args.tokenizer, subfolder=args.subfolder).to(accelerator.device)
    dataset = load_training_dataset(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        split=args.split,
        image_column=args.image_column,
        max_samples=args.max_samples,
    )
    resolution = args.resolution or model.config.sample_size
    features = None
    if args.features == "inception":
        features = inception_features().to(accelerator.device)
    elif args.features is not None:
        backbone = BackboneFeatures.from_pretrained(args.features, args.features_image_size)
        backbone.check_size(resolution)
        features = backbone.to(accelerator.device).pooled
    if features is not None and model.config.in_channels != 3:
        raise ValueError(
            f"features={args.features!r} are of RGB pictures; the tokenizer's have in_channels="
            f"{model.config.in_channels}"
        )
    if len(dataset) < accelerator.num_processes:
        raise ValueError(f"{len(dataset)} pictures can't be shared by {accelerator.num_processes} processes")
    own = dataset.shard(accelerator.num_processes, accelerator.process_index)
    options = {"batch_size": args.batch_size, "resize_mode": "auto"}  # as training does
    options["channels"] = model.config.in_channels
    batches = (pictures for pictures, _ in decoded_batches(own, args.image_column, resolution, **options))
    return measure_image_tokenizer(model, batches, features=features)


# The flags that have a say in what is measured of one kind of tokenizers alone.
FLAGS = {
    measure_images: ("image_column", "resolution", "features", "features_image_size", "batch_size"),
    measure_texts: ("caption_columns", "batch_size"),
    measure_sounds: ("audio_column", "language", "recognise", "caption_columns"),
}


def main(args: argparse.Namespace) -> None:
    check_launch()
    # A process may have more pictures, or slower ones, than another.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    if args.output_file is not None and accelerator.is_main_process:
        check_output_file("output_file", args.output_file)
    # A codec of transformers has no such entry.
    with loading(f"tokenizer={shown(args.tokenizer)} can't be loaded"):
        kind = ImageVQModel.load_config(args.tokenizer, subfolder=args.subfolder).get("_class_name", "codec")
    measure = {"TextVQModel": measure_texts, "codec": measure_sounds, "SpectrogramVQModel": measure_sounds}
    found = measure.get(kind, measure_images)
    used = {name for name in FLAGS[found] if name != "caption_columns" or args.recognise or found is measure_texts}
    unused = sorted(set().union(*FLAGS.values()) - used)
    refuse_unused(make_parser(), args, dict.fromkeys(unused, f"with --tokenizer of a {kind}"))
    figures = found(args, accelerator)
    if accelerator.is_main_process:
        print(json.dumps(figures, indent=2))
        if args.output_file is not None:
            args.output_file.write_text(json.dumps(figures, indent=2) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
