#!/usr/bin/env python
"""Pictures of several aspect ratios, from a dataset of squares: each one's middle, cut to every size.

    python -m benchmarks.cut_pictures --every 5 --output_file outputs/cuts.parquet

Of the training split's emoji without a skin tone, every ``--every``-th: a row for each size. Beside the file one with
``_whole`` in its name has the same emoji uncut and the test split, for ``training/evaluate.py --tasks sizes``.
"""

import argparse
import io
from pathlib import Path

import datasets
from PIL import Image

from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.segment_columns import bucket_sizes
from diffusers_vqdit.utils.arguments import argument_parser, output_path, positive_integer
from diffusers_vqdit.utils.fitting import resize_image
from diffusers_vqdit.utils.images import to_rgb
from diffusers_vqdit.utils.weight_files import replacing_file


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Cut pictures to several aspect ratios.")
    parser.add_argument("--emoji_file", default="training/data/emoji.parquet", help="What prepare_emoji.py wrote.")
    parser.add_argument("--aspect_ratio_buckets", type=bucket_sizes, default="32,32;40,24;24,40")
    parser.add_argument("--every", type=positive_integer, default=1)
    parser.add_argument("--output_file", type=output_path, default=Path("outputs/cuts.parquet"))
    return parser.parse_args(input_args)


def cut(picture: dict, size: list[int]) -> dict:
    """The middle of an undecoded picture, of the aspect ratio of a size and as large as there is."""
    image = to_rgb(Image.open(io.BytesIO(picture["bytes"])))
    scale = min(image.height / size[0], image.width / size[1])
    file = io.BytesIO()
    resize_image(image, (round(size[0] * scale), round(size[1] * scale))).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def main(args: argparse.Namespace) -> None:
    whole_file = args.output_file.with_stem(f"{args.output_file.stem}_whole")
    for file in (args.output_file, whole_file):
        check_output_file("output_file", file)
    data = datasets.load_dataset("parquet", data_files=args.emoji_file, split="train")
    data = data.cast_column("image", datasets.Image(decode=False))
    train = data.filter(lambda row: row["split"] == "train" and not row["skin_tone"]).shard(args.every, 0)
    rows = [{**row, "image": cut(row["image"], size)} for row in train for size in args.aspect_ratio_buckets]
    cuts = datasets.Dataset.from_list(rows, features=data.features)
    whole = datasets.concatenate_datasets([train, data.filter(lambda row: row["split"] == "test")])
    for file, table in ((args.output_file, cuts), (whole_file, whole)):
        with replacing_file(file) as unfinished:
            table.cast_column("image", datasets.Image()).to_parquet(unfinished)
        print(f"{file}: {len(table)} rows")


if __name__ == "__main__":
    main(parse_args())
