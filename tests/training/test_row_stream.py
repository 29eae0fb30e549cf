"""What is streamed becomes the folder of codes that the same data become when they are copied first."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusers_vqdit.pipelines.segment_base import SegmentColumn
from diffusers_vqdit.training import row_stream
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.data import load_splits, load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.utils.token_ids import load_tokenizer_of_ids


@pytest.fixture
def sources(data_sources, tmp_path):
    """The same pictures as parquet files and as tars, each with the names of its columns."""
    pictures = data_sources.write_pictures(tmp_path / "pictures")
    found = {kind: data_sources.source_of(pictures, tmp_path / kind, kind) for kind in ("parquet", "tar")}
    return {kind: {**source, "cache_dir": str(tmp_path / "cache")} for kind, source in found.items()}


def whole(folder):
    """All that is in a folder of codes, but for what tells the source on this machine."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = json.loads(files.pop("segments.json"))
    del index["source"]
    return files, index


def both(tmp_path, source, encode, **more):
    """What becomes of data that are copied, and that are streamed."""
    found = []
    for streaming in (False, True):
        shutil.rmtree(tmp_path / "codes", ignore_errors=True)
        dataset = load_training_dataset(**source, **more, streaming=streaming)
        encode(dataset, tmp_path / "codes")
        found.append(whole(tmp_path / "codes"))
    return found


BUCKETS = {"resolution": 0, "aspect_ratio_buckets": [[16, 16], [24, 12], [12, 24]]}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("parquet", {"image_augmentations": 2, "shard_size": 7}),
        ("tar", {**BUCKETS, "lowres_factor": 2, "shard_size": 9}),
        ("parquet", {**BUCKETS, "dataloader_num_workers": 2, "resize_mode": "auto", "shard_size": 16}),
        ("tar", {"max_samples": 17, "shard_size": 6}),
    ],
    ids=["augmented", "buckets", "workers", "first"],
)
def test_a_stream_makes_the_same_folder(sources, image_vq, text_vq, tokenizer, tmp_path, caplog, kind, options):
    image_column, (caption_column, label_column) = sources[kind]["image_column"], sources[kind]["columns"]
    given = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer, "image_column": image_column}
    given |= {"caption_column": caption_column, "label_column": label_column, "batch_size": 3, "resolution": 16}
    given |= options
    samples, told = {"max_samples": given.pop("max_samples", None)}, []

    def encode(dataset, folder):
        caplog.clear()
        encode_dataset(dataset, folder, **given)
        told.append([record.message for record in caplog.records])

    copied, streamed = both(tmp_path, sources[kind], encode, **samples)
    assert streamed == copied and len(copied[1]["shards"]) > 2
    assert [line.partition(": ")[0] for line in told[1]] == [line.partition(": ")[0] for line in told[0]]


def test_texts_and_pictures_alone_and_splits_of_a_column(sources, image_vq, tmp_path, tokenizer, text_vq):
    folder, source = tmp_path / "parquet", sources["parquet"]
    for path in sorted(folder.iterdir()):  # ids of several captions a row make several rows of it
        table = pq.read_table(path)
        said = ["", *[("train", "test")[row % 3 == 1] for row in range(1, len(table))]]
        pq.write_table(table.append_column("split", pa.array(said)), path)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ids = load_tokenizer_of_ids(str(tmp_path / "tokenizer"))
    texts = {"tokenizer": ids, "caption_column": "text", "block_length": 4, "shard_size": 8}
    pictures = {"image_vq": image_vq, "image_column": "image", "shard_size": 8, "resolution": 16}
    for split, options in (("train", texts), ("test", pictures), ("train", {**texts, **pictures})):
        copied, streamed = both(tmp_path, source, lambda *one, o=options: encode_dataset(*one, **o), split=split)
        assert streamed == copied
    with pytest.raises(ValueError, match=r"split='val' is not in the data: it has \['test', 'train'\]"):
        encode_dataset(load_training_dataset(**source, split="val", streaming=True), tmp_path / "codes", **pictures)


