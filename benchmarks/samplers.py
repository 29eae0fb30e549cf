#!/usr/bin/env python
"""Compare the samplers of `MaskedDiffusionScheduler`: quality against the number of model calls.

    pip install matplotlib
    python benchmarks/samplers.py --pretrained_model_name_or_path model_cards/vqdit-emoji-32

Writes ``samplers.json`` into the output folder, and ``samplers.png`` where matplotlib is installed, and prints a
table. Takes about an hour on two idle CPU cores, extrapolated from a small run; ``--samplers`` and
``--guidance_schedules`` choose a part.

* Quality: share of samples whose nearest picture of the whole set, by pixel distance between the sample and the
  decoded VQ codes of each picture, is the one that the training caption names, as in ``training/evaluate.py``. What is
  not compared, such as the temperature, is the checkpoint's own. The share says nothing of diversity: a sampler that
  always draws the same right picture does well.
* Calls: steps at which a sample needs the model, with both halves of guidance counted as one, averaged over samples.
  So many a sample takes alone; a batch takes as many as the row that takes most.
* ``"entropy_bound"`` and ``"threshold"`` take as many steps as they need (``num_inference_steps="auto"``).
* Time: CPU time of the process, decoding and all, as a share of the first setting's.
* Guidance: ``"linear"`` at 2 g - 1 has the mean over the codes that ``"constant"`` has at g.

To expect: ``"ancestral"`` with 1,000 steps takes about 61 calls, for there are 64 codes and few share a step. The bars
are standard errors: differences of less than two of them mean nothing. The ``samplers.json`` and ``.png`` beside this
file are the 32 px starter's, with ``--num_samples 64 --num_inference_steps 4 8 16 32`` (half an hour of one core): on
captions of training all samplers draw the picture named in 86 to 97 %, within their errors of one another, in four
calls as well as in 61; ``"entropy_bound"`` does so in one to three.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import torch

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline
from diffusers_vqdit.training import evaluation
from diffusers_vqdit.training.evaluation_images import drawn_right
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    non_negative_number,
    number,
    output_path,
    positive_integer,
    random_seed,
    share,
    torch_device,
)


ROOT = Path(__file__).resolve().parent.parent
SAMPLERS = ["ancestral", "confidence", "halton", "entropy_bound", "threshold"]


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Compare the samplers of a VQDiT pipeline on the emoji dataset.")
    parser.add_argument(
        "--pretrained_model_name_or_path", type=model_name, default=str(ROOT / "model_cards/vqdit-emoji-32")
    )
    parser.add_argument("--dataset_name", default=str(ROOT / "training/data/emoji.parquet"))
    # The columns of the dataset, as EmojiData.load reads them
    parser.set_defaults(image_column="image", caption_columns={"text": "English"}, label_column="label")
    parser.add_argument("--num_samples", type=positive_integer, default=256, help="Captions, one sample each.")
    parser.add_argument("--batch_size", type=positive_integer, default=32)
    parser.add_argument(
        "--captions", choices=["training", "held-out"], default="training", help="Or held-out compositions."
    )
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument(
        "--guidance_schedules", nargs="+", choices=["constant", "linear"], default=["constant", "linear"]
    )
    parser.add_argument("--num_inference_steps", type=positive_integer, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument(
        "--event_driven_steps", type=positive_integer, default=1000, help="One more setting of ancestral."
    )
    parser.add_argument(
        "--entropy_bounds", type=non_negative_number, nargs="+", default=[0.1, 0.3, 1.0, 3.0, 10.0], help="In nats."
    )
    parser.add_argument("--thresholds", type=share, nargs="+", default=[0.3, 0.5, 0.7, 0.9], help="Probabilities.")
    parser.add_argument("--remask", type=share, default=0.05, help="eta of ancestral with remasking.")
    parser.add_argument("--guidance_scale", type=number(), default=3.0)
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/samplers"))
    return parser.parse_args(input_args)


class CountingScheduler(MaskedDiffusionScheduler):
    """Counts the rows that need the model, over all steps and all copies: each call of a pipeline makes its own."""

    rows = 0

    def next_event(self, timestep, masked, previous=None, *, generator=None):
        event = super().next_event(timestep, masked, previous, generator=generator)
        if event.needs_model:
            needed = masked if event.revealed is None else event.revealed
            CountingScheduler.rows += len(masked) if self.config.remask else int(needed.any(1).sum())
        return event


def settings(args: argparse.Namespace) -> list[tuple[str, dict, int | str]]:
    """(name, options of the scheduler, steps) of all that is compared."""
    steps = args.num_inference_steps
    compared = [(name, {"sampler": name}, count) for name in ("ancestral", "confidence", "halton") for count in steps]
    compared.append(("ancestral", {"sampler": "ancestral"}, args.event_driven_steps))
    for name, values in (("entropy_bound", args.entropy_bounds), ("threshold", args.thresholds)):
        compared += [(name, {"sampler": name, name: value}, "auto") for value in values]
    remasking = {"sampler": "ancestral", "remask": args.remask}
    compared += [(f"ancestral, remask {args.remask:g}", remasking, count) for count in steps]
    return [one for one in compared if one[1]["sampler"] in args.samplers]


def compare(pipeline: VQDiTPipeline, args: argparse.Namespace) -> list[dict]:
    side = pipeline.transformer.config.segments[evaluation.Roles.of(pipeline).image]["shape"][0]
    resolution = side * pipeline.image_vq.downsample_factor
    data = evaluation.EmojiData.load(pipeline.image_vq, resolution, args, resize_mode=pipeline.config.resize_mode)
    rows = data.train if args.captions == "training" else data.composition
    captions = data.texts(rows)

    results = []
    config = pipeline.scheduler.config
    for schedule in args.guidance_schedules:
        scale = args.guidance_scale if schedule == "constant" else 2 * args.guidance_scale - 1
        for name, options, steps in settings(args):
            pipeline.scheduler = CountingScheduler.from_config(config, guidance_schedule=schedule, **options)
            drawing = argparse.Namespace(
                guidance_scale=scale, num_inference_steps=steps, batch_size=args.batch_size, seed=args.seed
            )
            CountingScheduler.rows, start = 0, time.process_time()
            hits = drawn_right(pipeline, captions, rows, data, drawing)
            results.append(
                {
                    "name": name,
                    "options": options,
                    "num_inference_steps": steps,
                    "guidance_schedule": schedule,
                    "guidance_scale": scale,
                    "calls": CountingScheduler.rows / len(rows),
                    "share": evaluation.share(hits),
                    "cpu_seconds": time.process_time() - start,
                }
            )
            print(json.dumps(results[-1]), flush=True)
    return results


def table(results: list[dict]) -> str:
    lines = ["| sampler | steps | guidance | calls a sample | CPU time | right |", "|---|---|---|---|---|---|"]
    for one in results:
        value = one["options"].get(one["options"]["sampler"])
        share, name = one["share"], one["name"] if value is None else f"{one['name']} {value:g}"
        lines.append(
            f"| {name} | {one['num_inference_steps']} | {one['guidance_schedule']}, {one['guidance_scale']:g} | "
            f"{one['calls']:.2f} | {one['cpu_seconds'] / results[0]['cpu_seconds']:.2f} | "
            f"{100 * share['value']:.1f} ± {100 * share['standard_error']:.1f} % |"
        )
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    schedules = list(dict.fromkeys(one["guidance_schedule"] for one in results))
    names = list(dict.fromkeys(one["name"] for one in results))
    colors = [
        "#0072B2",
        "#D55E00",
        "#009E73",
        "#CC79A7",
        "#E69F00",
        "#56B4E9",
    ]  # told apart by colour-blind readers too
    figure, axes = plt.subplots(1, len(schedules), figsize=(11, 4.6), sharey=True, squeeze=False)
    for axis, schedule in zip(axes[0], schedules, strict=True):
        part = [one for one in results if one["guidance_schedule"] == schedule]
        for name, color, marker in zip(names, colors, "osD^vP", strict=True):
            line = sorted((one for one in part if one["name"] == name), key=lambda one: one["calls"])
            axis.errorbar(
                [one["calls"] for one in line],
                [100 * one["share"]["value"] for one in line],
                yerr=[100 * one["share"]["standard_error"] for one in line],
                label=name,
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.6,
                elinewidth=0.8,
                capsize=2,
            )
        ticks = [2**power for power in range(8)]
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlim(0.9 * min(one["calls"] for one in results), 1.1 * max(one["calls"] for one in results))
        axis.set_xlabel("model calls a sample")
        axis.set_title(f"guidance: {schedule}, scale {part[0]['guidance_scale']:g}", fontsize=11)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("nearest picture is the one named, %")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, -1].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(args: argparse.Namespace) -> None:
    pipeline = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    results = compare(pipeline, args)
    print(table(results))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "samplers.json").write_text(json.dumps(results, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        plot(results, args.output_dir / "samplers.png")


if __name__ == "__main__":
    main(parse_args())
