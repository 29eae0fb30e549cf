"""What a script prints where it fails."""

import json
import subprocess
import sys

import pytest
from diffusers.utils import logging

from diffusers_vqdit.utils.checks import check_integer
from diffusers_vqdit.utils.told_errors import told_errors


def refuse():
    check_integer("steps", -1, 0)


def test_an_error_of_this_package_is_told_by_its_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["elsewhere/train.py"])
    with pytest.raises(SystemExit) as stopped, told_errors():
        refuse()
    told = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and told[0].startswith("train.py: error: steps=-1 ")
    assert len(told) == 2 and "DIFFUSERS_VERBOSITY=debug" in told[1]


def test_an_error_of_the_script_is_told_so_too(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [__file__])
    with pytest.raises(SystemExit), told_errors():
        raise ValueError("give another")
    assert "test_told_errors.py: error: give another\n" in capsys.readouterr().err


@pytest.mark.parametrize("work", [lambda: json.loads("{"), lambda: {}["key"], lambda: exec("raise ValueError")])
def test_other_errors_keep_their_traceback(work, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["elsewhere/train.py"])
    with pytest.raises((ValueError, KeyError)), told_errors():
        work()


def test_all_have_one_while_debugging():
    before = logging.get_verbosity()
    logging.set_verbosity_debug()
    try:
        with pytest.raises(ValueError, match="steps=-1"), told_errors():
            refuse()
    finally:
        logging.set_verbosity(before)


def test_a_script_says_what_it_needs_and_no_more(root, tmp_path):
    words = ["training/plot_run.py", "--output_dir", str(tmp_path / "nothing")]
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("plot_run.py: error: ") and "Traceback" not in done.stderr