@pytest.mark.parametrize("column", ["path", "binary", "array", "fixed", "view"])
def test_pictures_of_any_type_that_is_read_are_streamed(data_sources, image_vq, tmp_path, column, capfd):
    folder = data_sources.write_pictures(tmp_path / "pictures")
    paths = [str(path) for path in sorted(folder.glob("*.png"))][8:12]
    values = {"path": pa.array(paths), "binary": pa.array([open(path, "rb").read() for path in paths])}
    rng = np.random.default_rng(0)
    values["array"] = pa.array(rng.integers(0, 255, (4, 6, 6)).tolist(), pa.list_(pa.list_(pa.uint8())))
    first = values["binary"][0].as_py()
    values["view"] = values["binary"].cast(pa.binary_view())
    values["fixed"] = pa.array([first] * 4, pa.binary(len(first)))
    pq.write_table(pa.table({"image": values[column]}), tmp_path / "x.parquet")
    source = {
        "dataset_name": str(tmp_path / "x.parquet"),
        "image_column": "image",
        "cache_dir": str(tmp_path / "cache"),
    }

    def encode(*one):
        capfd.readouterr()
        encode_dataset(*one, image_vq=image_vq, image_column="image", resolution=16, shard_size=3)

    copied, streamed = both(tmp_path, source, encode)
    assert streamed == copied and "Casting" not in capfd.readouterr().err


def test_sounds_are_measured_once_and_read_later(audio_codecs, tmp_path, caplog):
    path = audio_codecs.sound_table(tmp_path / "sounds.parquet", broken=(2, 5))
    codec, extractor = audio_codecs.audio_codec("encodec")
    columns = {"sound": SegmentColumn("audio", "audio", codec, extractor, options={"max_audio_length": 0.1})}
    columns["kind"] = SegmentColumn("label", "label")
    source = {"dataset_name": str(path), "cache_dir": str(tmp_path / "cache")}
    copied, streamed = both(tmp_path, source, lambda *one: encode_dataset(*one, segments=columns, shard_size=3))
    assert streamed == copied and copied[1]["segments"]["sound"]["shape"] == [10, 3]
    assert caplog.text.count("sounds are cut to 0.1 s") == 2


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.fixture
def reads(monkeypatch):
    """The columns and the shards of a source that are read, in order."""
    found, plain = [], row_stream.RowStream._tables

    def tables(self, columns, shard):
        found.append((tuple(columns), shard))
        return plain(self, columns, shard)

    monkeypatch.setattr(row_stream.RowStream, "_tables", tables)
    return found


def test_pictures_are_read_once_and_no_more_than_they_need(
    sources, image_vq, text_vq, tokenizer, tmp_path, reads, monkeypatch
):
    stream = load_training_dataset(**sources["parquet"], streaming=True)
    given = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer, "image_column": "image"}
    given |= {"caption_column": "text", "label_column": "label", "shard_size": 8, "resolution": 16}
    counted, kind = [], type(stream.builder)
    plain = kind.as_streaming_dataset
    monkeypatch.setattr(kind, "as_streaming_dataset", lambda self: counted.append(self.config.columns) or plain(self))
    encode_dataset(stream, tmp_path / "codes", **given)
    assert reads == [(("text", "label"), n) for n in range(4)] + [(("image",), n) for n in range(4)]
    assert counted == [["text", "label"], ["image"]]  # of a parquet file nothing else is read
    reads.clear()
    encode_dataset(load_training_dataset(**sources["parquet"], streaming=True), tmp_path / "codes", **given)
    assert not reads  # the codes are there already
    path = tmp_path / "parquet" / "2.parquet"
    pq.write_table(pq.read_table(path), path)  # written again, with whatever in it
    encode_dataset(load_training_dataset(**sources["parquet"], streaming=True), tmp_path / "codes", **given)
    assert len(reads) == 8


