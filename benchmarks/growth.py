#!/usr/bin/env python
"""How CPU time grows with codes, batch, codebook, steps, gallery and dataset, beside what is computed or read.

    python -m benchmarks.growth --output_dir outputs/growth

Each panel has the median time of a size over that of the smallest, and beside it the same ratio of the operations
that are counted (`torch.utils.flop_counter`), or of the bytes read (gallery). A batch of a dataset of codes should
take as long whatever the dataset's size. Writes ``growth.json``, and ``growth.png`` where matplotlib is installed.
Models have random weights, 4 layers x 256 channels.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from diffusers_vqdit import GalleryIndex, MaskedDiffusionScheduler, VQDiTTransformer2DModel
from diffusers_vqdit.likelihood import gallery
from diffusers_vqdit.likelihood.retrieval import NUM_FEATURES
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.code_files import write_index, write_shard
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.utils.arguments import argument_parser, output_path, positive_integer

from .common import flops, number, timed


Case = tuple[int, Callable[[], object], float]  # a size, what to call, and its operations or bytes


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Measure growth.")
    parser.add_argument("--rounds", type=positive_integer, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/growth"))
    return parser.parse_args(input_args)


def model(side: int, vocab_size: int, device: str) -> VQDiTTransformer2DModel:
    segments = {"image": {"vocab_size": vocab_size, "shape": [side, side]}}
    made = VQDiTTransformer2DModel(num_attention_heads=4, attention_head_dim=64, num_layers=4, segments=segments)
    return made.eval().to(device)


def masked(made: VQDiTTransformer2DModel, batch: int = 1) -> dict[str, torch.Tensor]:
    segment = made.config.segments["image"]
    return {"image": torch.full((batch, *segment["shape"]), segment["vocab_size"], device=made.device)}


def sample(made: VQDiTTransformer2DModel, steps: int) -> torch.Tensor:
    scheduler = MaskedDiffusionScheduler()
    scheduler.set_timesteps(steps, device=made.device)
    codes = masked(made)["image"]
    for timestep in scheduler.timesteps:
        logits = made({"image": codes}).sample["image"]
        codes = scheduler.step(logits, timestep, codes.flatten(1)).prev_sample.view_as(codes)
    return codes


def with_flops(size: int, function: Callable[[], object]) -> Case:
    return size, function, float(flops(function))


def codes_a_sample(device: str) -> Iterator[Case]:
    for side in (8, 16, 32, 64):
        made = model(side, 1024, device)
        yield with_flops(side**2, partial(made, masked(made)))


def batch_size(device: str) -> Iterator[Case]:
    made = model(16, 1024, device)
    for batch in (1, 2, 4, 8, 16):
        yield with_flops(batch, partial(made, masked(made, batch)))


def codebook_size(device: str) -> Iterator[Case]:
    for size in (2**8, 2**10, 2**12, 2**14, 2**16):
        made = model(16, size, device)
        yield with_flops(size, partial(sample, made, 1))


def sampling_steps(device: str) -> Iterator[Case]:
    made = model(16, 1024, device)
    for steps in (1, 4, 16, 64):
        yield with_flops(steps, partial(sample, made, steps))


def gallery_items(device: str) -> Iterator[Case]:
    query = torch.randn(1, NUM_FEATURES)
    for size in (10**3, 10**4, 10**5, 10**6):
        tensors = {
            "codes": torch.zeros(size, 1, dtype=torch.int16),
            "features": torch.randn(size, NUM_FEATURES).half(),
            "bias": torch.randn(size),
            "basis": torch.zeros(NUM_FEATURES, NUM_FEATURES).half(),
        }
        index = GalleryIndex(segment="image", query="text", way="text->image", model="random", **tensors)
        yield size, partial(index.search, query, 20), 2.0 * size * NUM_FEATURES


def dataset_rows(device: str) -> Iterator[Case]:
    """A batch of 32 rows, drawn at random, of folders that are so many copies of 10,000 rows."""
    task = Task.parse("->image")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = list(torch.randint(1024, (10_000, 8, 8)))
        shards: list[dict] = []
        for count in (1, 10, 100):
            while len(shards) < count:
                shards.append(write_shard(folder / f"codes-{len(shards):05d}.arrow", {"image": rows}))
            index = {"segments": {"image": {"vocab_size": 1024, "shape": [8, 8]}}, "labels": [], "lowres_factor": None}
            write_index(folder, index | {"fingerprints": {}, "settings": {}, "shards": shards})
            codes = CodeDataset(folder)
            drawn = torch.randint(len(codes), (100, 32))
            yield len(codes), lambda c=codes, d=drawn: [c.batch(rows, task) for rows in d], 1.0


PANELS = {
    "codes a sample, a forward pass": codes_a_sample,
    "batch, a forward pass": batch_size,
    "codebook, a pass and a step": codebook_size,
    "steps of 256 codes": sampling_steps,
    "items of a gallery, a query": gallery_items,
    "rows of a dataset, a batch": dataset_rows,
}


def measure(panel: Callable[[str], Iterator[Case]], rounds: int, device: str) -> list[dict[str, float]]:
    found = []
    for size, function, work in panel(device):
        function()
        clock = int(device == "cpu")  # CPU time there
        median = statistics.median(timed(function)[clock] for _ in range(rounds))
        found.append({"size": size, "ms": median, "work": work})
    return found


def table(panel: str, found: list[dict[str, float]]) -> str:
    first = found[0]
    lines = [f"**{panel}**", "", "| size | ms | time, ratio | operations or bytes, ratio |", "|---|---|---|---|"]
    for one in found:
        ratios = number(one["ms"] / first["ms"]), number(one["work"] / first["work"])
        lines.append(f"| {one['size']:,} | {number(one['ms'])} | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6))
    for axis, (panel, found) in zip(axes.flat, results.items(), strict=True):
        sizes = [one["size"] for one in found]
        for key, label, style in (("ms", "time", "o-"), ("work", "operations or bytes", "k:")):
            axis.plot(sizes, [one[key] / found[0][key] for one in found], style, label=label)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.5)
        axis.set_title(panel, fontsize=11)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("over the smallest's")
    axes[1, 0].set_ylabel("over the smallest's")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    results = {}
    with patch.object(gallery, "find_spec", lambda name: None):  # the search that there is without faiss
        for name, panel in PANELS.items():
            results[name] = measure(panel, args.rounds, args.device)
            print(table(name, results[name]), flush=True)
            (args.output_dir / "growth.json").write_text(json.dumps(results, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        plot(results, args.output_dir / "growth.png")


if __name__ == "__main__":
    main(parse_args())
