#!/usr/bin/env python
"""Codes a position: held-out likelihood against training time, for patches of 1 x 1, 2 x 2 and 4 x 4 codes.

    python -m benchmarks.patches --seconds 3600

Text to pictures of 64 px, which are 16 x 16 codes of the 32 px starter's tokenizer and so 256, 64 or 16 positions.
Every setting trains the same blocks with the same batches for the same time, by default short: what it shows then is
that the benchmark runs. Time is the process's own on the CPU, evaluation apart, so that a shared machine doesn't
count; compare runs of one number of threads (``OMP_NUM_THREADS``).

At equal intervals the averaged weights' negative ELBO of the test split's pictures is measured, in bits a code, with
the same masks for all. Writes ``patches.json``, and the training's state, from which a killed run goes on, also with
more ``--seconds``.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.codes import INDEX_FILE, CodeDataset
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.utils.arguments import argument_parser, output_path, positive_integer, positive_number

from .masked_training import MaskedTraining, add_arguments, bits_per_code


TASK = Task(("text",), ("image",))
SIZE = {"num_layers": 8, "num_attention_heads": 4, "attention_head_dim": 64}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Compare numbers of codes a position.")
    parser.add_argument("--resolution", type=positive_integer, default=64)
    parser.add_argument(
        "--patches", type=positive_integer, nargs="+", default=[1, 2, 4], help="Sides of the patches, in codes."
    )
    parser.add_argument("--seconds", type=positive_number, default=120, help="CPU time that each trains for.")
    parser.add_argument("--evaluations", type=positive_integer, default=4, help="In these seconds.")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/patches"))
    add_arguments(parser, train_batch_size=32, learning_rate=1e-3, **SIZE)
    return parser.parse_args(input_args)


def load_codes(args: argparse.Namespace, split: str) -> CodeDataset:
    """A split's pictures and captions as the pipeline's codes, encoded once."""
    folder = args.output_dir / f"codes-{args.resolution}-{split}"
    if not (folder / INDEX_FILE).is_file():
        pipe = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
        data = load_training_dataset(
            dataset_name=args.dataset_name, split=split, image_column="image", columns=["text"]
        )
        encode_dataset(
            data,
            folder,
            resolution=args.resolution,
            image_vq=pipe.image_vq,
            text_vq=pipe.text_vq,
            tokenizer=pipe.tokenizer,
            image_column="image",
            caption_column="text",
        )
    return CodeDataset(folder)


def train(side: int, train_codes: CodeDataset, test_codes: CodeDataset, args: argparse.Namespace) -> list[dict]:
    """The curve of one patch: a point an evaluation."""
    segments = {name: dict(train_codes.segments[name]) for name in TASK.segments}
    segments["image"]["patch"] = [side, side]
    training = MaskedTraining(args, segments=segments, tasks=[str(TASK)])
    file = args.output_dir / f"patch-{side}.pt"
    step, seconds, curve = 0, 0.0, []
    if file.is_file():
        state = torch.load(file, weights_only=True)
        step, seconds, curve = state["step"], state["seconds"], state["curve"]
        training.load_state_dict(state)
    interval = args.seconds / args.evaluations
    while seconds < args.seconds:
        due = min((math.floor(seconds / interval) + 1) * interval, args.seconds)
        while seconds < due:
            start, step = time.process_time(), step + 1
            loss = training.step(step, train_codes, TASK)
            seconds += time.process_time() - start
        with training.evaluated():
            bits = bits_per_code(training.model, test_codes, TASK, args.num_test_samples, args.num_masks)
        curve.append({"seconds": seconds, "steps": step, "bits_per_code": sum(bits) / len(bits)})
        print(json.dumps({"patch": side, "loss": loss, **curve[-1]}), flush=True)
        state = {**training.state_dict(), "step": step, "seconds": seconds, "curve": curve}
        torch.save(state, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return curve


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train_codes, test_codes = (load_codes(args, split) for split in ("train", "test"))
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "patches")}
    results = {"settings": settings, "threads": torch.get_num_threads(), "curves": {}}
    for side in args.patches:
        results["curves"][f"{side}x{side}"] = train(side, train_codes, test_codes, args)
        (args.output_dir / "patches.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
