"""A run's TensorBoard files become one picture."""

import math
import os

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter


def write(folder, values, warnings=()):
    """Figures by name, one a step, as a run's tracker writes them."""
    with SummaryWriter(folder) as writer:
        for name, points in values.items():
            for step, value in points:
                writer.add_scalar(name, value, step)
        for name, step in warnings:
            writer.add_scalar(name, 1.0, step)


def test_a_resumed_run_is_read_as_one(script, tmp_path):
    """Steps that were taken again are the later file's."""
    module = script("plot_run")
    write(tmp_path / "logs/image_vq", {"mse": [(step, 1.0) for step in range(1, 8)]})
    write(tmp_path / "logs/image_vq", {"mse": [(step, 2.0) for step in range(5, 10)], "usage": [(5, 0.5)]})
    scalars = module.read_scalars(tmp_path / "logs")
    assert scalars["mse"] == [(step, 1.0 if step < 5 else 2.0) for step in range(1, 10)]
    assert scalars["usage"] == [(5, 0.5)]
    with pytest.raises(ValueError, match="has no figures of a run"):
        module.read_scalars(tmp_path / "samples")


def test_a_run_that_was_begun_anew_in_the_folder_is_read_alone(script, tmp_path):
    """Later steps of the earlier one, its warnings and its own figures are not in the picture."""
    module = script("plot_run")
    old = {"mse": [(step, 1.0) for step in range(1, 31)], "validation/psnr": [(30, 9.0)], "warnings/usage": [(8, 1.0)]}
    write(tmp_path / "logs/image_vq", old)
    write(tmp_path / "logs/image_vq", {"mse": [(step, 2.0) for step in range(1, 13)]})
    assert module.read_scalars(tmp_path / "logs") == {"mse": [(step, 2.0) for step in range(1, 13)]}


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, 1.0])
def test_whatever_a_figure_was_it_is_drawn(script, tmp_path, value):
    pytest.importorskip("matplotlib")
    module = script("plot_run")
    (tmp_path / "samples").mkdir()
    for step, color in ((30, "red"), (12, "lime")):  # the second run's are fewer
        Image.new("RGB", (64, 32), color).save(tmp_path / f"samples/step-{step:06d}.png")
        os.utime(tmp_path / f"samples/step-{step:06d}.png", (0, 60 - step))
    write(tmp_path / "logs", {"gradient_norm": [(1, value), (2, value)], "mse": [(1, 1.0)], "entropy": [(1, 0.0)]})
    module.main(module.parse_args(["--output_dir", str(tmp_path), "--output_file", str(tmp_path / "new/a.png")]))
    colors = {color for _, color in Image.open(tmp_path / "new/a.png").convert("RGB").getcolors(10**7)}
    assert (0, 255, 0) in colors and (255, 0, 0) not in colors


def test_every_figure_has_its_panel_and_none_has_two(script):
    module = script("plot_run")
    names = ["loss", "loss/text->image", "mse", "cross_entropy", "usage", "usage_1", "perplexity_2", "gradient_norm"]
    names += ["images_per_second", "captions_per_second", "lr", "validation/psnr", "discriminator", "mfu"]
    names += ["discriminator_gradient_norm", "warnings/usage"]
    panels = module.panels_of({name: [(1, 1.0)] for name in names})
    placed = [name for panel in panels.values() for name in panel]
    assert sorted(placed) == sorted(set(names) - {"warnings/usage"})
    assert panels["gradient norm"] == ["discriminator_gradient_norm", "gradient_norm"]
    assert panels["samples a second"] == ["captions_per_second", "images_per_second"]


def test_averages_start_at_the_first_value_and_pass_over_what_is_not_finite(script):
    smoothed = script("plot_run").smoothed
    assert smoothed([3.0] * 500) == pytest.approx([3.0] * 500)
    assert smoothed([math.nan, 2.0, math.inf, 2.0])[1:] == [2.0, 2.0, 2.0]


def test_a_run_is_drawn_while_it_goes_on(script, tmp_path):
    pytest.importorskip("matplotlib")
    curves = {"mse": [(step, 1.0 / step) for step in range(1, 300)], "usage": [(1, 0.1)], "lr": [(1, 0.0)]}
    write(tmp_path / "logs/image_vq", curves, [("warnings/usage", 40)])
    module = script("plot_run")
    module.main(module.parse_args(["--output_dir", str(tmp_path)]))
    without = Image.open(tmp_path / "run.png").size
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (64, 32), "red").save(tmp_path / "samples/step-000020.png")
    module.main(module.parse_args(["--output_dir", str(tmp_path), "--output_file", str(tmp_path / "b.png")]))
    drawn = Image.open(tmp_path / "b.png").convert("RGB")
    assert drawn.size[1] > without[1] and (255, 0, 0) in {color for _, color in drawn.getcolors(10**7)}
