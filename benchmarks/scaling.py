#!/usr/bin/env python
"""What training a transformer of codes costs: operations and memory a sample, counted, and a step's time by a model.

    python -m benchmarks.scaling --check

Operations and saved activations are counted on tensors without values, so that any size is counted on any machine.
The time of a step on many GPUs follows from them by a model whose assumptions are arguments: a GPU's peak and the
share of it that is reached, and the bandwidth between GPUs of a node and between nodes. ``--check`` compares the
count with what this machine needs for a step: a CPU of the smallest model, beside its own matrix products; a GPU of
each, in bfloat16 by autocast and not compiled.
"""

import argparse
import time
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.utils.arguments import argument_parser, positive_integer, positive_number, share

from .common import COUNTED, ceilings, number, timed


# Peebles & Xie 2023, table 1: layers, heads, channels of a head.
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
TOKENS, VOCABULARY, CODES, FACTOR = 77, 8192, 16_384, 16  # of the text, the image tokenizer's codebook and its factor
GIB = 2**30
NODE = 8  # GPUs


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Count what training costs.")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--resolutions", nargs="+", type=positive_integer, default=[256, 512])
    parser.add_argument("--gpus", nargs="+", type=positive_integer, default=[1, 8, 64, 1024])
    parser.add_argument("--train_batch_size", type=positive_integer, default=32, help="Of each GPU.")
    parser.add_argument("--peak_teraflops", type=positive_number, default=989.0, help="Of a GPU, in bfloat16.")
    parser.add_argument("--utilization", type=share, default=0.4, help="Share of it reached.")
    parser.add_argument("--node_bandwidth", type=positive_number, default=400.0, help="GB/s of a GPU.")
    parser.add_argument("--network_bandwidth", type=positive_number, default=50.0, help="GB/s of a GPU.")
    parser.add_argument(
        "--check", action="store_true", help="Time steps on this machine: of the smallest model, or of all on a GPU."
    )
    return parser.parse_args(input_args)


@dataclass(frozen=True)
class Cost:
    """Of a model: its parameters, and a sample's operations (forward and backward) and saved activations in bytes."""

    parameters: int
    flops: float
    activations: int

    def memory(self, batch_size: int, shards: int = 1) -> float:
        """Bytes on a GPU: weights, gradients, AdamW's two moments and averages in float32, which FSDP shards, and the
        activations of a batch in bfloat16."""
        return 20 * self.parameters / shards + batch_size * self.activations


def text_to_image(size: str, resolution: int, codes_a_side: int, device: str = "meta") -> VQDiTTransformer2DModel:
    num_layers, num_heads, channels = SIZES[size]
    side = resolution // FACTOR
    segments = {
        "text": {"vocab_size": VOCABULARY, "shape": [TOKENS]},
        "image": {"vocab_size": CODES, "shape": [side, side], "patch": [codes_a_side] * 2},
    }
    with torch.device(device):
        return VQDiTTransformer2DModel(num_heads, channels, num_layers=num_layers, segments=segments)


def loss_of_all(model: VQDiTTransformer2DModel, batch_size: int) -> torch.Tensor:
    """The cross-entropy of all codes of a batch: on the average training takes that of half of them."""
    shapes = {name: (batch_size, *segment["shape"]) for name, segment in model.config.segments.items()}
    text, codes = (torch.zeros(shapes[name], dtype=torch.int64, device=model.device) for name in ("text", "image"))
    logits = model({"image": codes}, given={"text": text}, check_values=False).sample["image"]
    return F.cross_entropy(logits.flatten(0, -2), codes.flatten())


