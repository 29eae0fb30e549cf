"""Streams: each epoch has every sample once, and a run goes on with the sample after the last it had."""

import io
import itertools
import json
import os
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training import image_dataset, sample_stream
from diffusers_vqdit.training.data import load_splits, take_split
from diffusers_vqdit.training.image_dataset import ImageDataset
from diffusers_vqdit.training.image_stream import ImageStream
from diffusers_vqdit.training.sample_stream import as_dataset
from diffusers_vqdit.training.table_files import split_names, stream_identity


COUNT, SHARDS = 30, 4


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Parquet files of pictures, each of a grey of its own, of uneven numbers of rows."""
    monkeypatch.setattr(sample_stream, "WINDOW", 4)
    (tmp_path / "data").mkdir()
    for shard, rows in enumerate(np.array_split(np.arange(COUNT), SHARDS)):
        values = []
        for row in rows:
            data = io.BytesIO()
            Image.fromarray(np.full((9, 8, 3), 4 * row, np.uint8)).save(data, "PNG")
            values.append({"bytes": data.getvalue(), "path": None})
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        pq.write_table(pa.table({"image": pa.array(values, kind)}), tmp_path / "data" / f"train-{shard}.parquet")
    return tmp_path / "data"


def stream(shards, **options):
    splits = load_splits(dataset_name=f"{shards}/*.parquet", streaming=True)
    return ImageStream(ImageStream.open_column(splits, "train", "image"), "image", 8, seed=1, **options)


def greys(batches, count):
    return torch.cat([batch[:, 0, 0, 0] // 4 for batch in itertools.islice(batches, count)]).tolist()


def test_each_epoch_has_every_sample_in_an_order_of_its_own(shards):
    found = greys(stream(shards).batches(5), 18)
    epochs = [found[start : start + COUNT] for start in (0, COUNT, 2 * COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and sorted(epochs[0]) != epochs[0]
    assert greys(stream(shards).batches(5, num_workers=2), 18) == found


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 6, 7, 13])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_with_the_next_sample(shards, taken, workers):
    options = {"random_crop": True, "random_flip": True}
    whole = list(itertools.islice(stream(shards, **options).batches(5), 20))
    first = stream(shards, **options)
    batches = first.batches(5, workers)
    for _ in range(taken):
        next(batches)
    state = json.loads(json.dumps(first.state_dict()))
    again = stream(shards, **options)
    again.load_state_dict(state)
    for index, batch in enumerate(itertools.islice(again.batches(5), 4)):
        assert torch.equal(batch, whole[taken + index])
    twice = stream(shards, **options)
    twice.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert torch.equal(next(twice.batches(5)), whole[taken + 4])


def test_processes_share_the_samples(shards, monkeypatch):
    found = []
    for rank in range(2):
        monkeypatch.setattr(sample_stream, "process_rank", lambda rank=rank: (rank, 2))
        found.append(greys(stream(shards).batches(7), 2))  # less than the smallest half of the shards has
    assert len(set(found[0] + found[1])) == 28
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was read by 2 processes, and is now by 1"):
        stream(shards).load_state_dict({"processes": {"0": [0, 0, None, 0, 0], "1": [0, 0, None, 0, 0]}})


@pytest.mark.parametrize(("split", "rows"), [("train", 19), ("test", 10), ("0", 19), ("1", 10)])
def test_a_column_says_which_rows_are_of_the_split(shards, tmp_path, caplog, split, rows):
    names = {"0": 0, "1": 1} if split.isdigit() else {"train": "train", "test": "test"}
    first, second = names.values()
    for number in range(SHARDS):
        path = shards / f"train-{number}.parquet"
        table = pq.read_table(path)
        said = [(first, second, first)[row % 3] for row in range(len(table))]
        said[0] = said[0] if number else None  # of no split
        pq.write_table(table.append_column("split", pa.array(said)), path)
    splits = load_splits(dataset_name=f"{shards}/*.parquet", streaming=True)
    assert split_names(splits) == split_names(splits) == sorted(names)
    assert caplog.text.count("1 of 30 rows have nothing in the column 'split' and are left out") == 1
    images = ImageStream(ImageStream.open_column(splits, split, "image"), "image", 8, seed=1)
    found = greys(images.batches(rows), 2)
    copied = load_splits(dataset_name=f"{shards}/*.parquet", cache_dir=str(tmp_path / "cache"))
    expected = ImageDataset(take_split(copied, split, image_column="image"), "image", 8).pictures[:, 0, 0, 0] // 4
    assert sorted(found[:rows]) == sorted(found[rows:]) == sorted(expected.tolist())
    identities = [stream_identity(splits, name, "image") for name in names]
    assert identities[0] != identities[1]


def test_broken_pictures_are_named_and_replaced(caplog):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (40, 40, 40)).save(data, "PNG")
    rows = [{"image": data.getvalue() if index % 3 else b"broken"} for index in range(9)]
    dataset = datasets.Dataset.from_list(rows).to_iterable_dataset()
    made = ImageStream(ImageStream.undecoded(dataset, "image"), "image", 8)
    assert (next(made.batches(9)) == 40).all()
    assert sum("skipped picture at position" in record.message for record in caplog.records) == 3
    dataset = datasets.Dataset.from_list([{"image": b"broken"}] * 4).to_iterable_dataset()
    with pytest.raises(ValueError, match="none of 1000 pictures in a row could be read: at position"):
        next(ImageStream(ImageStream.undecoded(dataset, "image"), "image", 8).batches(4))
    with pytest.raises(ValueError, match=r"column 'photo' is not in the data: it has \['image'\]"):
        ImageStream.undecoded(dataset, "photo")
    words = datasets.Dataset.from_list([{"image": "a.png"}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="streamed pictures must be bytes"):
        ImageStream.undecoded(words, "image")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_of_broken_pictures_is_passed_over(size, workers):
    rows = []
    for grey in range(8):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (4 * grey,) * 3).save(data, "PNG")
        rows += [{"image": data.getvalue()}, {"image": b"broken"}, {"image": b"broken"}]
    dataset = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    made = [ImageStream(ImageStream.undecoded(dataset, "image"), "image", 8, seed=3) for _ in range(3)]
    whole = greys(made[0].batches(size), 20)
    assert len(whole) == 20 * size
    if size == 1:
        assert sorted(whole[:8]) == sorted(whole[8:16]) == list(range(8))  # an epoch has each once
    batches = made[1].batches(size, workers)
    for _ in range(5):
        next(batches)
    made[2].load_state_dict(made[1].state_dict())
    assert greys(made[2].batches(size), 15) == whole[5 * size :]


def test_a_later_file_of_another_column_is_named_before_the_training(shards):
    path = shards / "train-2.parquet"
    plain = pq.read_table(path)
    pq.write_table(plain.append_column("more", pa.array(range(len(plain)))), path)  # which nobody asks for
    assert sorted(greys(stream(shards).batches(5), 6)) == list(range(COUNT))
    pq.write_table(plain.rename_columns(["photo"]), path)
    with pytest.raises(ValueError, match=r"can't be read: column 'image' is not in '\S+train-2.parquet', which has"):
        stream(shards)
    splits = load_splits(dataset_name=f"{shards}/*.parquet", streaming=True)
    unchecked = ImageStream(ImageStream.undecoded(splits["train"], "image"), "image", 8)  # as of the Hub's
    pq.write_table(pa.table({"image": pa.array([1, 2])}), path)
    with pytest.raises(ValueError, match="column 'image' of the stream can't be read: Couldn't cast array"):
        list(itertools.islice(unchecked.batches(5), 8))


def test_the_image_tokenizer_resumes_on_a_stream(run, shards, tmp_path, capsys):
    arguments = (
        f"--dataset_name {shards}/*.parquet --streaming --resolution 8 --block_out_channels 8 8 --norm_num_groups 4 "
        "--latent_channels 8 --num_vq_embeddings 16 --report_to none --train_batch_size 4 --max_train_steps 6 "
        "--checkpointing_steps 4 --validation_split none --random_flip"
    )
    run("train_image_vq", f"{arguments} --output_dir {tmp_path / 'whole'}")
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    run("train_image_vq", f"{arguments} --output_dir {tmp_path / 'broken'} --resume_from_checkpoint latest")
    whole, resumed = (ImageVQModel.from_pretrained(tmp_path / name) for name in ("whole", "broken"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for change in ("--train_data_dir x", "--dataset_name x", "--dataset_name x --max_train_samples 3"):
        with pytest.raises(SystemExit):
            run("train_image_vq", f"--streaming {change}")
        assert "--streaming needs --dataset_name and --max_train_steps" in capsys.readouterr().err
    with pytest.raises(ValueError, match="streaming needs dataset_name: a dataset of the Hub, or files"):
        load_splits(train_data_dir=str(shards), streaming=True)


def moved(shards, change):
    """The data in another folder, as they are or changed."""
    data = shards.with_name("moved")
    shutil.copytree(shards, data)  # with the times
    last = data / f"train-{SHARDS - 1}.parquet"
    if change == "rows":
        pq.write_table(pq.read_table(last).slice(1), last)
    elif change == "time":  # as of other pictures of as many bytes
        os.utime(last, ns=(0, 0))
    elif change == "name":
        last.rename(last.with_stem("train-9"))
    elif change == "fewer":
        last.unlink()
    elif change == "more":
        shutil.copy2(last, last.with_stem("train-9"))
    return data


@pytest.mark.parametrize(
    ("change", "told"), [*((one, True) for one in (None, "rows", "time", "name", "fewer", "more")), ("more", False)]
)
def test_a_run_goes_on_with_the_same_files_alone(run, shards, tmp_path, monkeypatch, change, told):
    arguments = (
        "--streaming --resolution 8 --block_out_channels 8 8 --norm_num_groups 4 --latent_channels 8 --report_to none "
        f"--num_vq_embeddings 16 --train_batch_size 2 --validation_split none --output_dir {tmp_path / 'run'}"
    )
    if told:
        run("train_image_vq", f"{arguments} --dataset_name {shards}/*.parquet --max_train_steps 1")
    else:  # by a version that didn't tell data from others
        with monkeypatch.context() as patch:
            patch.setattr(image_dataset, "stream_identity", lambda *_: None)
            run("train_image_vq", f"{arguments} --dataset_name {shards}/*.parquet --max_train_steps 1")
    arguments += (
        f" --dataset_name {moved(shards, change)}/*.parquet --max_train_steps 2 --resume_from_checkpoint latest"
    )
    if change is None or not told:
        run("train_image_vq", arguments)
        assert (tmp_path / "run" / "checkpoint-2").is_dir()
    else:
        with pytest.raises(ValueError, match="can't be resumed, for it was trained with pictures="):
            run("train_image_vq", arguments)


def test_files_of_a_stream_in_a_file_are_those_of_the_stream():
    """Each in an Arrow batch of its own, which holds 2 GB."""
    values = [{"bytes": b"0", "path": "a"}, b"1", "b", None, {"bytes": b"2"}]
    table = as_dataset([{"image": value} for value in values], "image")
    files = [(None, None) if one is None else (one["bytes"], one["path"]) for one in table["image"]]
    assert files == [(b"0", "a"), (b"1", None), (None, "b"), (None, None), (b"2", None)]
    assert max(len(batch) for batch in table.data.to_batches()) == 1
