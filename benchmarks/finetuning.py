"""Finetuning on a folder of captioned pictures: how many of them are drawn and captioned right afterwards.

    python -m benchmarks.finetuning --train_data_dir my_pictures --train_batch_size 16 --max_train_steps 400 \
        --resize_mode auto

Runs ``training/train_vqdit.py`` as the README does, with whatever more of its flags are given, and prints

- the minutes of CPU time that this took;
- the share of pictures that are right, one drawn from each caption: no other picture of the folder, as the image
  tokenizer gives it back, is nearer by pixels; with ``--features`` also by a vision model's features;
- the share of captions that come back from their pictures exactly, and those that don't.

``finetuning.png`` in the output folder has pictures of the folder, and below each the one that was drawn. All of them
were trained on: what is measured is whether they were learned.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from diffusers.utils.pil_utils import numpy_to_pil

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.evaluation import (
    EmojiData,
    Roles,
    add_sampling_arguments,
    sample,
    share,
)
from diffusers_vqdit.training.evaluation_pictures import reconstruct, unit_features
from diffusers_vqdit.training.image_losses import BackboneFeatures
from diffusers_vqdit.utils.arguments import argument_parser, model_name, output_path, positive_integer
from diffusers_vqdit.utils.told_errors import told_errors

from .scripts import ROOT, run_script


SHOWN = 12  # pictures in the grid


def parse_args() -> argparse.Namespace:
    parser = argument_parser(
        "Finetune on a folder of captioned pictures, and measure what was learned of them. All other flags go to "
        "training/train_vqdit.py, such as --train_batch_size and --max_train_steps."
    )
    parser.add_argument(
        "--pretrained_model_name_or_path", type=model_name, default=str(ROOT / "model_cards/vqdit-emoji-32")
    )
    parser.add_argument("--train_data_dir", required=True, help="Image folder with metadata.jsonl.")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--features", type=model_name, help="Vision model of transformers: a second judge.")
    parser.add_argument(
        "--features_image_size", type=positive_integer, help="Side that pictures are resized to for it."
    )
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/finetuning"))
    add_sampling_arguments(parser, num_samples=1000)
    args, args.more = parser.parse_known_args()  # more: of the training script
    return args


def train(args: argparse.Namespace) -> float:
    """Finetune, and return the minutes of CPU time of all processes."""
    names = ("pretrained_model_name_or_path", "train_data_dir", "caption_column", "seed", "output_dir")
    own = {"use_ema": True} | {name: getattr(args, name) for name in names}
    return run_script("train_vqdit", own, args.more, launched=True)


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict:
    """Shares of pictures and of captions, and the captions that came back wrong."""
    pipeline = VQDiTPipeline.from_pretrained(str(args.output_dir)).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    roles, columns = Roles.of(pipeline), {"columns": [args.caption_column], "max_samples": args.num_samples}
    dataset = load_training_dataset(train_data_dir=args.train_data_dir, **columns)
    side = pipeline.transformer.config.segments[roles.image]["shape"][0] * pipeline.image_vq.downsample_factor
    pictures, kept = decode_images(dataset, "image", side, resize_mode=pipeline.config.resize_mode)
    captions, rows = list(dataset.select(kept)[args.caption_column]), list(range(len(kept)))
    codes, decoded = reconstruct(pipeline.image_vq, pictures, args.batch_size)
    judge = features = None
    if args.features is not None:
        judge = BackboneFeatures.from_pretrained(args.features, args.features_image_size).to(args.device)
        features = unit_features(judge, decoded, args.batch_size)
    data = EmojiData(
        pictures=pictures,
        columns={args.caption_column: captions},
        train=rows,
        composition=rows,
        test=rows,
        plain=[],
        codes=codes,
        decoded=decoded,
        captions={args.caption_column: "captions"},
        label_column="",
        judge=judge,
        features=features,
    )
    drawn = sample(pipeline, args, len(rows), "text->image", roles.image, {roles.caption: captions})
    texts = sample(pipeline, args, len(rows), "image->text", roles.caption, {roles.image: data.real(rows)})
    grid = torch.cat([decoded[:SHOWN] / 2 + 0.5, drawn[:SHOWN].cpu()])
    images = numpy_to_pil(grid.permute(0, 2, 3, 1).numpy())
    make_image_grid(images, rows=2, cols=len(images) // 2).save(args.output_dir / "finetuning.png")
    return {
        **{f"pictures right{how}": one for how, one in data.judged(drawn, rows, args.batch_size).items()},
        "captions exact": share([text == caption for text, caption in zip(texts, captions, strict=True)]),
        "wrong captions": {truth: text for truth, text in zip(captions, texts, strict=True) if text != truth},
    }


def main(args: argparse.Namespace) -> None:
    minutes = train(args)
    print(json.dumps({"CPU minutes": round(minutes, 1), **measure(args)}, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
