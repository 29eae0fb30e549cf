"""Folders of codes that were damaged, mixed up or made by hand: each is refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffusers_vqdit.training.code_files import read_shard, write_index, write_shard
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.utils.fingerprints import file_sha256


SEGMENTS = {
    "image": {"vocab_size": 40_000, "shape": [2, 2]},
    "text": {"vocab_size": 8, "shape": [3]},
    "label": {"vocab_size": 2, "shape": [1]},
}


def read_table(path):
    return pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(pa.OSFile(str(path))).read_all()


def write_table(table, path):
    """A shard of any columns, as this version or an older one writes it."""
    if path.suffix == ".parquet":
        return pq.write_table(table, path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture(params=["arrow", "parquet"])
def folder(tmp_path, request):
    """Two shards of three rows; parquet ones are those of older versions."""
    shards = []
    for number in range(2):
        columns = {
            "image": list(torch.randint(40_000, (3, 2, 2))),
            "text": list(torch.randint(8, (3, 3))),
            "text_prompts": [torch.randint(8, (count, 3)) for count in (1, 2, 3)],
            "label": [torch.tensor([n % 2]) for n in range(3)],
        }
        path = tmp_path / f"codes-{number:05d}.arrow"
        entry = write_shard(path, columns, {name: 40_000 for name in columns} if number else None)
        if request.param == "parquet":
            pq.write_table(read_table(path), path := path.rename(path.with_suffix(".parquet")))
            entry |= {"file": path.name, "sha256": file_sha256(path)}
        shards.append(entry)
    index = {"segments": SEGMENTS, "labels": ["a", "b"], "lowres_factor": None, "settings": {}}
    write_index(tmp_path, {**index, "fingerprints": {"data": "0"}, "shards": shards})
    return tmp_path


def test_the_folder_itself_is_read(folder):
    codes = CodeDataset(folder)
    assert len(codes) == 6 and codes.codes["image"].max() >= 2**15 and codes.prompts["text"].shape == (6, 3, 3)
    assert codes.fingerprint == file_sha256(folder / "segments.json")
    assert sorted(path.stem for path in folder.iterdir()) == ["codes-00000", "codes-00001", "segments"]


def place(folder, number):
    return next(folder.glob(f"codes-{number:05d}.*"))


def index(change, message):
    def damage(folder):
        path = folder / "segments.json"
        content = json.loads(path.read_text())
        changed = change(content)
        path.write_text(json.dumps(content if changed is None else changed))

    return damage, message


def text(message, **change):
    return index(lambda content: content["segments"]["text"].update(change), message)


def raw(content, message):
    return lambda folder: (folder / "segments.json").write_bytes(content), message


def shard(change, message, listed=True, column="text", kind=None):
    """A shard rewritten with another column, and with the SHA-256 of what it became in the index."""

    def damage(folder):
        path = place(folder, 1)
        table = read_table(path)
        if change is not None:
            values = change(table[column].to_pylist())
            table = table.set_column(
                table.column_names.index(column), column, pa.array(values, kind or pa.list_(pa.int64()))
            )
        write_table(table, path)
        if listed:
            content = json.loads((folder / "segments.json").read_text())
            content["shards"][1]["sha256"] = file_sha256(path)
            (folder / "segments.json").write_text(json.dumps(content))

    return damage, message


def first(value):
    return lambda rows: [value, *rows[1:]]


def flipped(folder):
    path = place(folder, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncated(folder):
    path = place(folder, 0)
    path.write_bytes(path.read_bytes()[:-20])


def swapped(folder):
    one, two = place(folder, 0), place(folder, 1)
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def rows(content, value):
    content["shards"][0]["rows"] = value


FLOATS, DAMAGED = r"'text' has list<.*: double>; codes must be lists of integers", "SHA-256 is not the one"
CASES = {
    "index missing": (lambda f: (f / "segments.json").unlink(), r"there is no segments\.json"),
    "index empty": raw(b"", "is no JSON file"),
    "index cut": raw(b'{"segments": {', "is no JSON file"),
    "index binary": raw(b"\xff\xfe\x00", "is no JSON file"),
    "index list": raw(b"[]", r"the index=\[\] must be a JSON object"),
    "index null": raw(b"null", "the index=None must be a JSON object"),
    "index deep": raw(b"[" * 100_000, "is no JSON file"),
    "no segments": index(lambda c: c.pop("segments") and None, "segments=None must be an object"),
    "segments empty": index(lambda c: {**c, "segments": {}}, "segments={} must be an object of one or more"),
    "segments list": index(lambda c: {**c, "segments": []}, r"segments=\[\] must be an object"),
    "segment name": index(lambda c: {**c, "segments": {"a b": SEGMENTS["text"]}}, "segments='a b' must be named"),
    "segment text": index(lambda c: {**c, "segments": {"text": "x"}}, r"segments\['text'\]='x' must be an object"),
    "size string": index(
        lambda c: c["segments"]["text"].update(vocab_size="8"), r"segments\['text'\]=.* positive int"
    ),
    "size float": text(r"segments\['text'\]=.* positive int", vocab_size=8.0),
    "size true": text(r"segments\['text'\]=.* positive int", vocab_size=True),
    "size zero": text(r"segments\['text'\]=.* positive int", vocab_size=0),
    "size huge": text(r"segments\['text'\]=.* positive", vocab_size=2**40),
    "size small": index(
        lambda c: c["segments"]["text"].update(vocab_size=1), r"'text' has codes from 0 to 7.*\[0, 1\)"
    ),
    "shape empty": text(r"segments\['text'\]\.shape=\[\] must be", shape=[]),
    "shape number": text(r"segments\['text'\]\.shape=3 must be", shape=3),
    "shape negative": text(r"segments\['text'\]=.* positive int", shape=[-3]),
    "shape other": text("'text' has 3 codes in row 0, not 4", shape=[4]),
    "shared": index(
        lambda c: c["segments"]["text"].update(shared_with="image"), "shared_with='image' must be a segment"
    ),
    "shared list": index(
        lambda c: c["segments"]["text"].update(shared_with=["image"]), r"shared_with=\['image'\] must be"
    ),
    "centered text": text(r"centered_positions=True needs a grid, not shape=\[3\]", centered_positions=True),
    "centered number": text(r"centered_positions=1 must be", centered_positions=1),
    "labels none": index(lambda c: c.update(labels=None), "labels=None must be a list of strings"),
    "labels number": index(lambda c: c.update(labels=["a", 2]), r"labels=\['a', 2\] must be a list of strings"),
    "labels few": index(lambda c: c.update(labels=["a"]), r"labels=\['a'\] must be the names of the 2 codes"),
    "labels twice": index(lambda c: c.update(labels=["a", "a"]), r"labels=\['a', 'a'\] must be different names"),
    "lowres": index(lambda c: c.update(lowres_factor="2"), "lowres_factor='2' must be null or"),
    "fingerprints": index(lambda c: c.update(fingerprints=[1]), r"fingerprints=\[1\] must be an object"),
    "only one of two": index(lambda c: c.pop("shards") and None, "shards=None must be a list"),
    "shards empty": index(lambda c: c.update(shards=[]), r"shards=\[\] must be a list of one or more"),
    "shard path": index(
        lambda c: c["shards"][0].update(file="../codes-00000.parquet"), "must be files in this folder"
    ),
    "shard listed twice": index(lambda c: c["shards"].append(c["shards"][0]), "must be different files"),
    "shard unlisted": index(lambda c: c["shards"].pop() and None, r"codes-00001\.\w+ are not listed"),
    "rows of a string": index(lambda c: rows(c, "3"), "must be file, rows and sha256"),
    "rows of another count": index(lambda c: rows(c, 4), r"rows of '.*codes-00000\.\w+'=3 must be an integer in \[4"),
    "shard missing": (lambda f: place(f, 0).unlink(), r"codes-00000\.\w+ are missing"),
    "shard renamed": (
        lambda f: place(f, 0).rename(f / "codes-00007.parquet"),
        r"codes-00000\.\w+ are missing",
    ),
    "shard extra": (lambda f: (f / "codes-00002.parquet").write_bytes(b""), r"codes-00002\.parquet are not listed"),
    "shard empty": (lambda f: place(f, 0).write_bytes(b""), DAMAGED),
    "shard cut": (truncated, DAMAGED),
    "shard flipped": (flipped, DAMAGED),
    "shards swapped": (swapped, r"codes-00000\.\w+, codes-00001\.\w+ are damaged"),
    "shard changed": shard(first([0, 0, 0]), DAMAGED, listed=False),
    "code negative": shard(first([0, -1, 0]), "'text' has codes from -1 to"),
    "code is the mask": shard(first([0, 8, 0]), r"'text' has codes from 0 to 8; they must be in \[0, 8\)"),
    "code that wraps": shard(first([0, 2**16 + 1, 0]), "'text' has codes from 0 to 65537"),
    "code that wraps far": shard(first([0, 2**32 + 1, 0]), "'text' has codes from 0 to 4294967297"),
    "code above int64": shard(first([0, 2**63 + 1, 0]), "to 9223372036854775809", kind=pa.list_(pa.uint64())),
    "code missing": shard(first([0, None, 0]), "'text' has missing codes"),
    "row missing": shard(first(None), "'text' has missing codes"),
    "row short": shard(first([0, 0]), "'text' has 2 codes in row 0, not 3"),
    "row long": shard(first([0] * 6), "'text' has 6 codes in row 0, not 3"),
    "prompts empty": shard(first([]), "'text_prompts' has 0 codes in row 0, not a mul", column="text_prompts"),
    "prompts short": shard(first([0] * 4), "'text_prompts' has 4 codes in row 0, not a mul", column="text_prompts"),
    "prompts range": shard(first([0, 0, 9]), "'text_prompts' has codes from 0 to 9", column="text_prompts"),
    "label range": shard(first([2]), "'label' has codes from 0 to 2", column="label"),
    "floats": shard(lambda r: [[0.5] * 3] * 3, FLOATS, kind=pa.list_(pa.float64())),
    "whole floats": shard(lambda r: [[1.0] * 3] * 3, FLOATS, kind=pa.list_(pa.float64())),
    "NaN": shard(lambda r: [[float("nan")] * 3] * 3, FLOATS, kind=pa.list_(pa.float64())),
    "strings": shard(lambda r: [["1"] * 3] * 3, "'text' has list<.*string>", kind=pa.list_(pa.string())),
    "bools": shard(lambda r: [[True] * 3] * 3, "'text' has list<.*bool>", kind=pa.list_(pa.bool_())),
    "numbers": shard(lambda r: [1, 2, 3], "'text' has int64; codes must be lists", kind=pa.int64()),
}


@pytest.mark.parametrize("name", CASES)
def test_damaged_folders_are_refused_by_name(folder, name):
    damage, message = CASES[name]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        CodeDataset(folder)
    assert str(folder) in str(error.value)


ODD = [None, True, -1, 0, 1.5, float("nan"), 2**70, "", "x", [], [0], {}, {"x": 1}]


def test_no_odd_value_in_the_index_is_taken(folder):
    """Each entry of the index in turn is replaced by each odd value."""
    path = folder / "segments.json"
    content = json.loads(path.read_text())

    def places(value, *keys):
        if keys:
            yield keys
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in inner:
            yield from places(one, *keys, key)

    tried = 0
    for *keys, last in places(content):
        for value in ODD:
            changed = json.loads(json.dumps(content))
            inner = changed
            for key in keys:
                inner = inner[key]
            # What can't be known from the folder: other names, fingerprints, a factor, how the data was read.
            named = (keys == ["labels"] or "fingerprints" in (*keys, last)) and value in ("", "x", {}, {"x": 1})
            free = (last == "settings" and isinstance(value, dict)) or (last == "lowres_factor" and value == 2**70)
            if free or (named and (isinstance(value, str) or value == {})) or inner[last] == value:
                continue
            inner[last] = value
            path.write_text(json.dumps(changed))
            with pytest.raises(ValueError, match="segments.json|codes-0000|is no complete folder"):
                CodeDataset(folder)
            tried += 1
    assert tried > 300


def test_columns_that_are_missing_or_unknown(folder):
    path = place(folder, 1)
    table = read_table(path)

    def write(changed):
        write_table(changed, path)
        content = json.loads((folder / "segments.json").read_text())
        content["shards"][1]["sha256"] = file_sha256(path)
        (folder / "segments.json").write_text(json.dumps(content))

    for changed, message in [
        (table.drop_columns(["label"]), r"lacks the columns of the segments \['label'\]"),
        (table.append_column("sound", table["text"]), r"has the columns \['sound'\]"),
        (table.append_column("text", table["text"]), "is no .*file .*that can be read"),
        (table.drop_columns(["text_prompts"]), "some of the shards have a column 'text_prompts'"),
        (table.slice(0, 0), "=0 must be an integer in"),
    ]:
        write(changed)
        with pytest.raises(ValueError, match=message):
            CodeDataset(folder)
    write(table)
    assert len(CodeDataset(folder)) == 6


def test_folders_of_older_versions_are_read_with_a_warning(folder, caplog):
    content = json.loads((folder / "segments.json").read_text())
    old = {name: content[name] for name in ("segments", "labels", "lowres_factor")}
    (folder / "segments.json").write_text(json.dumps(old))
    assert len(CodeDataset(folder)) == 6 and "written by an older version" in caplog.text
    for path in folder.glob("codes-*"):
        path.unlink()
    with pytest.raises(ValueError, match="there is no shard in it"):
        CodeDataset(folder)


def test_damaged_blocks_are_named(folder, tmp_path):
    segments = {"poem": {"vocab_size": 9, "shape": [8], "block_length": 4}}
    for rows, message in (([[1] * 4, [1] * 3], "3 codes in row 1, not whole blocks of 4"), ([[1] * 12], "12 codes")):
        pq.write_table(pa.table({"poem": rows}), tmp_path / "codes.parquet")
        with pytest.raises(ValueError, match=message):
            read_shard(tmp_path / "codes.parquet", segments, len(rows))
