#!/usr/bin/env python
"""What reading pictures costs beside what is done with them.

    python -m benchmarks.data_path --train_data_dir photographs --dataloader_num_workers 2

Trains a tokenizer on random crops at 256 px as ``train_image_vq.py`` does, pictures decoded by as many workers, and
tells the share of the time in which a step waits for its pictures. Then encodes the same pictures as
``encode_dataset.py`` does, and the same ones already decoded by the tokenizer alone: the ratio of the two is what
reading adds. Wall time; nothing else should run.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import concatenate_datasets

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.image_dataset import ImageDataset, load_batches
from diffusers_vqdit.training.row_order import shuffled_batches
from diffusers_vqdit.utils.arguments import argument_parser, model_name, non_negative_integer, positive_integer
from diffusers_vqdit.utils.decoding import to_pixels


WARMUP = 3  # steps that aren't timed: workers start, and have their first batches ready


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Measure the share of training and encoding that reading pictures takes.")
    parser.add_argument("--train_data_dir", type=Path, required=True, help="Folder of photographs.")
    parser.add_argument("--image_vq", type=model_name, default="model_cards/image-vq-photographs")
    parser.add_argument("--resolution", type=positive_integer, default=256)
    parser.add_argument("--train_batch_size", type=positive_integer, default=2)
    parser.add_argument("--max_train_steps", type=positive_integer, default=20)
    parser.add_argument("--num_encoded", type=positive_integer, default=256, help="Pictures, again and again.")
    parser.add_argument("--dataloader_num_workers", type=non_negative_integer, default=2)
    return parser.parse_args(input_args)


def training(args: argparse.Namespace, model: ImageVQModel, images: ImageDataset) -> tuple[float, float]:
    """Seconds a step, and those of it that it waits for its pictures."""
    size = args.train_batch_size
    rows = shuffled_batches(len(images), size, seed=0)
    batches = load_batches(images, rows, stride=size, num_workers=args.dataloader_num_workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    waited = started = 0.0
    for step in range(WARMUP + args.max_train_steps):
        if step == WARMUP:
            waited, started = 0.0, time.perf_counter()
        before = time.perf_counter()
        pictures = next(batches)
        waited += time.perf_counter() - before
        sample = to_pixels(pictures)
        output = model(sample)
        (F.mse_loss(output.sample, sample) + output.commit_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / args.max_train_steps, waited / args.max_train_steps


@torch.no_grad()
def encoding(args: argparse.Namespace, model: ImageVQModel) -> tuple[float, float]:
    """Seconds a picture, read and encoded, and encoded alone."""
    dataset = load_training_dataset(train_data_dir=str(args.train_data_dir), image_column="image")
    copies = -(-args.num_encoded // len(dataset))
    dataset = concatenate_datasets([dataset] * copies).select(range(args.num_encoded))
    pictures, _ = decode_images(dataset, "image", args.resolution)
    options = {"image_column": "image", "image_vq": model, "resolution": args.resolution}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        encode_dataset(dataset, folder, dataloader_num_workers=args.dataloader_num_workers, **options)
        whole = time.perf_counter() - started
    started = time.perf_counter()
    for part in pictures.split(64):
        model.encode_codes(to_pixels(part))
    return whole / len(pictures), (time.perf_counter() - started) / len(pictures)


def main(args: argparse.Namespace) -> None:
    model = ImageVQModel.from_pretrained(args.image_vq, torch_dtype=torch.float32)
    dataset = load_training_dataset(train_data_dir=str(args.train_data_dir), image_column="image")
    images = ImageDataset(dataset, "image", args.resolution, random_crop=True, random_flip=True)
    step, waited = training(args, model.train(), images)
    print(f"a step of {args.train_batch_size} pictures takes {step:.2f} s, {waited / step:.1%} of it waiting for them")
    whole, alone = encoding(args, model.eval())
    print(
        f"a picture is read and encoded in {1e3 * whole:.1f} ms, encoded alone in {1e3 * alone:.1f} ms: "
        f"{whole / alone:.2f} times"
    )


if __name__ == "__main__":
    main(parse_args())
