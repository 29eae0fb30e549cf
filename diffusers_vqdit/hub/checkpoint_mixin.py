"""What every class with checkpoints has: a format version in the config, and publishing in one commit."""

import os
from typing import Any

from huggingface_hub import CommitInfo

from .push import push_folder, saved_files


# Raised when a checkpoint means something else than before, so that older code would misread it.
FORMAT_VERSION = 1


class CheckpointMixin:
    """Checkpoints carry the version of their format, and are published in one commit.

    A checkpoint without a version, such as one of diffusers' own classes, is of the first. One of a later version
    than `FORMAT_VERSION` is refused, before anything is loaded.
    """

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config with the version of its format."""
        self.register_to_config(_format_version=FORMAT_VERSION)
        super().save_config(save_directory, push_to_hub, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """The arguments in a config, after a look at its format's version.

        Raises:
            ValueError: if the format is later than what this version reads.
        """
        found = config_dict.get("_format_version", 1)
        if found > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint of {cls.__name__} has format version {found}, but the installed diffusers_vqdit "
                f"reads versions up to {FORMAT_VERSION}: upgrade it, or load an earlier revision of the checkpoint"
            )
        return super().extract_init_dict(config_dict, **kwargs)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo:
        # What `push_to_hub` and `save_pretrained(push_to_hub=True)` of diffusers upload with. The latter's folder is
        # the user's, who may keep other things there.
        return push_folder(
            working_dir,
            repo_id,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            path_in_repo=subfolder,
            files=saved_files(self, working_dir),
        )
