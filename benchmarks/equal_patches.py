#!/usr/bin/env python
"""Whether patches that look the same get the same code, which new combinations of known things need.

    python -m benchmarks.equal_patches --image_vq model_cards/image-vq-emoji-64 model_cards/vqdit-emoji-32 \
        --resolution 64

A patch is what a code covers and what the codes around it cover, three times three; codes at the border of a picture
are left out. Of the patches that occur more than once, equal to the pixel, it prints the share that has the commonest
code among its equals. Plain white ones are counted apart: how many there are, and how many codes they have.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import torch

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training.data import decoded_batches, load_training_dataset
from diffusers_vqdit.training.tokenizers import load_image_vq
from diffusers_vqdit.utils.arguments import argument_parser, positive_integer
from diffusers_vqdit.utils.decoding import to_pixels


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Count the codes of equal patches.")
    parser.add_argument("--image_vq", nargs="+", required=True, help="Tokenizers, or pipelines that have one.")
    parser.add_argument("--dataset_name", default="training/data/emoji.parquet")
    parser.add_argument("--split", default="test")
    parser.add_argument("--resolution", type=positive_integer, help="By default each tokenizer's sample_size.")
    parser.add_argument("--max_samples", type=positive_integer, default=100_000)
    return parser.parse_args(input_args)


@torch.no_grad()
def codes_of_patches(model: ImageVQModel, batches: Iterable[torch.Tensor]) -> dict[bytes, Counter[int]]:
    """How often each patch (C, 3f, 3f) of pictures (B, C, H, W) uint8 has which code, f the tokenizer's factor."""
    factor, found = model.downsample_factor, defaultdict(Counter)
    for pixels in batches:
        codes = model.encode_codes(to_pixels(pixels))[:, 1:-1, 1:-1]  # (B, h - 2, w - 2), whose neighbours are inside
        patches = pixels.unfold(2, 3 * factor, factor).unfold(3, 3 * factor, factor)  # (B, C, h - 2, w - 2, 3f, 3f)
        patches = patches.movedim(1, 3).flatten(0, 2).numpy()
        for patch, code in zip(patches, codes.flatten().tolist(), strict=True):
            found[np.ascontiguousarray(patch).tobytes()][code] += 1
    return found


def figures(found: dict[bytes, Counter[int]]) -> dict[str, float]:
    """Of patches that are there more than once and not white: how many, and the share that has its equals' commonest
    code; how many are white, and their codes."""
    white = {patch for patch in found if set(patch) == {255}}
    several = [codes for patch, codes in found.items() if codes.total() > 1 and patch not in white]
    count, of_white = sum(codes.total() for codes in several), Counter()
    for patch in white:
        of_white += found[patch]
    alike = sum(max(codes.values()) for codes in several) / count if count else float("nan")
    return {"patches": count, "alike": alike, "white": of_white.total(), "codes_of_white": len(of_white)}


def main(args: argparse.Namespace) -> None:
    data = load_training_dataset(
        dataset_name=args.dataset_name, split=args.split, image_column="image", max_samples=args.max_samples
    )
    print("| tokenizer | equal patches | with the commonest code | white patches | their codes |")
    print("|---|---:|---:|---:|---:|")
    for name in args.image_vq:
        model = load_image_vq(name).eval()
        size = args.resolution or model.config.sample_size
        if size < 3 * model.downsample_factor:
            raise ValueError(f"resolution={size} must be at least three of the {model.downsample_factor} of a code")
        batches = (pixels for pixels, _ in decoded_batches(data, "image", size))
        found = figures(codes_of_patches(model, batches))
        cells = [name, f"{found['patches']:,}", f"{found['alike']:.1%}", f"{found['white']:,}"]
        print(f"| {' | '.join(cells)} | {found['codes_of_white']} |", flush=True)


if __name__ == "__main__":
    main(parse_args())
