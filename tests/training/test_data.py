"""Data for training: columns of any type, read rightly or refused with what would do; what is broken; the order."""

import datetime
import decimal
import io
import itertools
import struct
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image

from diffusers_vqdit.training.columns import CaptionColumn
from diffusers_vqdit.training.data import (
    _by_column,
    decode_images,
    load_splits,
    load_training_dataset,
)
from diffusers_vqdit.training.row_order import shuffled_batches
from diffusers_vqdit.utils.decoding import decode_image
from diffusers_vqdit.utils.labels import encode_labels


COLORS = [(200, 0, 0), (0, 0, 200)]
TEXTS = ["a dot", "红"]
NAMES = ["cat", "dog"]


def picture(color):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(data, "BMP")
    return data.getvalue()


PICTURES = [picture(color) for color in COLORS]
BINARIES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(len(PICTURES[0]))]
STRINGS = [pa.string(), pa.large_string(), pa.string_view()]
OTHERS = {
    "int": pa.array([1, 2]),
    "uint8": pa.array([1, 2], pa.uint8()),
    "float": pa.array([0.5, 2.5]),
    "half": pa.array([0.5, 2.5], pa.float16()),
    "null": pa.nulls(2),
    "timestamp": pa.array([datetime.datetime(2024, 1, 2)] * 2),
    "zoned timestamp": pa.array([datetime.datetime(2024, 1, 2)] * 2, pa.timestamp("ns", tz="UTC")),
    "date": pa.array([datetime.date(2024, 1, 2)] * 2),
    "time": pa.array([datetime.time(1)] * 2),
    "duration": pa.array([datetime.timedelta(1)] * 2),
    "decimal": pa.array([decimal.Decimal("1.5")] * 2),
    "decimal256": pa.array([decimal.Decimal("1.5")] * 2, pa.decimal256(50, 2)),
    "struct": pa.array([{"a": 1, "b": "x"}] * 2),
    "empty struct": pa.array([{}] * 2, pa.struct([])),
    "list of structs": pa.array([[{"bytes": PICTURES[0], "path": None}]] * 2),
    "list of bytes": pa.array([[PICTURES[0]]] * 2),
    "struct in struct": pa.array([{"bytes": {"bytes": PICTURES[0]}}] * 2),
    "bytes of numbers": pa.array([{"bytes": 3, "path": None}] * 2),
    "path of bytes": pa.array([{"bytes": None, "path": b"x"}] * 2),
    "map": pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())),
    "nested strings": pa.array([[["a"]], [["b"]]]),
    "list view": pa.ListViewArray.from_arrays(
        pa.array([0, 1], pa.int32()), pa.array([1, 1], pa.int32()), pa.array(TEXTS)
    ),
    "dictionary of floats": pa.array([0.5, 2.5]).dictionary_encode(),
    "list of dates": pa.array([[datetime.date(2024, 1, 2)]] * 2),
    "four dimensions": pa.array([[[[[1]]]]] * 2),
    "one dimension": pa.array([[1, 2]] * 2),
    "ragged": pa.array([[[1, 2], [3]], [[1]]]),
}


@pytest.fixture
def write(tmp_path):
    numbers = itertools.count()

    def write(**columns):
        path = tmp_path / f"{next(numbers)}.parquet"
        pq.write_table(pa.table(columns), path)
        return str(path)

    return write


def pictures_of(path, cache):
    dataset = load_training_dataset(dataset_name=path, image_column="image", cache_dir=str(cache))
    return decode_images(dataset, "image", 8)


def paths(folder):
    for index, data in enumerate(PICTURES):
        (folder / f"{index}.bmp").write_bytes(data)
    return [str(folder / f"{index}.bmp") for index in range(len(PICTURES))]


def test_pictures_of_every_accepted_type(write, tmp_path):
    files, empty = paths(tmp_path), pa.nulls(2)
    arrays = [pa.array(PICTURES, kind) for kind in BINARIES] + [pa.array(files, kind) for kind in STRINGS]
    arrays += [array.dictionary_encode() for array in arrays[:1] + arrays[4:5]]
    for data in [pa.array(PICTURES, kind) for kind in BINARIES] + [empty]:
        for path in [pa.array(files, kind) for kind in STRINGS] + [empty]:
            if data is not empty or path is not empty:
                arrays.append(pa.StructArray.from_arrays([data, path], ["bytes", "path"]))
        if data is not empty:
            arrays.append(pa.StructArray.from_arrays([pa.array([1, 2]), data], ["more", "bytes"]))
    arrays += [pa.StructArray.from_arrays([pa.array(files, kind)], ["path"]) for kind in STRINGS]
    pixels = [torch.tensor(color).expand(8, 8, 3).tolist() for color in COLORS]
    arrays += [pa.array(pixels, pa.list_(pa.list_(pa.list_(pa.uint8()))))]
    expected = torch.tensor(COLORS, dtype=torch.uint8)[:, :, None, None].expand(2, 3, 8, 8)
    for array in arrays:
        pictures, rows = pictures_of(write(image=array), tmp_path / "cache")
        assert rows == [0, 1] and torch.equal(pictures, expected), array.type
    print(f"types of columns of pictures: {len(arrays)} read")


