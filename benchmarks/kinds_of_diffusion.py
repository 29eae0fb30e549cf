#!/usr/bin/env python
"""Masked diffusion over codes beside Gaussian diffusion and flow matching over latents: quality, steps, time.

    python benchmarks/kinds_of_diffusion.py \
        --checkpoints outputs/masked outputs/flow outputs/v_prediction --output_dir outputs/kinds

Checkpoints are pipelines of either class. A masked one is drawn with its own sampler; a latent one with its own
scheduler and then with the others that its objective has in diffusers. For every number of steps it measures:

* the share of samples whose nearest picture of the whole set is the one that the training caption names, judged as in
  ``training/evaluate.py``, with its standard error;
* the time of one picture, in batches, relative to the fastest row and step of the table.

Steps needed are the fewest whose share is not below the row's best by more than two standard errors of the
difference. Pictures of labels are drawn at the most steps, with the number of different nearest pictures among them;
those of held-out compositions with a checkpoint's own scheduler alone. Writes ``kinds_of_diffusion.json`` and
``.md``, and the first 32 pictures of each row to look at.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid

from diffusers_vqdit import VQDiTLatentPipeline
from diffusers_vqdit.models.vae_latents import downsample_factor
from diffusers_vqdit.training.evaluation import EmojiData, Roles, share
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    number,
    output_path,
    positive_integer,
    random_seed,
    torch_device,
)


ROOT = Path(__file__).resolve().parent.parent
CAPTIONS, COMPOSITIONS, LABELS = "text->image", "text->image, held-out compositions", "label->image"
DIFFUSION = {
    "DDPM": DDPMScheduler,
    "DDIM": DDIMScheduler,
    "DPM-Solver++ (2M)": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "Euler": EulerDiscreteScheduler,
}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Compare masked, Gaussian and flow-matching pipelines.")
    parser.add_argument(
        "--checkpoints", type=model_name, nargs="+", required=True, help="Pipelines: folders or Hub ids."
    )
    parser.add_argument("--dataset_name", default=str(ROOT / "training/data/emoji.parquet"))
    # The columns of the dataset, as EmojiData.load reads them
    parser.set_defaults(image_column="image", caption_columns={"text": "English"}, label_column="label")
    parser.add_argument(
        "--num_samples", type=positive_integer, default=128, help="Captions, one sample each, and as many labels."
    )
    parser.add_argument("--batch_size", type=positive_integer, default=64)
    parser.add_argument("--num_inference_steps", type=positive_integer, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--guidance_scale", type=number(), help="By default each pipeline's own.")
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/kinds_of_diffusion"))
    return parser.parse_args(input_args)


def schedulers(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Name -> scheduler, of all that fit the pipeline's objective, its own first."""
    config = pipeline.scheduler.config
    if not isinstance(pipeline, VQDiTLatentPipeline):
        return {f"masked, {config.sampler}": pipeline.scheduler}
    if hasattr(pipeline.scheduler, "scale_noise"):
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config.shift}
        euler = {
            name: FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=stochastic)
            for name, stochastic in (("flow-match Euler", False), ("flow-match Euler, stochastic", True))
        }
        own_first = sorted(
            euler, key=lambda name: euler[name].config.stochastic_sampling != config.get("stochastic_sampling", False)
        )
        return {
            **{name: euler[name] for name in own_first},
            "DPM-Solver++ (2M), flow": DPMSolverMultistepScheduler.from_config(config, **flow),
            "UniPC, flow": UniPCMultistepScheduler.from_config(config, **flow),
        }
    # A learned variance is for ancestral sampling; the others don't take it.
    fixed = {"variance_type": "fixed_small"} if config.get("variance_type", "").startswith("learned") else {}
    own_first = sorted(DIFFUSION, key=lambda name: DIFFUSION[name] is not type(pipeline.scheduler))
    return {
        name: DIFFUSION[name].from_config(config, **({} if DIFFUSION[name] is DDPMScheduler else fixed))
        for name in own_first
    }


def draw(
    pipeline: DiffusionPipeline, args: argparse.Namespace, steps: int, argument: str, values: list[str]
) -> tuple[torch.Tensor, float]:
    """Pictures in [0, 1] of prompts or labels, each with its own seed, and the seconds of one."""
    options = {"num_inference_steps": steps, "output_type": "pt"}
    if args.guidance_scale is not None:
        options["guidance_scale"] = args.guidance_scale
    generators = [torch.Generator().manual_seed(args.seed * 1_000_003 + i) for i in range(len(values))]
    parts, start = [], time.perf_counter()
    for first in range(0, len(values), args.batch_size):
        part = slice(first, first + args.batch_size)
        parts.append(pipeline(**{argument: values[part]}, generator=generators[part], **options).images)
    return torch.cat(parts), (time.perf_counter() - start) / len(values)


