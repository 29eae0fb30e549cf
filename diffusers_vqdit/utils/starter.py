"""The starter checkpoints, which commands use where no other is named."""

from pathlib import Path


CARDS = Path(__file__).resolve().parents[2] / "model_cards"
STARTER = CARDS / "vqdit-emoji"
TALKING_STARTER = CARDS / "vqdit-talking-emoji"  # of speech, which the other doesn't know


def is_starter(name: str) -> bool:
    """Whether a pipeline's name is that of a starter."""
    return name in (str(STARTER), str(TALKING_STARTER))


def check_starter(name: str) -> None:
    """Raise a ValueError if a pipeline's name is a starter's, and that isn't there."""
    if is_starter(name) and not Path(name).is_dir():
        raise ValueError(
            f"the starter checkpoint is not at {name}: it comes with the source tree, not with the wheel. Run from "
            "a clone, or give --pretrained_model_name_or_path"
        )


def model_id(name: str) -> str:
    """What generated files call a pipeline: a starter by its folder alone, wherever the clone lies."""
    return Path(name).name if is_starter(name) else name