def refused(read, path):
    """The message of what a file is refused with."""
    with pytest.raises(ValueError) as caught:
        read(path)
    return str(caught.value)


def test_what_is_no_picture_is_refused_by_its_type(write, tmp_path):
    count = 0
    for name, array in {**OTHERS, "bool": pa.array([True, False])}.items():
        try:
            path = write(image=array)
        except pa.ArrowException:  # a type that no parquet file holds
            continue
        told = refused(lambda path: pictures_of(path, tmp_path / "cache"), path)
        assert "column 'image' has the type " in told, (name, told)
        assert "pictures must be " in told or "give it as " in told or "no pictures" in told, (name, told)
        assert str(array.type).split("<")[0].split("[")[0] in told or "dictionary" in name, (name, told)
        count += 1
    for kind in BINARIES[:2] + STRINGS[:2]:  # the right type, and nothing in it
        told = refused(lambda path: pictures_of(path, tmp_path / "cache"), write(image=pa.nulls(2, kind)))
        assert told == "column 'image': none of the 2 pictures could be read"
        count += 1
    assert count > 25
    print(f"types of columns that are no pictures: {count} refused")


def test_captions_and_labels_of_every_type(write, tmp_path):
    def texts(path):
        dataset = load_training_dataset(dataset_name=path, columns=["text"], cache_dir=str(tmp_path / "cache"))
        return list(CaptionColumn(dataset, "text"))

    def labels(path):
        dataset = load_training_dataset(dataset_name=path, columns=["text"], cache_dir=str(tmp_path / "cache"))
        return encode_labels(dataset["text"], "text", dataset.features["text"])

    plain = [pa.array(TEXTS, kind) for kind in STRINGS] + [pa.array(TEXTS).dictionary_encode()]
    lists = [pa.array([[text] for text in TEXTS], kind) for kind in (pa.list_(pa.string()), pa.list_(pa.string(), 1))]
    lists += [pa.array([[text] for text in TEXTS], kind) for kind in map(pa.large_list, STRINGS)]
    lists += [pa.array([[text] for text in TEXTS], pa.list_(pa.dictionary(pa.int32(), pa.string())))]
    for array in plain + lists:
        assert texts(write(text=array)) == [[text] for text in TEXTS], array.type
    numbers = [pa.array([7, 3], kind) for kind in (pa.int8(), pa.uint64(), pa.float32(), pa.float16())]
    numbers += [pa.array([7, 3]).dictionary_encode()]
    for array in plain:
        assert labels(write(text=array))[1] == dict(enumerate(sorted(TEXTS))), array.type
    for array in numbers:
        codes, names = labels(write(text=array))
        assert codes.tolist() == [1, 0] and names == {0: "3", 1: "7"}, array.type
    count = 0
    for read, arrays in ((texts, list(OTHERS.values()) + numbers), (labels, [*OTHERS.values(), *lists])):
        for array in arrays:
            if read is labels and pa.types.is_integer(array.type):
                continue
            try:
                path = write(text=array)
            except pa.ArrowException:
                continue
            told = refused(read, path)
            assert "column 'text'" in told and any(
                words in told for words in ("must be strings", "labels are strings", "have no caption", "give it as ")
            ), (array.type, told)
            count += 1
    assert count > 50
    print(f"types of columns of texts: {len(plain + lists)} read, of labels {len(plain + numbers)}, {count} refused")


