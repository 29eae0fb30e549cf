#!/usr/bin/env python
"""One forward pass of a DiT: `VQDiTTransformer2DModel` beside diffusers' `DiTTransformer2DModel`, with equal weights.

    python benchmarks/dit_forward.py

Ours computes the conditioning of time and label once where the blocks' weights for it are equal, as in all checkpoints
that come from the original DiT; stock DiT computes it in every block. Both take turns, and the median of the ratios
is printed, with the largest difference of their outputs. A sampler calls with a batch of two for each picture, for
guidance.
"""

import argparse
import statistics
import time

import torch
from diffusers import DiTTransformer2DModel

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.utils.arguments import argument_parser, positive_integer


# Peebles & Xie 2023, table 1, for latents of 32 x 32; patches of 2.
SIZES = {"DiT-S/2": (12, 6), "DiT-B/2": (12, 12), "DiT-L/2": (24, 16), "DiT-XL/2": (28, 16)}


def parse_args() -> argparse.Namespace:
    parser = argument_parser("Time a forward pass of both DiT classes.")
    parser.add_argument("--size", choices=list(SIZES), default="DiT-S/2")
    parser.add_argument("--batch_sizes", type=positive_integer, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=positive_integer, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def seconds(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    start = time.perf_counter()
    model(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    num_layers, num_heads = SIZES[args.size]
    ours = VQDiTTransformer2DModel(
        num_layers=num_layers,
        num_attention_heads=num_heads,
        attention_head_dim=72 if args.size == "DiT-XL/2" else 64,
        in_channels=4,
        out_channels=8,
        sample_size=32,
        patch_size=2,
    )
    ours.share_embedder().eval().to(args.device)
    for parameter in ours.parameters():  # a new DiT gives zeros
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    config = {name: ours.config[name] for name in DiTTransformer2DModel().config if not name.startswith("_")}
    stock = DiTTransformer2DModel.from_config(config).eval().to(args.device)
    stock.load_state_dict(ours.state_dict())
    for batch_size in args.batch_sizes:
        inputs = (
            torch.randn(batch_size, 4, 32, 32, device=args.device),
            torch.randint(1000, (batch_size,), device=args.device),
            torch.randint(1000, (batch_size,), device=args.device),
        )
        difference = (ours(*inputs).sample - stock(*inputs).sample).abs().max()
        ratios = [seconds(stock, inputs) / seconds(ours, inputs) for _ in range(args.rounds)]
        print(
            f"{args.size}, batch {batch_size}: {statistics.median(ratios):.2f} times as fast as diffusers "
            f"(from {min(ratios):.2f} to {max(ratios):.2f}); largest difference {difference:.1e}"
        )


if __name__ == "__main__":
    main(parse_args())
