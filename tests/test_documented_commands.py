"""Every command of our scripts that docs and cards show is one that the script takes."""

import importlib
import re
import sys
import textwrap

import pytest


# CONTRIBUTING.md's example is of a modality that it adds: test_contributing.py runs it.
PLACES = ("README.md", "docs/*.md", "model_cards/*/README.md", "training/data/README.md")


def pages(root):
    return [path for pattern in PLACES for path in sorted(root.glob(pattern))]


def test_each_is_taken(root, documented, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(root / "training"))
    monkeypatch.syspath_prepend(str(root))
    seen, wrong = [], []
    for page in pages(root):
        for name, arguments in documented.commands(page.read_text()):
            folder, _, script = name.partition(".")
            module = importlib.import_module(script if folder == "training" else name)
            if not hasattr(module, "parse_args"):
                continue
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
            seen.append(name)
            try:
                module.parse_args()
            except SystemExit as stopped:
                if stopped.code:
                    wrong.append((page.name, name, capsys.readouterr().err.splitlines()[-1]))
    assert len(seen) > 60 and set(documented.MODULES.values()) <= set(seen)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("language", ["python", "py"])
def test_each_block_of_python_compiles(root, language):
    for page in pages(root):
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL):
            compile(textwrap.dedent(block), str(page), "exec")
