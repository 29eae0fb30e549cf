#!/usr/bin/env python
"""Draw a training run's losses, use of codes, throughput, validation and newest samples into one PNG.

    pip install matplotlib && python training/plot_run.py --output_dir outputs/image_vq

reads the TensorBoard files of a script's run (``--report_to tensorboard``, the default) and ``samples/``, and writes
``run.png`` there; while the run goes on, too. Warnings of the run are vertical lines.
"""

import argparse
import math
from pathlib import Path

from PIL import Image

from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.utils.arguments import argument_parser, output_path
from diffusers_vqdit.utils.told_errors import told_errors


# Title of a panel -> how the names of its figures begin, or end after a *.
PANELS = {
    "losses": ("loss", "mse", "reconstruction", "perceptual", "cross_entropy", "commitment", "entropy", "alignment"),
    "gradient norm": ("*gradient_norm",),
    "discriminator": ("generator", "discriminator", "logits_", "lecam", "adaptive_weight"),
    "use of the codebook": ("usage",),
    "perplexity of the codes": ("perplexity",),
    "validation, in dB": ("validation/psnr",),
    "validation: use of the codebook": ("validation/usage",),
    "validation: perplexity of the codes": ("validation/perplexity",),
    "validation": ("validation/",),
    "samples a second": ("*_per_second",),
    "model FLOPs utilisation": ("mfu",),
    "learning rate": ("lr",),
}
LOGARITHMIC = {"losses", "gradient norm"}
# Told apart by colour-blind readers too.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Draw a training run into one PNG.")
    parser.add_argument("--output_dir", type=Path, required=True, help="The run's folder.")
    parser.add_argument("--logging_dir", default="logs", help="The run's own --logging_dir.")
    parser.add_argument("--output_file", type=output_path, help="By default run.png in the run's folder.")
    return parser.parse_args(input_args)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every figure's steps and values in the TensorBoard files below a folder, in the order of the steps.

    From the first step of a file on, what earlier files say is of a run that was begun anew, or resumed before it.

    Raises:
        ValueError: if there are none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        own = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
        if own:
            first = min(map(min, own.values()))
            found = {name: {k: v for k, v in values.items() if k < first} for name, values in found.items()}
        for name, values in own.items():
            found[name] = found.get(name, {}) | values
    found = {name: values for name, values in found.items() if values}
    if not found:
        raise ValueError(f"{folder} has no figures of a run: train with --report_to tensorboard")
    return {name: sorted(values.items()) for name, values in found.items()}


def panels_of(scalars: dict[str, list[tuple[int, float]]]) -> dict[str, list[str]]:
    """Title -> names of the figures in the panel, each in the first that fits; panels without any are left out, and
    losses that are always 0, which the run hasn't."""
    panels: dict[str, list[str]] = {}
    for name in sorted(scalars):
        for title, patterns in PANELS.items():
            if any(name.endswith(p[1:]) if p.startswith("*") else name.startswith(p) for p in patterns):
                unused = title == "losses" and not any(value for _, value in scalars[name])
                if not unused and not any(name in names for names in panels.values()):
                    panels.setdefault(title, []).append(name)
    return {title: panels[title] for title in PANELS if title in panels}


def smoothed(values: list[float], share: float = 0.02) -> list[float]:
    """Moving averages over a share of the values, without the bias of the first; those not finite are left out."""
    decay, average, weight, found = 1.0 - 1.0 / max(1.0, share * len(values)), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average, weight = decay * average + (1 - decay) * value, decay * weight + 1 - decay
        found.append(average / weight if weight else math.nan)
    return found


def draw(scalars: dict[str, list[tuple[int, float]]], samples: Path | None, output_file: Path) -> None:
    """Draw the panels, and below them a picture of samples."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plot_run.py draws with matplotlib: pip install matplotlib") from error

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = panels_of(scalars)
    warnings = {name.removeprefix("warnings/"): points for name, points in scalars.items() if "warnings/" in name}
    rows = math.ceil(len(panels) / 3)
    heights = [3.0] * rows + ([5.0] if samples is not None else [])
    figure = plt.figure(figsize=(15, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for index, (title, names) in enumerate(panels.items()):
        axis = figure.add_subplot(grid[index // 3, index % 3])
        for name, color in zip(names, COLORS * math.ceil(len(names) / len(COLORS)), strict=False):
            steps, values = zip(*scalars[name], strict=True)
            if len(steps) > 100:
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
                values = smoothed(list(values))
            axis.plot(steps, values, color=color, linewidth=1.5, label=name, marker="." if len(steps) < 30 else None)
        for name, points in warnings.items():
            axis.axvline(points[0][0], color="0.4", linestyle=":", linewidth=1, label=f"warning: {name}")
        shown = [value for name in names for _, value in scalars[name] if math.isfinite(value)]
        if title in LOGARITHMIC and shown and min(shown) > 0:
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7)
    if samples is not None:
        axis = figure.add_subplot(grid[rows, :])
        axis.imshow(Image.open(samples), interpolation="nearest")
        axis.set_title(samples.name, fontsize=10)
        axis.axis("off")
    figure.savefig(output_file, dpi=120)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    samples = (args.output_dir / "samples").glob("step-*.png")
    newest = max(samples, key=lambda path: path.stat().st_mtime, default=None)
    output_file = args.output_file or args.output_dir / "run.png"
    check_output_file("output_file", output_file)
    draw(read_scalars(args.output_dir / args.logging_dir), newest, output_file)
    print(output_file)


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
