"""Publishing a folder on the Hub in one commit, so that a connection that drops leaves nothing half-published."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects


_push_logger = logging.get_logger(__name__)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    commit_message: str = "Upload folder",
    private: bool | None = None,
    create_pr: bool = False,
    path_in_repo: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] = (),
    max_retries: int = 5,
    wait: float = 1.0,
) -> CommitInfo:
    """Upload a folder to a model repository, which is created if it isn't there, in one commit.

    Weights are uploaded first and become part of the repository with the commit, so its readers see all of the new
    files or none. After a failure the next try, or the next call, uploads only what hasn't arrived.
    `huggingface_hub.upload_folder` may make several commits of a large folder.

    Args:
        folder: its files are published, with their paths in it.
        repo_id: ``"user/name"``, or ``"name"`` in the namespace of the token.
        token: of the Hub; by default the one that was saved by ``hf auth login``.
        private: whether a new repository is private; by default what its namespace says.
        create_pr: open a pull request instead of writing to the main branch.
        path_in_repo: folder of the repository to write to; by default its root.
        allow_patterns, ignore_patterns: wildcards of the files to publish and to leave out.
        max_retries: how often to try again where the server fails or the connection drops.
        wait: seconds before the first retry; each further one waits twice as long.

    Raises:
        ValueError: if there is no file to publish.
        HfHubHTTPError: if the Hub refuses, or fails more than `max_retries` times.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    ignored = [*ignore_patterns, *DEFAULT_IGNORE_PATTERNS]
    names = list(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignored))
    if not names:
        raise ValueError(f"folder={str(folder)!r} has no file to publish (allow_patterns={allow_patterns})")
    api, prefix, repository, operations = HfApi(token=token), f"{path_in_repo}/" if path_in_repo else "", None, None
    for attempt in range(max_retries + 1):
        try:
            repository = repository or api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            operations = operations or [CommitOperationAdd(prefix + name, str(Path(folder) / name)) for name in names]
            return api.create_commit(repository, operations, commit_message=commit_message, create_pr=create_pr)
        except Exception as error:
            if attempt == max_retries or not _is_transient(error):
                raise
            if not isinstance(error, HfHubHTTPError):
                # The answer was lost, and the commit may have been made. New operations look what is there, and what
                # is needn't be committed again; the old ones remember what has been hashed and uploaded.
                operations = None
            delay = wait * 2**attempt
            _push_logger.warning(f"upload to {repo_id} failed, trying again in {delay:.1f} s: {error}")
            time.sleep(delay)


def _is_transient(error: Exception) -> bool:
    """Whether trying again may help: the server failed, or the connection did."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading ..."
        return _is_transient(error.__cause__)
    # The HTTP library of huggingface_hub changed its name between its versions.
    return any(base.__name__ == "TransportError" for base in type(error).__mro__)
