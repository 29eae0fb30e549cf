"""Every command of our scripts that docs and cards show is one that the script takes."""

import importlib
import re
import shlex
import sys
import textwrap

import pytest


# CONTRIBUTING.md's example is of a modality that it adds: test_contributing.py runs it.
PLACES = ("README.md", "docs/*.md", "model_cards/*/README.md", "training/data/README.md")
SCRIPT = re.compile(r"(training|benchmarks|examples)[/.](\w+?)(\.py)?")
MODULES = {"benchmarks": "benchmarks.__main__", "diffusers_vqdit": "diffusers_vqdit.__main__"}


def commands(text):
    """(module, arguments) of each command of a page's bash blocks and of those within its lines."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    blocks = re.sub(r'python -c "[^"]*"', "", blocks)
    inline = re.findall(r"`((?:python|accelerate launch|torchrun) [^`]+)`", text)
    for line in [*blocks.splitlines(), *(one.replace("\n", " ") for one in inline)]:
        for part in line.split("&&"):
            words = [] if "..." in part else shlex.split(part, comments=True)
            for place, word in enumerate(words):
                if found := SCRIPT.fullmatch(word):
                    yield f"{found[1]}.{found[2]}", words[place + 1 :]
                    break
                if word in MODULES and words[place - 1] == "-m":
                    yield MODULES[word], words[place + 1 :]
                    break


def pages(root):
    return [path for pattern in PLACES for path in sorted(root.glob(pattern))]


def test_each_is_taken(root, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(root / "training"))
    monkeypatch.syspath_prepend(str(root))
    count, wrong = 0, []
    for page in pages(root):
        for name, arguments in commands(page.read_text()):
            if name == "training.evaluate" and {"--tokenizer", "--audio_column"} & set(arguments):
                name += "_tokenizer" if "--tokenizer" in arguments else "_speech"
            folder, _, script = name.partition(".")
            module = importlib.import_module(script if folder == "training" else name)
            if not hasattr(module, "parse_args"):
                continue
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
            count += 1
            try:
                module.parse_args()
            except SystemExit as stopped:
                if stopped.code:
                    wrong.append((page.name, name, capsys.readouterr().err.splitlines()[-1]))
    assert count > 60
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("language", ["python", "py"])
def test_each_block_of_python_compiles(root, language):
    for page in pages(root):
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL):
            compile(textwrap.dedent(block), str(page), "exec")
