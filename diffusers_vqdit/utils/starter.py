"""The starter checkpoint, which commands use where no other is named."""

from pathlib import Path


STARTER = Path(__file__).resolve().parents[2] / "model_cards" / "vqdit-emoji"


def check_starter(name: str) -> None:
    """Exit with a message if a pipeline's name is the starter's, and that isn't there."""
    if name == str(STARTER) and not STARTER.is_dir():
        raise SystemExit(
            f"The starter checkpoint is not at {STARTER}: it comes with the source tree, not with the wheel. Run from "
            "a clone, or give --pretrained_model_name_or_path."
        )
