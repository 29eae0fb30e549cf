"""What a script prints where it fails."""

import json
import subprocess
import sys

import pytest
from datasets import load_dataset
from diffusers.utils import logging
from transformers import AutoModel, CLIPTextModel

from diffusers_vqdit import ImageVQModel, VQDiTPipeline
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


FAULTS = {
    "a library's": lambda: json.loads("{"),
    "another kind": lambda: {}["key"],
    "generated code": lambda: exec("raise ValueError"),
    "no sentence of ours": lambda: (lambda *values: values.index(1))(),
    "nor this": lambda: list(zip([1], [], strict=True)),
    "a number that isn't": lambda: int("x"),
    "a file that isn't there": lambda: open("/nothing/there"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_errors_keep_their_traceback(fault, monkeypatch):
    """Though they are raised in a script beside the one that runs."""
    monkeypatch.setattr(sys, "argv", [__file__])
    with pytest.raises((ValueError, KeyError, OSError)), told_errors():
        FAULTS[fault]()


def test_a_library_below_a_scripts_folder_is_not_its_own(tmp_path, monkeypatch):
    library = tmp_path / ".venv" / "library.py"
    library.parent.mkdir()
    library.write_text("def fail():\n    raise ValueError('a bug')\n")
    monkeypatch.syspath_prepend(str(library.parent))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    import library

    with pytest.raises(ValueError, match="a bug"), told_errors():
        library.fail()


@pytest.mark.parametrize("kind", [ImportError, OSError, RuntimeError, FileNotFoundError])
def test_sentences_of_other_kinds_are_told_so_too(kind, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [__file__])
    with pytest.raises(SystemExit), told_errors():
        raise kind("install it")
    assert capsys.readouterr().err.startswith("test_told_errors.py: error: install it\n")


@pytest.mark.parametrize("kind", [VQDiTPipeline, ImageVQModel, CLIPTextModel])
def test_a_model_that_is_not_there_is_told_so_too(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistyped").mkdir()
    with pytest.raises(SystemExit), told_errors():
        kind.from_pretrained("mistyped")
    told = capsys.readouterr().err.splitlines()
    assert "mistyped" in told[-2] and "DIFFUSERS_VERBOSITY=debug" in told[-1]


FAILURES = {
    "a program that isn't there": lambda: subprocess.run(["a-program-of-no-name"]),
    "one that fails": lambda: subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=True),
    "a table that isn't there": lambda: load_dataset("parquet", data_files="nothing.parquet"),
    "a folder that isn't there": lambda: VQDiTPipeline.from_pretrained("outputs/nothing/there"),
    "no Hub id": lambda: VQDiTPipeline.from_pretrained("my model"),
    "no model of transformers": lambda: AutoModel.from_pretrained("other"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_libraries_say_of_what_is_not_there_is_told(failure, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(SystemExit), told_errors():
        FAILURES[failure]()
    assert "DIFFUSERS_VERBOSITY=debug" in capsys.readouterr().err.splitlines()[-1]


def test_all_have_one_while_debugging():
    before = logging.get_verbosity()
    logging.set_verbosity_debug()
    try:
        with pytest.raises(ValueError, match="steps=-1"), told_errors():
            refuse()
    finally:
        logging.set_verbosity(before)


def test_a_script_says_what_it_needs_and_no_more(root, tmp_path):
    for name, words in {
        "plot_run.py": ["training/plot_run.py", "--output_dir", str(tmp_path / "nothing")],
        "diffusers_vqdit": ["-m", "diffusers_vqdit", "--output_file", str(tmp_path / "a.jpg")],
    }.items():
        done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-2].startswith(f"{name}: error: ")
