import json
from statistics import variance

import numpy as np
import pytest
from PIL import Image

from benchmarks.codebook_usage import deviation, main, parse_args


def test_a_setting_at_two_rates_from_two_seeds(tmp_path, capsys):
    (tmp_path / "photographs").mkdir()
    generator = np.random.default_rng(0)
    for number in range(9):
        pixels = generator.integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photographs/{number}.png")
    arguments = ["--train_data_dir", str(tmp_path / "photographs"), "--crops", "2", "--max_train_steps", "22"]
    arguments += ["--only", "f4, 32-64-64", "--factors", "1", "3", "--output_dir", str(tmp_path / "out")]
    main(parse_args([*arguments, "--seeds", "0"]))
    results = tmp_path / "out/codebook_usage.json"
    first = json.loads(results.read_text())
    capsys.readouterr()

    main(parse_args([*arguments, "--seeds", "0", "1"]))  # goes on
    runs = json.loads(results.read_text())
    rates = runs["f4, 32-64-64"]
    assert "seed 0" not in capsys.readouterr().out
    for label in ("1", "3"):
        assert rates[label]["0"] == first["f4, 32-64-64"][label]["0"] != rates[label]["1"]
    spread = [variance(rates[label][seed]["psnr"] for seed in "01") for label in rates]
    assert deviation(runs) == pytest.approx((sum(spread) / len(spread)) ** 0.5) and deviation(first) is None
    table = (tmp_path / "out/codebook_usage.md").read_text()
    mean = sum(run["psnr"] for run in rates["3"].values()) / 2
    assert f"| {mean:.2f} (" in table and f"{deviation(runs):.2f} dB" in table
