#!/usr/bin/env python
"""Whether tokenizers of many shapes keep their codes from the first steps on, with the defaults of train_image_vq.py.

    python -m benchmarks.codebook_usage --train_data_dir PHOTOGRAPHS --output_dir outputs/codebook_usage

Each setting is trained on crops of the photographs at its default learning rate, at a third of it and at thrice, from
each seed, and with vector-quantize-pytorch's quantizer in the same loop where there is a like one and it is installed
(pip install vector-quantize-pytorch). The use of codes at every step is relative to what a batch can show: to the
share of the codebook that as many positions show on average where all codes are used alike. The PSNR is of crops of
other photographs, every eighth file. What ``codebook_usage.json`` in the output folder has already is kept, so that a
run that was cut short goes on. The photographs of docs/image_tokenizer.md are in the Debian package
plasma-workspace-wallpapers, and in scikit-image and scikit-learn; a grid of 300 steps takes 40 minutes of a CPU core
for each seed.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from PIL import Image

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training.metrics import expected_usage
from diffusers_vqdit.training.optimization import tokenizer_learning_rate
from diffusers_vqdit.training.quantizer_arguments import add_quantizer_arguments, quantizer_options
from diffusers_vqdit.training.row_order import shuffled_batches
from diffusers_vqdit.training.tokenizer_metrics import measure_image_tokenizer
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    output_path,
    positive_integer,
    positive_number,
    random_seed,
)
from diffusers_vqdit.utils.decoding import to_pixels
from diffusers_vqdit.utils.images import to_rgb

from .quantizers import Foreign


FIRST = 20  # steps of which the use of codes isn't counted
# Name -> widths, side of the crops, batch, flags of the quantizer.
SETTINGS: dict[str, tuple[list[int], int, int, str]] = {
    "f4, 16-16-16": ([16, 16, 16], 32, 8, ""),
    "f4, the 32 px starter's": ([24, 48, 96], 32, 8, ""),
    "f4, 32-64-64": ([32, 64, 64], 32, 4, ""),
    "f4, 64 px": ([16, 32, 64], 64, 4, ""),
    "f4, batch 32": ([16, 16, 32], 32, 32, ""),
    "f8, 16 to 128": ([16, 32, 64, 128], 32, 8, ""),
    "f8, 16 to 256": ([16, 32, 64, 256], 32, 8, ""),
    "f8, 64 px": ([16, 32, 64, 128], 64, 4, ""),
    "f8, batch 32": ([16, 16, 32, 64], 32, 32, ""),
    "f8, codes of any length": ([16, 32, 64, 128], 32, 8, "--codebook_norm none"),
    "f16, batch 16": ([16, 16, 32, 32, 64], 64, 16, ""),
    "f16, 16 to 128": ([16, 16, 32, 64, 128], 64, 4, ""),
    "f16, 16 to 256": ([16, 16, 64, 128, 256], 64, 4, ""),
    "f8, 4,096 codes": ([16, 32, 64, 128], 32, 8, "--num_vq_embeddings 4096"),
    "f8, rotation trick": ([16, 32, 64, 128], 32, 8, "--gradient_estimator rotation"),
    "f8, codebook by gradient": ([16, 32, 64, 128], 32, 8, "--codebook_update gradient"),
    "f8, rvq of two": ([16, 32, 64, 128], 32, 8, "--quantizer_type rvq --num_quantizers 2"),
    "f8, simvq": ([16, 32, 64, 128], 32, 8, "--quantizer_type simvq"),
    "f8, fsq": ([16, 32, 64, 128], 32, 8, "--quantizer_type fsq --fsq_levels 8 5 5 5"),
    "f8, bsq": ([16, 32, 64, 128], 32, 8, "--quantizer_type lfq --vq_embed_dim 10 --entropy_weight 0.1"),
}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train tokenizers of many shapes and record the use of their codes.")
    parser.add_argument("--train_data_dir", type=Path, required=True, help="Folder of photographs.")
    parser.add_argument("--crops", type=positive_integer, default=40, help="Of each photograph.")
    parser.add_argument("--max_train_steps", type=positive_integer, default=80)
    parser.add_argument(
        "--factors", type=positive_number, nargs="+", default=[1.0, 1 / 3, 3.0], help="Of the learning rate."
    )
    parser.add_argument("--only", nargs="+", help="Names of settings; by default all.")
    parser.add_argument("--seeds", type=random_seed, nargs="+", default=[0, 1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/codebook_usage"))
    args = parser.parse_args(input_args)
    if unknown := set(args.only or []) - set(SETTINGS):
        parser.error(f"--only {sorted(unknown)} must be among {list(SETTINGS)}")
    return args


def crops_of(files: list[Path], resolution: int, count: int, seed: int) -> torch.Tensor:
    """`count` crops (N, 3, H, W) uint8 of each file, of any size from twice the resolution up."""
    generator, crops = np.random.default_rng(seed), []
    for file in files:
        image = Image.open(file)
        image.draft("RGB", (1024, 1024))
        image = to_rgb(image)
        for _ in range(count):
            side = int(generator.integers(min(2 * resolution, *image.size), min(image.size) + 1))
            left, top = (int(generator.integers(size - side + 1)) for size in image.size)
            box = (left, top, left + side, top + side)
            crop = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box, reducing_gap=3)
            crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return torch.stack(crops)


def foreign_quantizer(options: dict) -> Foreign | None:
    """vector-quantize-pytorch's quantizer with options like ours, but for its own way to restart codes; None where it
    has none or isn't installed."""
    try:
        import vector_quantize_pytorch as theirs
    except ImportError:
        return None
    if options["quantizer_type"] != "vq" or options["codebook_update"] != "ema":
        return None
    codes, width = options["num_vq_embeddings"], options["vq_embed_dim"]
    module = theirs.VectorQuantize(
        width,
        codes,
        commitment_weight=options["beta"],
        decay=0.99,
        use_cosine_sim=options["codebook_norm"] == "l2",
        kmeans_init=True,
        threshold_ema_dead_code=2,
        rotation_trick=options["gradient_estimator"] == "rotation",
    )
    return Foreign(module, codes, width)


