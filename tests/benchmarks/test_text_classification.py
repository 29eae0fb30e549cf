"""The benchmark's own parts: which texts are classes, that the split holds no text twice, nearest by hand."""

import numpy as np
import pytest

from benchmarks.text_classification import HELD_OUT, nearest, parse_args, read_fortunes, write_split


@pytest.fixture
def folder(tmp_path):
    shared = ["stands in both", "so does this"]
    (tmp_path / "one").write_text("\n%\n".join([*(f"one  {i}\nline" for i in range(20)), *shared, "one 0 line"]))
    (tmp_path / "two").write_text("\n%\n".join([*(f"two {i}" for i in range(15)), *shared]) + "\n%\n")
    (tmp_path / "small").write_text("a\n%\nb")
    (tmp_path / "one.dat").write_bytes(b"\x00")
    return tmp_path


def test_classes_are_files_of_enough_texts_that_stand_in_no_other(folder):
    found = read_fortunes(folder, 10)
    assert {name: len(texts) for name, texts in found.items()} == {"one": 20, "two": 15}
    assert found["one"][0] == "one 0 line" and not {"stands in both", "a"} & {t for one in found.values() for t in one}
    with pytest.raises(ValueError, match="has 1 files of 16 texts or more"):
        read_fortunes(folder, 16)


def test_a_split_is_of_the_seed_and_holds_each_text_once(folder, tmp_path):
    fortunes = read_fortunes(folder, 10)
    splits = [write_split(fortunes, tmp_path / "data.parquet", seed) for seed in (0, 0, 1)]
    rows = [{name: list(zip(one["label"], one["text"], strict=True)) for name, one in s.items()} for s in splits]
    assert rows[0] == rows[1] != rows[2]
    for one in rows:
        assert sorted(one["train"] + one["test"]) == sorted((n, t) for n, texts in fortunes.items() for t in texts)
        held = [label for label, _ in one["test"]]
        assert {name: held.count(name) for name in fortunes} == {"one": 20 // HELD_OUT, "two": 15 // HELD_OUT}


def test_the_nearest_text_is_that_of_the_largest_cosine():
    train = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert nearest(train, np.array([[0.0, 1.0], [0.9, 0.1]]), ["a", "b", "c"]) == ["c", "a"]
    assert parse_args(["--only", "codes"]).only == ["codes"]