def test_a_run_goes_on_with_the_files_that_it_needs(sources, image_vq, tmp_path, reads, monkeypatch):
    given = {"image_vq": image_vq, "image_column": "png", "label_column": "cls", "batch_size": 3, "resolution": 16}
    given |= {"shard_size": 8}
    encode_dataset(load_training_dataset(**sources["tar"]), tmp_path / "whole", **given)
    plain, calls = image_vq.encode_codes, []

    def failing(pixels):
        calls.append(len(pixels))
        if sum(calls) > 19:
            raise RuntimeError("out of memory")
        return plain(pixels)

    with monkeypatch.context() as context:
        context.setattr(image_vq, "encode_codes", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            encode_dataset(load_training_dataset(**sources["tar"], streaming=True), tmp_path / "codes", **given)
    reads.clear()
    encode_dataset(load_training_dataset(**sources["tar"], streaming=True), tmp_path / "codes", **given)
    # Two shards of eight rows are there: rows 16 on are those of the third tar on.
    assert reads == [(("png",), 2), (("png",), 3)]
    assert whole(tmp_path / "codes") == whole(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# What can't be streamed


def test_what_cannot_be_streamed_is_refused_before_the_work(sources, image_vq, tmp_path, root):
    (tmp_path / "table.jsonl").write_text(json.dumps({"image": "a.png"}))
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes(b"")
    for place in ("pictures", "sounds"):
        with pytest.raises(ValueError, match=f"{place}' has files of its own, .*: leave streaming out"):
            load_training_dataset(dataset_name=str(tmp_path / place), streaming=True)
    with pytest.raises(ValueError, match="streaming needs dataset_name: a dataset of the Hub, or files"):
        load_training_dataset(train_data_dir=str(tmp_path / "parquet"), streaming=True)
    with pytest.raises(ValueError, match="is of the kind 'json', which has no pictures .*: leave streaming out"):
        load_training_dataset(dataset_name=str(tmp_path / "table.jsonl"), streaming=True)
    parquet = {"dataset_name": sources["parquet"]["dataset_name"], "streaming": True}
    with pytest.raises(ValueError, match=r"column 'photo' is not in the data: it has \['image', 'text', 'label'\]"):
        load_training_dataset(**parquet, image_column="photo")
    with pytest.raises(ValueError, match="column 'text' has the type list<.*pictures must be bytes"):
        load_training_dataset(**parquet, image_column="text")
    with pytest.raises(ValueError, match=r"split='val' is not in the data: it has \['train'\]"):
        load_training_dataset(**parquet, split="val")
    stream = load_training_dataset(**parquet, image_column="image")
    with pytest.raises(ValueError, match="column 'kind' is not in the data"):
        encode_dataset(stream, tmp_path / "codes", image_vq=image_vq, image_column="image", label_column="kind")
    plain = load_splits(**parquet)["train"]
    with pytest.raises(ValueError, match="dataset=IterableDataset must be a datasets.Dataset, or what load_training"):
        encode_dataset(plain, tmp_path / "codes", image_vq=image_vq, image_column="image")


def test_files_that_change_or_break_while_they_are_read_are_named(sources, image_vq, tmp_path):
    stream = load_training_dataset(**sources["parquet"], streaming=True)
    options = {"image_vq": image_vq, "image_column": "image", "resolution": 16}
    plain, path = stream.rows, tmp_path / "parquet" / "3.parquet"

    def rows(*given):
        dataset = plain(*given)
        pq.write_table(pq.read_table(path).slice(0, 2), path)
        return dataset

    stream.rows = rows
    with pytest.raises(ValueError, match="files changed while they were read"):
        encode_dataset(stream, tmp_path / "codes", **options)
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="dataset_name=.*parquet' can't be read"):
        encode_dataset(load_training_dataset(**sources["parquet"], streaming=True), tmp_path / "codes", **options)


GOOD = pa.array(["a", "b"])
INT64 = r"column 'image' has the type int64 in '\S+1.{}', .* struct<bytes"
LATER = {  # files of which the second can't be read as the first is, and what is said of it
    "parquet-missing": ({"label": None}, r"column 'label' is not in '\S+1.parquet', which has \['image', 'more'\]"),
    "parquet-image": ({"image": pa.array([1, 2])}, INT64.format("parquet")),
    "parquet-label": (
        {"label": pa.array([{"a": 1}] * 2)},
        r"column 'label' has the type struct<.* first file, s",
    ),
    "arrow-image": (
        {"image": pa.array([1, 2])},
        INT64.format("arrow"),
    ),
    "arrow-other": (
        {"more": pa.array([{"a": 1}] * 2)},
        r"column 'more' has the type struct<.* in '\S+1.arrow'",
    ),
    "parquet-twice": ({"more ": GOOD}, r"'\S+1.parquet' has several columns called 'label'"),
    "arrow-twice": ({"more ": GOOD}, r"'\S+1.arrow' has several columns called 'label'"),
    "arrow-extra": ({"extra": pa.array([1, 2])}, r"column 'extra' is in '\S+1.arrow' and not in the first file"),
}


def write_two(data_sources, tmp_path, kind, changed):
    """Two files of two pictures each, and the columns of the second changed; None leaves one out."""
    paths = sorted(data_sources.write_pictures(tmp_path / "two").glob("*.png"))
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths[:2]]
    columns = {"image": pa.array(images), "label": GOOD, "more": pa.array([1, 2])}
    for number, one in enumerate([columns, columns | changed]):
        table = pa.table({name: values for name, values in one.items() if values is not None})
        table = table.rename_columns(["label" if name == "more " else name for name in table.column_names])
        if kind == "parquet":
            pq.write_table(table, tmp_path / f"{number}.parquet")
            continue
        with pa.ipc.new_stream(str(tmp_path / f"{number}.arrow"), table.schema) as writer:
            writer.write_table(table)
    return {"dataset_name": f"{tmp_path}/*.{kind}", "cache_dir": str(tmp_path / "cache"), "streaming": True}