def measure(checkpoint: str, args: argparse.Namespace) -> list[dict]:
    pipeline = DiffusionPipeline.from_pretrained(checkpoint).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    latent = isinstance(pipeline, VQDiTLatentPipeline)
    if latent:
        image_vq, side = pipeline.vae, pipeline.transformer.config.sample_size
    else:
        image_vq, side = pipeline.image_vq, pipeline.transformer.config.segments[Roles.of(pipeline).image]["shape"][0]
    resize_mode = pipeline.config.resize_mode
    data = EmojiData.load(image_vq, side * downsample_factor(image_vq), args, resize_mode=resize_mode)
    name, results = Path(checkpoint).name, []
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    most = max(args.num_inference_steps)

    def record(task: str, scheduler: str, steps: int, argument: str, values: list[str], judge: Callable) -> None:
        pipeline.scheduler = fitting[scheduler]
        samples, seconds = draw(pipeline, args, steps, argument, values)
        row = {"checkpoint": name, "parameters": parameters, "scheduler": scheduler, "task": task, "steps": steps}
        different = len(set(data.nearest_rows(samples)))
        results.append({**row, "share": share(judge(samples)), "different": different, "seconds": seconds})
        print(json.dumps(results[-1]), flush=True)
        keep_grid(samples, args.output_dir / f"{name}-{scheduler}-{task}-{steps}.png".replace(" ", "-"))

    def shows(rows: list[int]) -> Callable:
        return lambda samples: data.nearest(samples, rows)

    def has_label(samples: torch.Tensor) -> list[bool]:
        found = data.labels(data.nearest_rows(samples))
        return [one == label for one, label in zip(found, labels, strict=True)]

    fitting = schedulers(pipeline)
    own = next(iter(fitting))
    names = list(pipeline.labels if latent else pipeline.config.labels)
    labels = [names[i % len(names)] for i in range(args.num_samples)]  # in turn, as in training/evaluate.py
    for scheduler in fitting:
        for steps in args.num_inference_steps:
            record(CAPTIONS, scheduler, steps, "prompt", data.texts(data.train), shows(data.train))
        record(LABELS, scheduler, most, "class_labels", labels, has_label)
    record(COMPOSITIONS, own, most, "prompt", data.texts(data.composition), shows(data.composition))
    return results


def keep_grid(samples: torch.Tensor, path: Path) -> None:
    """Save the first pictures, to be looked at."""
    pictures = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(samples[:32]))
    blank = [pictures[0].copy() for _ in range(-len(pictures) % 8)]
    pictures = [*pictures, *blank]
    make_image_grid(pictures, rows=len(pictures) // 8, cols=8).save(path)


def steps_needed(row: list[dict]) -> int:
    """The fewest steps whose share is not below the row's best by more than two standard errors of the difference."""
    best = max((one["share"] for one in row), key=lambda share: share["value"])

    def enough(share: dict) -> bool:
        error = math.hypot(best["standard_error"], share["standard_error"])
        return best["value"] - share["value"] <= 2 * error

    return min(one["steps"] for one in row if enough(one["share"]))


def as_table(results: list[dict]) -> str:
    """A row a checkpoint and scheduler: captions a column a number of steps, then labels; compositions below."""
    drawn = [one for one in results if one["task"] == CAPTIONS]
    columns = sorted({one["steps"] for one in drawn})
    fastest = min(one["seconds"] for one in drawn)
    head = ["checkpoint", "scheduler", *(f"{n} steps" for n in columns), "steps needed", "time of a picture then"]
    head += [f"labels, {columns[-1]} steps", "different pictures of them"]
    lines = [f"| {' | '.join(head)} |", "|---|---" + "|---:" * (len(columns) + 4) + "|"]
    for key in dict.fromkeys((one["checkpoint"], one["scheduler"]) for one in drawn):
        row = [one for one in drawn if (one["checkpoint"], one["scheduler"]) == key]
        cells = [percent(one["share"]) for one in sorted(row, key=lambda one: one["steps"])]
        needed = steps_needed(row)
        (then,) = (one["seconds"] for one in row if one["steps"] == needed)
        (labels,) = (r for r in results if r["task"] == LABELS and (r["checkpoint"], r["scheduler"]) == key)
        cells += [str(needed), f"{then / fastest:.1f}x", percent(labels["share"]), str(labels["different"])]
        lines.append(f"| {' | '.join([*key, *cells])} |")
    lines += ["", f"| checkpoint | parameters | held-out compositions, {columns[-1]} steps |", "|---|---:|---:|"]
    for one in results:
        if one["task"] == COMPOSITIONS:
            cells = [one["checkpoint"], f"{one['parameters'] / 1e6:.1f} M", percent(one["share"])]
            lines.append(f"| {' | '.join(cells)} |")
    worst = max(0.5 / math.sqrt(one["share"]["count"]) for one in drawn)
    return "\n".join([*lines, "", f"Standard errors of the shares are {100 * worst:.1f} points at the most."])


def percent(share: dict) -> str:
    return f"{100 * share['value']:.1f} %"


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = [one for checkpoint in args.checkpoints for one in measure(checkpoint, args)]
    (args.output_dir / "kinds_of_diffusion.json").write_text(json.dumps(results, indent=2) + "\n")
    table = as_table(results)
    (args.output_dir / "kinds_of_diffusion.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main(parse_args())
