"""Folders of many files: what is read of them lies in files, in the order and of the types that it always had."""

import json
import os
import tempfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vqdit.training import file_lists
from diffusers_vqdit.training import folder_tables as module
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.file_lists import FileList, sorted_paths, sorted_texts
from diffusers_vqdit.training.folder_tables import folder_tables


TEXTS = st.text(st.characters(exclude_characters="/\0"), max_size=4)  # lone surrogates, too


def write_folder(folder, count, suffix, metadata):
    folder.mkdir()
    names = [f"{index:06d} of the files{suffix}" for index in range(count)]
    for name in names:
        (folder / name).touch()
    if metadata:
        rows = (json.dumps({"file_name": name, "text": f"what {name} shows " * 8}) for name in reversed(names))
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    return names[::-1] if metadata else names


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize(("column", "suffix"), [("image", ".png"), ("audio", ".wav")])
def test_memory_does_not_grow_with_the_files(tmp_path, monkeypatch, column, suffix, metadata):
    monkeypatch.setattr(file_lists, "SORTED_TOGETHER", 1000)
    peaks = []
    for count in (500, 1_500, 6_000):  # the first makes what is made once
        folder, cache = tmp_path / f"{count}", tmp_path / "cache"
        names = write_folder(folder, count, suffix, metadata)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        dataset = load_training_dataset(train_data_dir=str(folder), cache_dir=str(cache))
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
        assert [value["path"] for value in dataset.with_format("arrow")[:][column].to_pylist()] == [
            str(folder / name) for name in names
        ]
        assert not list(cache.iterdir()) and len(list(folder.iterdir())) == count + metadata
    assert peaks[2] - peaks[1] < 1 << 20  # of 4 MB more, with metadata 7


@pytest.mark.parametrize("is_file", [True, False])
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, is_file):
    write_folder(tmp_path / "files", 3, ".png", True)
    if is_file:
        (tmp_path / "cache").touch()
    else:
        real = tempfile.TemporaryFile

        def refuse(*args, dir=None, **kwargs):
            if dir is not None:
                raise PermissionError(13, "Permission denied", str(dir))
            return real(*args, **kwargs)

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert len(load_training_dataset(train_data_dir=str(tmp_path / "files"), cache_dir=str(tmp_path / "cache"))) == 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(TEXTS.filter(lambda name: name.strip(".")), min_size=1, max_size=3).map("/".join)))
def test_paths_are_in_the_order_of_paths(tmp_path_factory, paths):
    cache = tmp_path_factory.mktemp("cache")
    paths = [f"/pictures/{path}" for path in paths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_lists, "SORTED_TOGETHER", 3)
        assert list(sorted_paths(paths, cache)) == [
            path for _, path in sorted((Path(path).parts, path) for path in paths)
        ]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="nothing tells of open files")
