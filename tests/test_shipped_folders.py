"""What every folder of model_cards/ has: a card, whole weights, and no more than 40 megabytes."""

from pathlib import Path

import pytest
from safetensors import safe_open


FOLDERS = sorted(path for path in (Path(__file__).parents[1] / "model_cards").iterdir() if path.is_dir())
EVIDENCE = {
    "vqdit-emoji-32": {"samples.png", "evaluation.json", "evaluation.md"},
    "vqdit-emoji": {"samples.png", "evaluation.json", "evaluation.md"},
    "vqdit-emoji-latent": {"samples.png", "evaluation.json", "comparison.json"},
    "vqdit-talking-emoji": {"evaluation_speech.png", "evaluation_speech.json"},
}


def test_all_folders_are_looked_at():
    assert {folder.name for folder in FOLDERS} >= set(EVIDENCE) and len(FOLDERS) >= 8


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_complete_and_within_40_megabytes(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {str(path.relative_to(folder)) for path in files}
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {"README.md"} | EVIDENCE.get(folder.name, set()) <= names and {"model_index.json", "config.json"} & names
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert weights
    for path in weights:
        with safe_open(path, "pt") as opened:
            assert len(list(opened.keys())) > 0