@pytest.mark.parametrize("case", LATER)
@pytest.mark.parametrize("here", [True, False], ids=["here", "hub"])
def test_later_files_of_other_columns_are_named(data_sources, image_vq, tmp_path, monkeypatch, case, here):
    changed, said = LATER[case]
    source = write_two(data_sources, tmp_path, case.partition("-")[0], changed)
    columns = {"image_column": "image", "label_column": "label"}
    if here:  # before anything is read
        with pytest.raises(ValueError, match=r"dataset_name='.*' can't be read: " + said):
            load_training_dataset(**source, columns=["label"], image_column="image")
        return
    monkeypatch.setattr(row_stream, "check_files", lambda *_: None)  # as of files that are not here
    stream = load_training_dataset(**source, columns=["label"], image_column="image")
    with pytest.raises(ValueError, match=r"dataset_name='.*' can't be read: columns \[.*\] of '\S+1.*': " + said):
        encode_dataset(stream, tmp_path / "codes", image_vq=image_vq, **columns, resolution=16)


def test_later_files_may_differ_in_what_is_not_asked_for_or_can_be_cast(data_sources, image_vq, tmp_path):
    labels = pa.array(["a", "b"]).dictionary_encode()
    changed = {"label": labels, "more": pa.array([{"a": 1}] * 2), "extra": pa.array([1, 2])}
    source = write_two(data_sources, tmp_path, "parquet", changed)
    pq.ParquetWriter(tmp_path / "2.parquet", pa.schema({"image": pa.int64()})).close()  # of no rows
    stream = load_training_dataset(**source, columns=["label"], image_column="image")
    encode_dataset(stream, tmp_path / "codes", image_vq=image_vq, image_column="image", label_column="label")
    assert len(CodeDataset(tmp_path / "codes")) == 4


def test_a_value_that_cannot_be_read_is_named_with_its_file(data_sources, image_vq, tmp_path):
    source = write_two(data_sources, tmp_path, "parquet", {"more": GOOD})  # numbers, then words
    stream = load_training_dataset(**source, image_column="image")
    with pytest.raises(ValueError, match=r"can't be read: columns \['more'\] of '\S+1.parquet': Failed to parse"):
        encode_dataset(stream, tmp_path / "codes", image_vq=image_vq, image_column="image", label_column="more")


def test_files_that_are_added_meanwhile_are_not_read(sources, image_vq, tmp_path):
    options = {"image_vq": image_vq, "image_column": "image", "label_column": "label", "resolution": 16}
    folder = {**sources["parquet"], "dataset_name": str(tmp_path / "parquet")}
    encode_dataset(load_training_dataset(**folder), tmp_path / "whole", **options)
    stream = load_training_dataset(**folder, streaming=True)
    plain = stream.rows

    def rows(*given):
        dataset = plain(*given)
        shutil.copy(tmp_path / "parquet" / "3.parquet", tmp_path / "parquet" / "4.parquet")
        return dataset

    stream.rows = rows
    encode_dataset(stream, tmp_path / "codes", **options)
    assert whole(tmp_path / "codes") == whole(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# Scripts


def test_the_scripts_stream(run, script, sources, image_vq, tmp_path, capsys):
    image_vq.save_pretrained(tmp_path / "image_vq")
    data = f"--dataset_name {sources['tar']['dataset_name']} --cache_dir {tmp_path / 'cache'} --image_column png"
    data += f" --label_column cls --image_vq {tmp_path / 'image_vq'} --streaming"
    run("encode_dataset", f"{data} --shard_size 8 --device cpu --output_dir {tmp_path / 'codes'}")
    assert len(CodeDataset(tmp_path / "codes")) == 38
    tiny = "--num_layers 1 --num_attention_heads 1 --attention_head_dim 8 --train_batch_size 4 --max_train_steps 1"
    run(
        "train_vqdit",
        f"{data} {tiny} --tasks label->image --report_to none --validation_steps 0 --checkpointing_steps 0 "
        f"--output_dir {tmp_path / 'run'}",
    )
    for name in ("encode_dataset", "train_vqdit"):
        with pytest.raises(SystemExit):
            script(name).parse_args(f"--train_data_dir x --image_vq x --streaming --output_dir {tmp_path}/x".split())
        assert "--streaming needs --dataset_name" in capsys.readouterr().err
