"""The command line of a script that a benchmark runs, and the time that is told of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scripts


def test_the_script_gets_the_flags(monkeypatch):
    given = []
    monkeypatch.setattr(scripts.subprocess, "run", lambda command, check: given.append(command))
    flags = {"use_ema": True, "seed": 0, "output_dir": Path("out")}
    assert scripts.run_script("train_vqdit", flags, ["--optimizer", "adamw"]) == 0
    scripts.run_script("train_vqdit", {}, launched=True)
    script = str(scripts.ROOT / "training" / "train_vqdit.py")
    assert Path(script).is_file()
    words = ["--use_ema", "--seed", "0", "--output_dir", "out", "--optimizer", "adamw"]
    assert given[0] == [sys.executable, script, *words]
    assert given[1] == [sys.executable, "-m", "accelerate.commands.launch", script]


def test_minutes_are_those_of_this_script_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(scripts, "ROOT", tmp_path)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "busy.py").write_text(
        "import sys, time\nwhile time.process_time() < float(sys.argv[2]): pass\nsys.exit(int(sys.argv[2] == '0'))"
    )
    first, second = (60 * scripts.run_script("busy", {"seconds": seconds}) for seconds in (1.5, 0.1))
    assert 1.5 <= first < 2.5 and 0.1 <= second < 1
    with pytest.raises(subprocess.CalledProcessError):
        scripts.run_script("busy", {"seconds": 0})
