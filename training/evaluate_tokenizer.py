#!/usr/bin/env python
"""Measure an image tokenizer: PSNR, SSIM, code usage, perplexity, and the Frechet distance of its reconstructions; or
a text tokenizer: the share of captions that come back exactly, code usage and perplexity.

    accelerate launch training/evaluate.py --tokenizer model_cards/vqdit-emoji --subfolder image_vq
    python training/evaluate.py --tokenizer model_cards/vqdit-emoji --subfolder text_vq --caption_columns text text_zh

``training/evaluate.py`` hands over to this script where ``--tokenizer`` is given. The pictures are shared between the
processes. The Frechet distance needs features: ``--features inception`` for those of published figures
(torch-fidelity, which downloads its weights), or any vision backbone of transformers, whose figures compare with one
another only.
"""

import argparse
import json

from accelerate import Accelerator

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.frechet_distance import inception_features
from diffusers_vqdit.training.image_losses import BackboneFeatures
from diffusers_vqdit.training.launch import check_launch
from diffusers_vqdit.training.tokenizer_metrics import measure_image_tokenizer, measure_text_tokenizer
from diffusers_vqdit.training.tokenizers import load_text_vq
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.utils.arguments import argument_parser, model_name, output_path, positive_integer, refuse_unused
from diffusers_vqdit.utils.texts import caption_lists


def make_parser() -> argparse.ArgumentParser:
    parser = argument_parser("Measure an image or a text tokenizer.")
    parser.add_argument(
        "--tokenizer",
        type=model_name,
        required=True,
        help="ImageVQModel, VQModel or TextVQModel: a folder or a Hub id.",
    )
    parser.add_argument("--subfolder", help="Of the tokenizer in a pipeline's folder.")
    parser.add_argument("--dataset_name", help="Hub dataset, or path of a parquet file; by default the emoji dataset.")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--train_data_dir", help="Image folder.")
    parser.add_argument("--split", default="test")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_columns", nargs="+", default=["text"], help="Of a text tokenizer.")
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


def measure_texts(args: argparse.Namespace) -> dict[str, float]:
    name = args.tokenizer if args.subfolder is None else f"{args.tokenizer}/{args.subfolder}"
    model, tokenizer = load_text_vq(name)
    dataset = load_training_dataset(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        split=args.split,
        columns=args.caption_columns,
        max_samples=args.max_samples,
    )
    captions = {c: [text for row in caption_lists(dataset[c], c) for text in row] for c in args.caption_columns}
    return measure_text_tokenizer(model, tokenizer, captions, args.batch_size)


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
    pictures, _ = decode_images(dataset, args.image_column, resolution, resize_mode="auto")  # as training does
    features = None
    if args.features == "inception":
        features = inception_features().to(accelerator.device)
    elif args.features is not None:
        backbone = BackboneFeatures.from_pretrained(args.features, args.features_image_size)
        backbone.check_size(resolution)
        features = backbone.to(accelerator.device).pooled
    return measure_image_tokenizer(
        model,
        pictures,
        batch_size=args.batch_size,
        features=features,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def main(args: argparse.Namespace) -> None:
    check_launch()
    accelerator = Accelerator()
    if args.output_file is not None and accelerator.is_main_process:
        check_output_file("output_file", args.output_file)
    kind = ImageVQModel.load_config(args.tokenizer, subfolder=args.subfolder)["_class_name"]
    of_texts = kind == "TextVQModel"
    others = ("image_column", "resolution", "features", "features_image_size") if of_texts else ("caption_columns",)
    refuse_unused(make_parser(), args, dict.fromkeys(others, f"with --tokenizer of a {kind}"))
    figures = measure_texts(args) if of_texts else measure_images(args, accelerator)
    if accelerator.is_main_process:
        print(json.dumps(figures, indent=2))
        if args.output_file is not None:
            args.output_file.write_text(json.dumps(figures, indent=2) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