def cost(size: str, resolution: int, codes_a_side: int) -> Cost:
    model = text_to_image(size, resolution, codes_a_side).to(torch.bfloat16)
    own, saved = {parameter.untyped_storage()._cdata for parameter in model.parameters()}, {}
    positions = (resolution // FACTOR // codes_a_side) ** 2
    weights = {(TOKENS, TOKENS), (positions, TOKENS + positions), (TOKENS + positions, positions)}

    def pack(value: torch.Tensor) -> torch.Tensor:
        # Without attention's weights, which the kernel for tensors without values keeps and fused ones don't.
        if (storage := value.untyped_storage())._cdata not in own and tuple(value.shape[-2:]) not in weights:
            saved[storage._cdata] = storage  # kept, so that no other takes its place
        return value

    # As while a graph is traced: codes without values can't be looked at.
    tracing = patch.object(torch.compiler, "is_compiling", lambda: True)
    with tracing, torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            loss_of_all(model, 1).backward()
    activations = sum(storage.nbytes() for storage in saved.values())
    return Cost(sum(p.numel() for p in model.parameters()), float(counter.get_total_flops()), activations)


def step_seconds(one: Cost, gpus: int, args: argparse.Namespace) -> float:
    """A data-parallel step: compute, beside which gradients (float32) go around a ring; the longer of both counts."""
    compute = args.train_batch_size * one.flops / (1e12 * args.peak_teraflops * args.utilization)
    bandwidth = args.node_bandwidth if gpus <= NODE else args.network_bandwidth
    return max(compute, 2 * (gpus - 1) / gpus * 4 * one.parameters / (1e9 * bandwidth))


def tables(args: argparse.Namespace) -> str:
    batch = args.train_batch_size
    heads = ["model", "px", "codes a position", "parameters", "GFLOP a sample", "activations a sample"]
    heads += [
        f"GiB of a GPU, batch {batch}",
        f"sharded over {NODE}",
        *(f"samples/s (ms a step), {gpus:,} GPUs" for gpus in args.gpus),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for size in args.sizes:
        for resolution in args.resolutions:
            for codes_a_side in (1, 2):
                one = cost(size, resolution, codes_a_side)
                steps = [(gpus, step_seconds(one, gpus, args)) for gpus in args.gpus]
                speeds = [f"{gpus * batch / seconds:,.0f} ({1e3 * seconds:.0f})" for gpus, seconds in steps]
                cells = [size, resolution, codes_a_side**2, f"{one.parameters / 1e6:.0f} M", f"{one.flops / 1e9:.0f}"]
                cells += [
                    f"{one.activations / 2**20:.0f} MiB",
                    *(f"{one.memory(batch, n) / GIB:.1f}" for n in (1, NODE)),
                    *speeds,
                ]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def check() -> str:
    """A step of S at 256 px on this machine, batch 2, beside the count and a product of matrices."""
    model = text_to_image("S", 256, 1, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        loss_of_all(model, 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds = min(timed(step)[1] for _ in range(3)) / 1e3
    rate, counted = ceilings("cpu")["flops"], 2 * cost("S", 256, 1).flops
    return (
        f"S at 256 px, batch 2, float32, {torch.get_num_threads()} threads: {number(seconds)} s of CPU time for "
        f"{number(counted / 1e9)} GFLOP, {100 * counted / seconds / rate:.0f} % of the rate of a product of matrices"
    )


def check_gpu(size: str, args: argparse.Namespace) -> str:
    """Five steps at 256 px on a GPU, one code a position, after three that aren't counted."""
    model, batch = text_to_image(size, 256, 1, "cuda"), args.train_batch_size
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cuda", torch.bfloat16):
                loss = loss_of_all(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()

    steps(3)
    start = time.perf_counter()
    steps(5)
    seconds = (time.perf_counter() - start) / 5
    share = batch * cost(size, 256, 1).flops / seconds / (1e12 * args.peak_teraflops)
    return f"{size} at 256 px, batch {batch}, bfloat16: {1e3 * seconds:.1f} ms a step, {100 * share:.0f} % of the peak"


def main(args: argparse.Namespace) -> None:
    print(tables(args))
    if args.check and torch.cuda.is_available():
        for size in args.sizes:
            print(check_gpu(size, args))
    elif args.check:
        print(check())


if __name__ == "__main__":
    main(parse_args())
