#!/usr/bin/env python
"""Where the time goes on the two hot paths: drawing with the 32 px starter, and a step of training it.

    python -m benchmarks.profiles

Prints a table of each by PyTorch's profiler: the share of the time that each operator takes itself, and its calls. The
first is `VQDiTPipeline`'s text->image with 16 guided steps, batch 1, decoding included; the second a micro-batch of 32
captions: forward, backward, clipping and AdamW.
"""

import argparse
from collections.abc import Callable

import torch
from torch.profiler import profile

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.masked_loss import masked_diffusion_loss
from diffusers_vqdit.utils.arguments import argument_parser, model_name, positive_integer


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Profile drawing and training.")
    parser.add_argument("--pretrained_model_name_or_path", type=model_name, default="model_cards/vqdit-emoji-32")
    parser.add_argument("--train_batch_size", type=positive_integer, default=32)
    parser.add_argument("--rounds", type=positive_integer, default=3)
    parser.add_argument("--rows", type=positive_integer, default=12, help="Of each table.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(input_args)


def table(title: str, function: Callable[[], object], args: argparse.Namespace) -> str:
    function()
    with profile() as profiler:
        for _ in range(args.rounds):
            function()
    of_device = args.device.startswith("cuda")
    times = {
        one.key: (one.self_device_time_total if of_device else one.self_cpu_time_total, one.count)
        for one in profiler.key_averages()
    }
    total = sum(time for time, _ in times.values())
    lines = [f"**{title}**", "", "| operator | share of the time | calls |", "|---|---|---|"]
    for name, (time, count) in sorted(times.items(), key=lambda item: -item[1][0])[: args.rows]:
        lines.append(f"| `{name}` | {100 * time / total:.1f} % | {count / args.rounds:g} |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    pipe = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    print(table("text->image, 16 guided steps, batch 1", lambda: pipe("a red apple", num_inference_steps=16), args))

    model, scheduler = pipe.transformer.train(), pipe.scheduler
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows = {
        name: torch.randint(one["vocab_size"], (args.train_batch_size, *one["shape"]), device=args.device)
        for name, one in model.config.segments.items()
        if name in ("text", "image")
    }

    def step() -> None:
        given, generated = {"text": rows["text"]}, {"image": rows["image"]}
        masked_diffusion_loss(model, scheduler, given, generated).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    print(table(f"training step, text->image, batch {args.train_batch_size}", step, args))


if __name__ == "__main__":
    main(parse_args())