def test_files_that_are_no_tables(write, tmp_path):
    def read(path):
        return load_training_dataset(dataset_name=str(path), columns=["text"], cache_dir=str(tmp_path / "cache"))

    whole = write(text=pa.array(TEXTS), other=pa.array([1, 2]))
    data = open(whole, "rb").read()
    cases = {"empty": b"", "text": b"hello " * 99, "csv": b"text\na\n", "zeros": bytes(500), "magic": b"PAR1PAR1"}
    cases |= {f"cut {at}": data[:at] for at in (4, 50, len(data) // 2, len(data) - 1)}
    cases |= {"twice its footer": data + data[-60:-8], "flipped footer": data[:-200] + bytes(192) + data[-8:]}
    for name, content in cases.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        told = refused(read, tmp_path / f"{name}.parquet")
        assert told.startswith(f"dataset_name='{tmp_path / name}.parquet' is no parquet file that can be read: "), told
    (tmp_path / "folder.parquet").mkdir()
    assert "folder.parquet' is no folder that can be loaded: " in refused(read, tmp_path / "folder.parquet")
    assert "nothing.parquet': there is no such file" in refused(read, tmp_path / "nothing.parquet")
    assert refused(read, write(text=pa.array([], pa.string()))).endswith(".parquet' has no rows")
    twice = str(tmp_path / "twice.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array(TEXTS)] * 2, names=["text", "text"]), twice)
    assert refused(read, twice).endswith("has several columns called 'text'; they must have different names")
    assert "column 'split' has ['a'] in row 0" in refused(
        read, write(text=pa.array(TEXTS), split=pa.array([["a"]] * 2))
    )
    assert "column 'text' is not in the data: it has ['Text']" in refused(read, write(Text=pa.array(TEXTS)))
    assert "is no dataset of the Hub that can be loaded" in refused(read, "nobody/nothing")
    print(f"files that are no tables: {len(cases) + 7} refused")


@pytest.mark.parametrize("streaming", [False, True], ids=["copied", "streamed"])
@pytest.mark.parametrize("counts", [(0, 2), (2, 0), (1, 0, 1)], ids=str)
def test_files_without_rows_among_others_add_none(tmp_path, counts, streaming):
    texts, folder = iter(TEXTS), tmp_path / "data"
    folder.mkdir()
    for index, count in enumerate(counts):
        column = pa.array([next(texts) for _ in range(count)], pa.string())
        pq.write_table(pa.table({"text": column}), folder / f"{index}.parquet")
    for name in (str(folder), f"{folder}/*.parquet"):
        source = {"dataset_name": name, "columns": ["text"], "cache_dir": str(tmp_path / "cache")}
        found = load_training_dataset(**source, streaming=streaming)
        assert list((found.rows(tmp_path / "rows", ["text"], {}) if streaming else found)["text"]) == TEXTS


@pytest.mark.parametrize("texts", [["01", "1", "1e2", "100"], ["1", "", "None", "NA"], ["true", "null", "nan", "1.0"]])
def test_texts_of_a_csv_table_are_read_as_they_stand(tmp_path, texts):
    """As those of metadata.csv; an empty field alone is a missing one."""
    lines = ["image,label", *(f"{row}.png,{text}" for row, text in enumerate(texts))]
    (tmp_path / "a.csv").write_text("\ufeff" + "\n".join(lines) + "\n")
    dataset = load_training_dataset(dataset_name=str(tmp_path / "a.csv"), cache_dir=str(tmp_path / "cache"))
    assert list(dataset["label"]) == [text or None for text in texts]


def test_a_folder_of_parquet_files_may_be_called_like_one(write, tmp_path):
    (tmp_path / "spark.parquet").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "spark.parquet" / "part-0.parquet")
    dataset = load_training_dataset(dataset_name=str(tmp_path / "spark.parquet"), cache_dir=str(tmp_path / "cache"))
    assert list(dataset["text"]) == TEXTS


def test_columns_that_are_not_needed_are_left_out_with_a_warning(write, tmp_path, caplog):
    path = write(text=pa.array(TEXTS), odd=OTHERS["map"])
    splits = load_splits(dataset_name=path, columns=["text"], cache_dir=str(tmp_path / "cache"))
    assert list(splits["train"]["text"]) == TEXTS and splits["train"].column_names == ["text"]
    assert "column 'odd' has the type map<string, int64" in caplog.text and "it is left out" in caplog.text
    for needed in ("odd", ["odd"]):
        with pytest.raises(ValueError, match="column 'odd' has the type map<string, int64"):
            load_training_dataset(dataset_name=path, image_column=needed, cache_dir=str(tmp_path / "cache"))


def test_an_image_folder_loads_with_captions_and_labels(picture_folder):
    dataset = load_training_dataset(
        train_data_dir=str(picture_folder), columns=["text", "label"], image_column="image"
    )
    assert len(dataset) == 10 and "a red apple" in dataset["text"]
    pictures, rows = decode_images(dataset, "image", 16)
    assert pictures.shape == (10, 3, 16, 16) and pictures.dtype == torch.uint8 and rows == list(range(10))


def test_a_corrupt_file_is_skipped_with_its_name(picture_folder, caplog):
    (picture_folder / "3.png").write_bytes(b"no picture at all")
    (picture_folder / "5.png").write_bytes((picture_folder / "5.png").read_bytes()[:60])
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image")
    pictures, rows = decode_images(dataset, "image", 16)
    assert len(pictures) == len(rows) == 8
    assert "3.png" in caplog.text and "5.png" in caplog.text and "skipped 2 of 10" in caplog.text


@pytest.mark.parametrize(
    "error",
    [OSError("x"), ValueError("x"), SyntaxError("x"), AttributeError("x"), MemoryError("x"), struct.error("x")]
    + [Image.DecompressionBombError("x"), RecursionError("x"), OverflowError("x"), ZeroDivisionError("x")],
)
def test_whatever_a_picture_raises_it_is_skipped(picture_folder, caplog, monkeypatch, error):
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image")
    read = decode_image

    def broken(value, *args, **options):
        if Path(value["path"]).stem in "24":
            raise error
        return read(value, *args, **options)

    monkeypatch.setattr("diffusers_vqdit.training.data.decode_image", broken)
    assert decode_images(dataset, "image", 16)[1] == [0, 1, 3, 5, 6, 7, 8, 9]
    assert "2.png" in caplog.text and type(error).__name__ in caplog.text and "skipped 2 of 10" in caplog.text


def test_many_broken_pictures_are_named_up_to_twenty(caplog):
    import pyarrow as pa
    from datasets import Image as ImageFeature

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    values = [{"bytes": buffer.getvalue(), "path": None}, None, {"bytes": None, "path": None}]
    values += [{"bytes": b"broken", "path": f"{index}.png"} for index in range(40)]
    column = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    dataset = Dataset(pa.table({"image": column})).cast_column("image", ImageFeature(decode=False))
    pictures, rows = decode_images(dataset, "image", 4)
    assert rows == [0] and pictures.shape == (1, 3, 4, 4)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 21 and messages[-1] == "skipped 42 of 43 pictures that could not be read"
    assert "in row 1: " in messages[0] and "in row 2: " in messages[1] and "0.png: " in messages[2]
    with pytest.raises(ValueError, match="column 'image': none of the 42 pictures could be read"):
        decode_images(dataset.select(range(1, 43)), "image", 4)


@pytest.mark.parametrize("count", [3, 30_000])
@pytest.mark.parametrize("mixed", [False, True])
def test_rows_of_a_split_column_keep_their_order_and_take_little_memory(monkeypatch, count, mixed):
    """8 bytes a row until they are selected, where a list of Python's numbers takes 40."""
    names = ["train", "test", None]
    rows = sorted(range(count), key=lambda row: 0 if mixed else row % 3)
    source = Dataset.from_dict({"row": rows, "split": [names[row % 3] for row in rows]})
    splits = _by_column({"train": source})
    assert {name: table["row"][:] for name, table in splits.items()} == {
        name: list(range(index, count, 3)) for index, name in enumerate(names[:2])
    }
    monkeypatch.setattr(Dataset, "select", lambda dataset, indices: indices)
    tracemalloc.start()
    kept = _by_column({"train": source})
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sum(map(len, kept.values())) == count * 2 // 3 and (count < 1000 or used < 16 * count)


def test_the_split_column_selects_rows(root):
    path = str(root / "training/data/emoji.parquet")
    train = load_training_dataset(dataset_name=path, columns=["text"])
    test = load_training_dataset(dataset_name=path, split="test", max_samples=7)
    assert len(train) == 3479 and len(test) == 7 and set(test["split"]) == {"test"}
    with pytest.raises(ValueError, match=r"split='dev' is not .*\['test', 'train'\]"):
        load_training_dataset(dataset_name=path, split="dev")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either dataset_name or train_data_dir"),
        ({"train_data_dir": "no/such/folder"}, "'no/such/folder' is not a folder"),
        ({"dataset_name": "none.parquet"}, "'none.parquet': there is no such file"),
    ],
)
def test_bad_sources_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        load_training_dataset(**options)


