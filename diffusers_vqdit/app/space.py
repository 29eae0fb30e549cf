"""The page as a Space of the Hub, with all that it needs, in one commit."""

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from huggingface_hub import CommitInfo, SpaceCardData
from packaging.requirements import Requirement

from ..utils.hub import push_folder, saved_files


PACKAGE = Path(__file__).resolve().parents[1]
APP = '''\
"""The page of {title}; ``python app.py`` shows it on this machine, too."""

from diffusers_vqdit.app.__main__ import main, parse_args


main(parse_args(["--pretrained_model_name_or_path", {name}]))
'''
CARD = """\
---
{data}
---

# {title}

A page to try `{title}`, made with `python -m diffusers_vqdit.app --push_to_space {space}`.
"""


def requirements(extras: set[str]) -> list[str]:
    """What the package needs with these extras, but gradio, which a Space brings."""
    found = [Requirement(line) for line in metadata.requires(PACKAGE.name) or []]
    needed = [
        one for one in found if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras)
    ]
    return sorted({f"{one.name}{one.specifier}" for one in needed if one.name != "gradio"})


def write_space(folder: Path, pipeline: Any, name: str, space: str) -> None:
    """Write a Space: ``app.py``, its card, its requirements, the package, and the pipeline if that is a folder.

    Args:
        folder: an empty folder.
        pipeline: the pipeline.
        name: the folder or Hub id that it was loaded from.
        space: the Space's name on the Hub.
    """
    title = Path(name).resolve().name if Path(name).is_dir() else name
    shown, models = name, [name]
    if Path(name).is_dir():
        shown, models = f"checkpoints/{title}", []
        examples = [path.relative_to(name).as_posix() for path in Path(name).glob("examples/*") if path.is_file()]
        for file in [*saved_files(pipeline, name), *examples]:
            (folder / shown / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(name) / file, folder / shown / file)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=gr.__version__,
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        models=models or None,
        tags=["diffusers_vqdit"],
    )
    files = {
        "app.py": APP.format(title=title, name=json.dumps(shown)),
        "README.md": CARD.format(data=data.to_yaml(), title=title, space=space),
        "requirements.txt": "\n".join(requirements({"app"})) + "\n",
    }
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")


def push_space(pipeline: Any, name: str, space: str, token: str | None = None, **options: Any) -> CommitInfo:
    """Push the page of a pipeline to a Space, which is made if it isn't there, in one commit.

    Args:
        pipeline, name, space: as in [`write_space`].
        token: of the Hub; by default the one that was saved by ``hf auth login``.
        options: more of [`push_folder`].
    """
    with TemporaryDirectory() as folder:
        write_space(Path(folder), pipeline, name, space)
        message = f"The page of {Path(name).name}"
        return push_folder(folder, space, token=token, commit_message=message, space_sdk="gradio", **options)