def test_texts_are_sorted_in_one_file(tmp_path, monkeypatch):
    """As many files as there are parts would be more than may be open."""
    monkeypatch.setattr(file_lists, "SORTED_TOGETHER", 3)
    texts, before = [f"{number * 7919 % 5000:04d}" for number in range(5000)], len(os.listdir("/proc/self/fd"))
    found = sorted_texts(texts, tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert list(found) == sorted(texts)


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2500])
def test_a_list_in_a_file_is_a_list(tmp_path, count):
    found = FileList(({"number": number} for number in range(count)), tmp_path)
    assert len(found) == count and [one["number"] for one in found] == list(range(count))
    assert all(found[index]["number"] == index for index in range(0, count, 333))
    for first, end in ((0, 0), (count // 3, count // 2), (count // 2, count), (0, count)):
        assert [one["number"] for one in found.part(first, end)] == list(range(first, end))
    assert not list(tmp_path.iterdir())


KINDS = [
    *(st.none(), st.text(max_size=2), st.booleans(), st.floats(allow_nan=False), st.just([])),
    *(st.integers(-9, 9), st.sampled_from([2**53 + 1, 2**63, 2**70]), st.binary(max_size=1)),
    *(st.lists(st.text(max_size=1), max_size=2), st.lists(st.integers(0, 9), max_size=2), st.datetimes()),
    *(st.decimals(-99, 99, places=places) for places in (0, 3)),
    st.dictionaries(st.sampled_from("ab"), st.one_of(st.none(), st.integers(0, 9), st.floats(0, 1)), max_size=2),
]
# Of two kinds at most, else hardly any column had a type.
COLUMNS = st.lists(st.sampled_from(KINDS), min_size=1, max_size=2).flatmap(
    lambda kinds: st.lists(st.one_of(*kinds), min_size=1, max_size=9)
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(COLUMNS, st.integers(1, 4))
def test_types_found_batch_by_batch_are_those_of_all_values(tmp_path_factory, values, together):
    from datasets import Image

    whole = values
    if any(isinstance(one, list) for one in values) and any(isinstance(one, str) for one in values):
        whole = [[one] if isinstance(one, str) else one for one in values]
    try:
        expected = pa.array(whole)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        expected = None
    samples = [(f"/f/{row}.png", {"value": value}) for row, value in enumerate(values)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_lists, "ROWS_TOGETHER", together)
        options = {"cache_dir": tmp_path_factory.mktemp("cache")}
        (dataset,) = folder_tables(Path("/f"), samples, "image", Image(decode=False), **options).values()
    assert dataset.column_names == ["image"] + ["value"] * (expected is not None)
    if expected is not None:
        assert dataset.data.column("value").combine_chunks().cast(expected.type).equals(expected)
        assert dataset.data.schema.field("value").type == expected.type


def subset(row):
    """Some of a few keys, others in each batch."""
    return {f"key {place}": row for place in range(16) if row // 50 * 40503 >> place & 1}


WIDE = {
    "a new key in each row": lambda row: {"value": {f"key {row}": row}},
    "a new key in each row of a list": lambda row: {"value": [{"key": row}, {f"key {row}": [row]}]},
    "a new key in some batches": lambda row: {"value": {f"key {row // 300}": row, "text": "some words " * 9}},
    "other keys in each batch": lambda row: {"value": subset(row)},
    "a new column in each row": lambda row: {f"value {row}": row},
}


@pytest.mark.parametrize("make", WIDE.values(), ids=WIDE)
def test_memory_does_not_grow_with_new_keys(monkeypatch, make):
    """While the types of columns are found."""
    monkeypatch.setattr(file_lists, "ROWS_TOGETHER", 50)
    monkeypatch.setattr(module, "_MAX_FIELDS", 100)
    peaks = []
    for count in (500, 1_000, 5_000):  # the first makes what is made once
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        module._column_types((("/f/0.png", make(row)) for row in range(count)), [])
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 1 << 18


@pytest.mark.parametrize("together", [1, 3, 1000])
@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda key: {key: 1},
        lambda key: {key: None},
        lambda key: [{}, {key: "a"}],
        lambda key: {"a": {"b": [{key: True}]}},
        lambda key: {"0": 1, key: 2, "1": 3.5},
    ],
)
def test_dictionaries_with_too_many_fields_are_no_column(tmp_path, monkeypatch, caplog, make, count, together):
    from datasets import Image

    monkeypatch.setattr(file_lists, "ROWS_TOGETHER", together)
    monkeypatch.setattr(module, "_MAX_FIELDS", 4)
    rows = [{"value": make(str(key % count)), "text": "a"} for key in range(7)]
    samples = [(f"/f/{row}.png", value) for row, value in enumerate(rows)]

    def read(**options):
        (dataset,) = folder_tables(
            Path("/f"), samples, "image", Image(decode=False), cache_dir=tmp_path, **options
        ).values()
        return dataset

    problem = "column 'value' has dictionaries with more than 4 different fields"
    if count == 4:
        kind = pa.array([row["value"] for row in rows]).type
        assert read(columns=["value"]).data.schema.field("value").type == kind and not caplog.text
    else:
        assert read(columns=["text"]).column_names == ["image", "text"] and f"{problem}; it is left out" in caplog.text
        with pytest.raises(ValueError, match=problem):
            read(columns=["value"])


def test_columns_that_are_asked_for_are_read_whatever_others_there_are(tmp_path, monkeypatch, caplog):
    from datasets import Image

    monkeypatch.setattr(module, "_MAX_FIELDS", 3)
    samples = [(f"/f/{row}.png", {"a": row, f"b {row}": row, "c": 0}) for row in range(4)]
    samples += [("/f/4.png", {"text": "at the end", "other": 1})]
    options = {"columns": ["text"], "cache_dir": tmp_path}
    (dataset,) = folder_tables(Path("/f"), samples, "image", Image(decode=False), **options).values()
    assert dataset.column_names == ["image", "a", "b 0", "c", "text"] and dataset["text"][4] == "at the end"
    assert "there are more than 3 columns: 'b 1' and other new ones from it on are left out" in caplog.text


def test_classes_are_no_column_whose_type_is_found(tmp_path):
    from datasets import Image

    class Samples(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    samples = Samples((f"/f/{name}/{row}.png", {"label": name}) for name in "ba" for row in range(3))
    options = {"classes": ["a", "b"], "columns": ["label"], "cache_dir": tmp_path}
    (dataset,) = folder_tables(Path("/f"), samples, "image", Image(decode=False), **options).values()
    assert samples.passes == 2  # for the splits, and for the table
    assert dataset["label"] == [1, 1, 1, 0, 0, 0] and dataset.features["label"].names == ["a", "b"]