def test_a_missing_column_is_named_with_those_there(picture_folder):
    with pytest.raises(ValueError, match="column 'caption' is not in the data: it has .*'text'"):
        load_training_dataset(train_data_dir=str(picture_folder), columns=["caption"])


def test_batches_cover_each_epoch_and_resume_where_they_were():
    batches = shuffled_batches(10, 4, seed=1)
    seen = torch.cat([next(batches) for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    resumed = shuffled_batches(10, 4, seed=1, start=3)
    assert torch.equal(next(resumed), seen[12:16])
    ranks = [next(shuffled_batches(10, 2, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    assert torch.equal(torch.cat(ranks), seen[:4])


def test_the_emoji_dataset_is_what_its_readme_says(root):
    from datasets import load_dataset

    data = load_dataset("parquet", data_files=str(root / "training/data/emoji.parquet"), split="train")
    rows = data.remove_columns("image").to_pandas()
    assert rows.held_out.value_counts().to_dict() == {"": 3479, "composition": 236, "picture": 71}
    assert len(set(rows.label)) == 10
    train, held = rows[rows.split == "train"], rows[rows.held_out == "composition"]
    assert set(held.emoji) <= set(train.emoji)  # every role is known,
    assert set(held.skin_tone.str.split("+").explode()) <= set(train.skin_tone.str.split("+").explode())  # every tone,
    for column in ("text", "text_zh", "phrase"):  # and never the two together
        assert not set(held[column]) & set(train[column])
