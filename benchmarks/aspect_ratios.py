#!/usr/bin/env python
"""Sizes not trained on: held-out likelihood with added positions, scaled or centered, and rotary ones beside them.

    python -m benchmarks.aspect_ratios --max_train_steps 3000

Text to pictures of three aspect ratios, in the codes of the 32 px starter's tokenizer: each emoji of 64 px is cut to a
square, a tall and a wide picture. At each evaluation the averaged weights' negative ELBO of the test split's pictures
is measured at each of ``--test_sizes``, in bits a code, with the same masks for all of a size. All settings train on
the same batches. Writes a JSON file for each kind of positions, and its pipeline.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import torch

from diffusers_vqdit import VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.codes import INDEX_FILE, CodeDataset
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.row_order import bucket_batches, shuffled_batches
from diffusers_vqdit.training.segment_columns import bucket_sizes
from diffusers_vqdit.utils.arguments import argument_parser, output_path, positive_integer

from .cut_pictures import cut
from .masked_training import MaskedTraining, add_arguments, bits_per_code


TASKS = [Task(("text",), ("image",)), Task((), ("image",))]  # the second one batch in five
# Added ones, each axis scaled by itself; by one scale for both, as pictures' codes ask for; and rotary beside these.
POSITIONS = ("scaled", "centered", "rotary")
SIZE = {"num_layers": 3, "num_attention_heads": 3, "attention_head_dim": 32}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Compare positions at sizes that were not trained on.")
    parser.add_argument("--positions", choices=POSITIONS, nargs="+", default=POSITIONS)
    parser.add_argument("--aspect_ratio_buckets", type=bucket_sizes, default="32,32;40,24;24,40")
    parser.add_argument("--test_sizes", type=bucket_sizes, default="32,32;40,24;24,40;36,28;28,36;48,20;20,48")
    parser.add_argument("--max_train_steps", type=positive_integer, default=100)
    parser.add_argument("--evaluation_steps", type=positive_integer, default=500)
    parser.add_argument("--max_train_samples", type=positive_integer, default=100_000)
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/aspect_ratios"))
    add_arguments(parser, train_batch_size=16, learning_rate=2e-3, **SIZE)
    return parser.parse_args(input_args)


def load_codes(
    args: argparse.Namespace, pipe: VQDiTPipeline, split: str, cuts: list[list[int]], buckets: list[list[int]]
) -> CodeDataset:
    """A split's pictures, each cut to all of `cuts`, and captions as codes in `buckets`, encoded once."""
    name = "-".join(f"{height}x{width}" for height, width in buckets)
    folder = args.output_dir / f"codes-{split}-{name}"
    if not (folder / INDEX_FILE).is_file():
        data = load_training_dataset(
            dataset_name=args.dataset_name,
            split=split,
            image_column="image",
            columns=["text"],
            max_samples=args.max_train_samples if split == "train" else args.num_test_samples,
        )
        rows = [
            (cut(picture, size), text)
            for picture, text in zip(data["image"], data["text"], strict=True)
            for size in cuts
        ]
        data = datasets.Dataset.from_dict({"image": [row[0] for row in rows], "text": [row[1] for row in rows]})
        encode_dataset(
            data.cast_column("image", datasets.Image(decode=False)),
            folder,
            aspect_ratio_buckets=buckets,
            image_vq=pipe.image_vq,
            text_vq=pipe.text_vq,
            tokenizer=pipe.tokenizer,
            image_column="image",
            caption_column="text",
        )
    return CodeDataset(folder)


def with_positions(segments: dict[str, dict], positions: str) -> dict[str, dict]:
    """The segments with scaled or centered positions of grids, whatever the folder of codes says: one that an older
    version wrote says nothing."""
    own = {"centered_positions": positions != "scaled"}
    return {name: {**segment, **(own if len(segment["shape"]) > 1 else {})} for name, segment in segments.items()}


def train(positions: str, codes: CodeDataset, tests: dict[str, CodeDataset], args: argparse.Namespace) -> None:
    """Train one kind of positions, and keep its figures and its pipeline at each evaluation."""
    training = MaskedTraining(
        args,
        segments=with_positions(codes.segments, positions),
        tasks=[str(task) for task in TASKS],
        use_rotary_positional_embeddings=positions == "rotary",
    )
    curve, start = [], time.process_time()
    if codes.buckets is not None:
        batches = bucket_batches(codes.buckets, args.train_batch_size, seed=args.seed)
    else:
        batches = shuffled_batches(len(codes), args.train_batch_size, seed=args.seed)
    for step in range(1, args.max_train_steps + 1):
        loss = training.step(step, codes, TASKS[step % 5 == 0], next(batches))
        if step % args.evaluation_steps and step < args.max_train_steps:
            continue
        with training.evaluated():
            sizes = (args.num_test_samples, args.num_masks)
            bits = {name: bits_per_code(training.model, test, TASKS[0], *sizes) for name, test in tests.items()}
            curve.append({"steps": step, "seconds": time.process_time() - start, "bits_per_code": bits})
            means = {name: round(sum(values) / len(values), 3) for name, values in bits.items()}
            print(json.dumps({"positions": positions, "loss": loss, "steps": step, **means}), flush=True)
            save(positions, training.model, curve, codes, args)


def save(
    positions: str, model: VQDiTTransformer2DModel, curve: list[dict], codes: CodeDataset, args: argparse.Namespace
) -> None:
    """The pipeline and its figures so far."""
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "positions")}
    results = {"settings": settings, "threads": torch.get_num_threads(), "curve": curve}
    (args.output_dir / f"{positions}.json").write_text(json.dumps(results, indent=2) + "\n")
    pipe = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
    parts = {name: getattr(pipe, name) for name in ("scheduler", "image_vq", "text_vq", "tokenizer")}
    VQDiTPipeline(model, **parts, segments=codes.entries).save_pretrained(args.output_dir / positions)


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
    codes = load_codes(args, pipe, "train", args.aspect_ratio_buckets, args.aspect_ratio_buckets)
    tests = {f"{size[0]}x{size[1]}": load_codes(args, pipe, "test", [size], [size]) for size in args.test_sizes}
    for positions in args.positions:
        train(positions, codes, tests, args)


if __name__ == "__main__":
    main(parse_args())