def train(
    name: str,
    args: argparse.Namespace,
    pictures: torch.Tensor,
    held_out: torch.Tensor,
    *,
    factor: float,
    seed: int,
    foreign: bool,
) -> dict | None:
    """Train one setting; its learning rate, the use of codes at every step, and the PSNR at the end.

    Args:
        pictures, held_out: (N, 3, H, W) uint8.
        factor: of the default learning rate.
        seed: of the weights and the order of the pictures.
        foreign: with vector-quantize-pytorch's quantizer; None is returned where there is none.
    """
    widths, resolution, batch_size, flags = SETTINGS[name]
    parser = argument_parser("Defaults of quantizers.")
    add_quantizer_arguments(parser.add_argument_group("quantizer"))
    options = quantizer_options(parser.parse_args(flags.split()))
    torch.manual_seed(seed)
    model = ImageVQModel(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        norm_num_groups=8,
        mid_block_add_attention=False,
        latent_channels=64,
        sample_size=resolution,
        **options,
    )
    if foreign:
        quantizer = foreign_quantizer(options)
        if quantizer is None:
            return None
        model.quantize = quantizer
    model.train().to(args.device, memory_format=torch.channels_last)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = factor * tokenizer_learning_rate(widths, model.num_codes)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=args.max_train_steps // 2, num_training_steps=args.max_train_steps
    )
    shown = expected_usage(model.num_codes, batch_size * (resolution // model.downsample_factor) ** 2)
    batches, used = shuffled_batches(len(pictures), batch_size, seed=seed), []
    for _ in range(args.max_train_steps):
        sample = to_pixels(pictures[next(batches)]).to(args.device)
        output = model(sample)
        (F.mse_loss(output.sample, sample) + output.commit_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        used.append(output.usage.mean().item() / shown)
    figures = measure_image_tokenizer(model, held_out.split(64))
    return {"learning_rate": rate, "usage": [round(u, 4) for u in used], "psnr": figures["psnr"], "shown": shown}


Seeds = dict[str, dict]  # a run of each seed


def psnr(runs: Seeds) -> float:
    return sum(run["psnr"] for run in runs.values()) / len(runs)


def use(runs: Seeds) -> list[float]:
    return [used for run in runs.values() for used in run["usage"][FIRST:]]


def deviation(runs: dict[str, dict[str, Seeds]]) -> float | None:
    """Of the PSNR of one setting and rate between seeds, pooled over all; None where each has one."""
    groups = [[run["psnr"] for run in seeds.values()] for found in runs.values() for seeds in found.values()]
    squares = sum(len(group) * np.var(group) for group in groups)
    return float((squares / free) ** 0.5) if (free := sum(len(group) - 1 for group in groups)) else None


def as_table(runs: dict[str, dict[str, Seeds]]) -> str:
    """A row a setting: the default learning rate with the least and the mean use of codes after the first steps and
    the PSNR, mean of the seeds, the PSNR of the other rates, and the same of vector-quantize-pytorch."""
    heads = ["setting", "crops, batch", "learning rate", "least use", "mean use", "PSNR (dB)", "a third", "thrice"]
    heads += ["theirs: least use", "PSNR"]
    lines = [f"| {' | '.join(heads)} |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]

    def cell(seeds: Seeds | None) -> str:
        return f"{psnr(seeds):.2f} ({min(use(seeds)):.2f})" if seeds else ""

    for name, found in runs.items():
        own, theirs = found["1"], found.get("theirs")
        mean, rate = sum(use(own)) / len(use(own)), next(iter(own.values()))["learning_rate"]
        cells = [name, f"{SETTINGS[name][1]} px, {SETTINGS[name][2]}", f"{rate:.1e}", f"{min(use(own)):.2f}"]
        cells += [f"{mean:.2f}", f"{psnr(own):.2f}", cell(found.get("0.33")), cell(found.get("3"))]
        cells += [f"{min(use(theirs)):.2f}", f"{psnr(theirs):.2f}"] if theirs else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    if (spread := deviation(runs)) is not None:
        lines.append(f"\nOne run's PSNR differs between seeds with a standard deviation of {spread:.2f} dB.")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    files = sorted(path for path in args.train_data_dir.iterdir() if path.is_file())
    held_out_files = files[::8]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = args.output_dir / "codebook_usage.json"
    runs: dict[str, dict[str, Seeds]] = json.loads(results.read_text()) if results.is_file() else {}
    data: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    factors = {**{f"{factor:.2g}": factor for factor in args.factors}, "theirs": 1.0}
    for seed, (label, factor), name in itertools.product(args.seeds, factors.items(), args.only or SETTINGS):
        side, seeds = SETTINGS[name][1], runs.setdefault(name, {}).get(label, {})
        if str(seed) in seeds:
            continue
        if side not in data:
            trained_files = [file for file in files if file not in held_out_files]
            data[side] = (crops_of(trained_files, side, args.crops, 0), crops_of(held_out_files, side, 16, 1))
        run = train(name, args, *data[side], factor=factor, seed=seed, foreign=label == "theirs")
        if run is not None:
            runs[name][label] = seeds | {str(seed): run}
            print(
                f"{name}, {label}, seed {seed}: least use {min(use({'': run})):.2f}, {run['psnr']:.2f} dB", flush=True
            )
            results.write_text(json.dumps(runs) + "\n")
    (args.output_dir / "codebook_usage.md").write_text(as_table(runs) + "\n")
    print(as_table(runs))


if __name__ == "__main__":
    main(parse_args())
