#!/usr/bin/env python
"""Tokens a position of a text: a transformer's cost and its held-out likelihood over several text tokenizers' codes.

    python -m benchmarks.text_positions --text_vq model_cards/vqdit-emoji-32 outputs/text_rvq_2 outputs/text_rvq_4 \
        --max_train_steps 1500

A tokenizer of residual codes (``train_text_vq.py --quantizer_type rvq --downsample_factor 2 --num_quantizers 2``) puts
several tokens into one position. Each tokenizer gets a new transformer for pictures and captions, both ways; all are
trained on the same rows, tasks and times. Printed and written into ``text_positions.json`` are the positions of a
caption, the CPU time of a step beside the first tokenizer's (steps take turns, so that a shared machine slows all),
and the negative ELBO of the test split's first samples: of pictures in bits a code, of captions in bits in all, since
their codes differ; with standard errors over samples.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.models.segment_layers import segment_patch
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.codes import INDEX_FILE, CodeDataset
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.tokenizers import load_text_vq
from diffusers_vqdit.utils.arguments import argument_parser, model_name, output_path, positive_integer

from .masked_training import MaskedTraining, add_arguments, bits_per_code


TASKS = [Task(("text",), ("image",)), Task(("image",), ("text",))]  # in turn
SIZE = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 64}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Compare text tokenizers of several tokens a position.")
    parser.add_argument("--text_vq", type=model_name, nargs="+", required=True, help="Folders or Hub ids.")
    parser.add_argument("--max_train_steps", type=positive_integer, default=20)
    parser.add_argument("--max_train_samples", type=positive_integer, default=100_000)
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/text_positions"))
    add_arguments(parser, train_batch_size=32, learning_rate=1e-3, **SIZE)
    return parser.parse_args(input_args)


def load_codes(args: argparse.Namespace, pipe: VQDiTPipeline, number: int, split: str) -> CodeDataset:
    """A split's pictures and captions, these by the numbered tokenizer, encoded once."""
    folder = args.output_dir / f"codes-{number}-{split}"
    if not (folder / INDEX_FILE).is_file():
        text_vq, tokenizer = load_text_vq(args.text_vq[number])
        most = args.max_train_samples if split == "train" else args.num_test_samples
        data = load_training_dataset(
            dataset_name=args.dataset_name, split=split, image_column="image", columns=["text"], max_samples=most
        )
        encode_dataset(
            data,
            folder,
            image_vq=pipe.image_vq,
            text_vq=text_vq.eval(),
            tokenizer=tokenizer,
            image_column="image",
            caption_column="text",
        )
    return CodeDataset(folder)


def with_error(values: list[float]) -> list[float]:
    """Mean and standard error."""
    return [statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5]


def main(args: argparse.Namespace) -> list[dict]:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
    train, test = (
        [load_codes(args, pipe, number, split) for number in range(len(args.text_vq))] for split in ("train", "test")
    )
    trainings = [MaskedTraining(args, segments=codes.segments, tasks=[str(task) for task in TASKS]) for codes in train]
    seconds = [0.0] * len(trainings)
    for step in range(1, args.max_train_steps + 1):
        losses = []
        for number, training in enumerate(trainings):
            start = time.process_time()
            losses.append(training.step(step, train[number], TASKS[step % 2]))
            seconds[number] += time.process_time() - start
        if step % 50 == 0:
            print(json.dumps({"step": step, "task": str(TASKS[step % 2]), "losses": losses}), flush=True)
    found = []
    for number, training in enumerate(trainings):
        shape = train[number].segments["text"]["shape"]
        patch = segment_patch(train[number].segments, "text")
        codes = [side // step for side, step in zip(shape, patch, strict=True)]
        row = {"text_vq": args.text_vq[number], "positions": codes[0], "time": seconds[number] / seconds[0]}
        with training.evaluated():
            for task in TASKS:
                bits = bits_per_code(training.model, test[number], task, args.num_test_samples, args.num_masks)
                total = test[number].codes[task.generated[0]][0].numel()
                row[str(task)] = with_error([one * (total if task.generated == ("text",) else 1) for one in bits])
        found.append(row)
        print(json.dumps(row), flush=True)
    (args.output_dir / "text_positions.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(parse_args())
