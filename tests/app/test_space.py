"""The page as a Space: all that it needs, in one commit."""

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement


gr = pytest.importorskip("gradio")

from diffusers_vqdit.app import __main__ as command  # noqa: E402


@pytest.fixture
def folder(make_pipeline, tmp_path):
    """A pipeline with examples, and with what isn't its own."""
    folder = tmp_path / "mine"
    make_pipeline(0).save_pretrained(folder)
    (folder / "examples").mkdir()
    (folder / "examples" / "prompts.json").write_text(json.dumps({"text": ["a red apple"]}))
    (folder / "secret.txt").write_text("private")
    return folder


@pytest.fixture
def push(client, capsys):
    """Push a page as the command does; the files of its Space by path."""

    def push(hub, name, space):
        arguments = ["--pretrained_model_name_or_path", str(name), "--push_to_space", space, "--hub_token", "hf_alice"]
        command.main(command.parse_args(arguments))
        assert f"/spaces/{space}/commit/" in capsys.readouterr().out
        files = hub.repositories[f"spaces/{space}"].resolve("main").files
        return {path: file.content for path, file in files.items()}

    return push


def test_a_space_has_the_page_and_the_pipeline_of_a_folder(hub, push, folder):
    files = push(hub, folder, "alice/page")
    assert len(hub.repositories["spaces/alice/page"].log()) == 2  # the first one makes the repository
    assert "alice/page" not in hub.repositories
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "secret.txt":
            assert f"checkpoints/mine/{path.relative_to(folder).as_posix()}" in files
    assert not [path for path in files if "secret" in path or "__pycache__" in path]
    package = Path(command.__file__).resolve().parents[1]
    for path in package.rglob("*.py"):
        assert files[f"diffusers_vqdit/{path.relative_to(package).as_posix()}"] == path.read_bytes()
    card = SpaceCard(files["README.md"].decode())
    assert (card.data.sdk, card.data.sdk_version, card.data.app_file) == ("gradio", gr.__version__, "app.py")
    assert card.data.title == "mine" and card.data.python_version == f"3.{sys.version_info.minor}"
    needed = {Requirement(line).name for line in files["requirements.txt"].decode().split("\n") if line}
    assert {"torch", "diffusers", "transformers"} <= needed and not needed & {"gradio", "pytest"}
    assert '["--pretrained_model_name_or_path", "checkpoints/mine"]' in files["app.py"].decode()
    assert str(folder.parent) not in "".join(content.decode(errors="ignore") for content in files.values())


def test_a_space_names_a_pipeline_of_the_hub_and_is_pushed_again(hub, push, make_pipeline):
    make_pipeline(0).push_to_hub("alice/model", token="hf_alice")
    files = push(hub, "alice/model", "alice/shown")
    assert not [path for path in files if path.startswith("checkpoints/")]
    assert SpaceCard(files["README.md"].decode()).data.models == ["alice/model"]
    (call,) = [node for node in ast.walk(ast.parse(files["app.py"])) if isinstance(node, ast.List)]
    assert ast.literal_eval(call) == ["--pretrained_model_name_or_path", "alice/model"]
    assert push(hub, "alice/model", "alice/shown") == files


@pytest.mark.slow
def test_the_app_of_a_space_runs_where_nothing_else_is(hub, push, folder, tmp_path):
    for path, content in push(hub, folder, "alice/running").items():
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "GRADIO_SERVER_PORT": port, "PYTHONPATH": "", "PYTHONUNBUFFERED": "1"}
    arguments = {"cwd": tmp_path / "space", "env": environment, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "app.py"], **arguments) as process:
        try:
            line = process.stdout.readline()
            assert f"http://127.0.0.1:{port}" in line
            from gradio_client import Client

            shown, _ = Client(f"http://127.0.0.1:{port}", verbose=False).predict(
                param_1="a red apple", param_3=1, api_name="/draw"
            )
            assert len(shown) == 1
        finally:
            process.terminate()
