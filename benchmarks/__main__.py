#!/usr/bin/env python
"""Side by side with what a user would pick instead: all benchmarks of this folder that take turns, or some.

    python -m benchmarks
    python -m benchmarks nearest_code scheduler_step --rounds 9 --output_dir outputs/benchmarks

Prints Markdown tables and writes them and their numbers to ``benchmarks.md`` and ``benchmarks.json``. Ratios are of
CPU time on CPUs, of wall time on GPUs. Takes about ten minutes on one idle CPU core.
"""

import argparse
import importlib
import json
import platform
from pathlib import Path

import diffusers
import torch

from diffusers_vqdit.utils.arguments import argument_parser, output_path, positive_integer, torch_device

from .common import table


BENCHMARKS = (
    "nearest_code",
    "scheduler_step",
    "vq_forward",
    "dit_forward",
    "training_step",
    "text_to_image",
    "prefix",
    "gallery",
)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Run benchmarks.", prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", help=f"Of {', '.join(BENCHMARKS)}; by default all.")
    parser.add_argument("--rounds", type=positive_integer, default=7)
    parser.add_argument("--threads", type=positive_integer, help="Of PyTorch on CPUs.")
    parser.add_argument("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/benchmarks"))
    args = parser.parse_args(input_args)
    if unknown := sorted(set(args.names) - set(BENCHMARKS)):
        parser.error(f"unknown {unknown}; there are {', '.join(BENCHMARKS)}")
    return args


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor()
    heading = (
        f"{machine or platform.machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
        f"diffusers {diffusers.__version__}"
    )
    print(heading, end="\n\n")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found, tables = {}, [heading + "\n"]
    for name in args.names or BENCHMARKS:
        torch.manual_seed(0)
        found[name] = []
        with torch.no_grad():
            for case in importlib.import_module(f".{name}", __package__).measure(args.rounds, args.device):
                found[name].append(case)
                tables.append(table(case))
                print(tables[-1], flush=True)
        (args.output_dir / "benchmarks.json").write_text(json.dumps({"machine": heading, **found}, indent=1))
        (args.output_dir / "benchmarks.md").write_text("\n".join(tables))


if __name__ == "__main__":
    main(parse_args())
