"""Publishing a folder on the Hub in one commit, so that a connection that drops leaves nothing half-published."""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

from .redaction import known_secrets, without_paths, without_secrets
from .remote_code import REMOTE_CODE_FILE
from .weight_files import weight_file_of


_push_logger = logging.get_logger(__name__)

# What tokenizers and processors save besides the vocabulary.
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
}

# Where a model came from, which its config keeps.
_ORIGIN = re.compile(r'("\w*name_or_path":\s*)("(?:[^"\\]|\\.)*")')


def saved_files(saved: Any, folder: str | os.PathLike) -> list[str]:
    """The files of a folder that ``save_pretrained`` of a pipeline, a model or a scheduler writes, and the card.

    They are told by their names, so that nothing else that the folder holds is among them.

    Returns:
        their paths in the folder, sorted.
    """
    found = {name for name in ("README.md", getattr(saved, "config_name", "")) if (Path(folder) / name).is_file()}
    parts = _saved_parts(saved, "")
    if "" not in parts:
        found |= {name for name in [REMOTE_CODE_FILE] if (Path(folder) / name).is_file()}
    for prefix, part in parts.items():
        names = {getattr(part, "config_name", "")}
        if pattern := getattr(part, "index_files", None):
            names |= {path.name for path in (Path(folder) / prefix).glob(pattern)}
        if isinstance(part, torch.nn.Module):
            names |= {"config.json", "generation_config.json"}
        elif part is not saved:
            names |= TOKENIZER_FILES | set(getattr(part, "vocab_files_names", {}).values())
        for path in (Path(folder) / prefix).glob("*"):
            stem, _ = weight_file_of(path.name) or ("", "")
            weights = isinstance(part, torch.nn.Module) and stem in ("diffusion_pytorch_model", "model")
            if path.is_file() and (path.name in names or weights):
                found.add(prefix + path.name)
    return sorted(found)


def _saved_parts(saved: Any, prefix: str) -> dict[str, Any]:
    """What ``save_pretrained`` writes, by folder: a pipeline's components, and those of a component that has some."""
    components = getattr(saved, "components", None) or getattr(saved, "saved_parts", None)
    if not components:
        return {prefix: saved}
    parts = {prefix: saved} if isinstance(saved, torch.nn.Module) else {}
    for name, part in components.items():
        if part is not None:
            parts |= _saved_parts(part, f"{prefix}{name}/")
    return parts


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    commit_message: str = "Upload folder",
    private: bool | None = None,
    create_pr: bool = False,
    path_in_repo: str | None = None,
    files: Sequence[str] | None = None,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] = (),
    space_sdk: str | None = None,
    max_retries: int = 5,
    wait: float = 1.0,
) -> CommitInfo:
    """Upload a folder to a model repository, or a Space, which is created if it isn't there, in one commit.

    Weights are uploaded first and become part of the repository with the commit, so its readers see all of the new
    files or none. After a failure the next try, or the next call, uploads only what hasn't arrived.
    `huggingface_hub.upload_folder` may make several commits of a large folder.

    Args:
        folder: its files are published, with their paths in it. Configs name a local model that theirs was made from
            by the last part of its path only.
        repo_id: ``"user/name"``, or ``"name"`` in the namespace of the token.
        token: of the Hub; by default the one that was saved by ``hf auth login``.
        private: whether a new repository is private; by default what its namespace says.
        create_pr: open a pull request instead of writing to the main branch.
        path_in_repo: folder of the repository to write to; by default its root.
        files: paths in the folder of what is published, and nothing else is; by default all of the folder.
        allow_patterns, ignore_patterns: wildcards of the files to publish and to leave out.
        space_sdk: such as ``"gradio"``, of a Space to upload to, in place of a model repository.
        max_retries: how often to try again where the server fails or the connection drops.
        wait: seconds before the first retry; each further one waits twice as long.

    Raises:
        ValueError: if there is no file to publish, or one of `files` isn't in the folder.
        HfHubHTTPError: if the Hub refuses, or fails more than `max_retries` times.
    """
    if files is not None:
        names = sorted({PurePosixPath(name).as_posix() for name in files})
        for name in names:
            if ".." in name.split("/") or name.startswith("/") or not (Path(folder) / name).is_file():
                raise ValueError(f"files has {name!r}, which is no file in folder={str(folder)!r}")
    else:
        names = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    allowed = None if allow_patterns is None else [*allow_patterns]
    ignored = [*ignore_patterns, *DEFAULT_IGNORE_PATTERNS]
    names = list(filter_repo_objects(names, allow_patterns=allowed, ignore_patterns=ignored))
    if not names:
        raise ValueError(f"folder={str(folder)!r} has no file to publish (allow_patterns={allow_patterns})")
    api, prefix, repository, operations = HfApi(token=token), f"{path_in_repo}/" if path_in_repo else "", None, None
    kind: dict[str, Any] = {} if space_sdk is None else {"repo_type": "space"}
    sdk: dict[str, Any] = {} if space_sdk is None else {"space_sdk": space_sdk}
    attempt = 0
    while True:
        try:
            repository = repository or api.create_repo(repo_id, private=private, exist_ok=True, **kind, **sdk).repo_id
            operations = operations or [CommitOperationAdd(prefix + name, _content(folder, name)) for name in names]
            return api.create_commit(
                repository, operations, commit_message=commit_message, create_pr=create_pr, **kind
            )
        except Exception as error:
            if attempt == max_retries or not is_transient(error):
                raise
            if not isinstance(error, HfHubHTTPError):
                # The answer was lost, and the commit may have been made. New operations look what is there, and what
                # is needn't be committed again; the old ones remember what has been hashed and uploaded.
                operations = None
            delay = wait * 2**attempt
            _push_logger.warning(f"upload to {repo_id} failed, trying again in {delay:.1f} s: {error}")
            time.sleep(delay)
            attempt += 1


def _content(folder: str | os.PathLike, name: str) -> str | bytes:
    """What is uploaded of a file: its path, or for a config that names a folder of this machine its text without."""
    path = Path(folder) / name
    if not name.endswith(("config.json", "model_index.json")):
        return str(path)

    def shortened(match: re.Match) -> str:
        origin = without_secrets(without_paths(json.loads(match.group(2))), known_secrets())
        return match.group(1) + json.dumps(origin)

    text = path.read_text(encoding="utf-8")
    cleaned = _ORIGIN.sub(shortened, text)
    return str(path) if cleaned == text else cleaned.encode("utf-8")


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: the server failed, or the connection did."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading ..."
        return is_transient(error.__cause__)
    # The HTTP library of huggingface_hub changed its name between its versions.
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)
