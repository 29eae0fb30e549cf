"""Files of tables: single ones, patterns of them, folders of shards and of tars all give the same samples."""

import io
import json
import multiprocessing as mp
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.data_files import DataFilesList
from PIL import Image

from diffusers_vqdit.training import table_files
from diffusers_vqdit.training.data import decode_images, load_splits, load_training_dataset, take_split
from diffusers_vqdit.training.image_stream import ImageStream
from diffusers_vqdit.training.table_files import Splits, compare_files, find_table_files, stream_identity


COUNT = 6


def _open(rank, folders, store, queue):
    torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    splits = load_splits(dataset_name=f"{folders[rank]}/*.parquet", streaming=True)
    said = []
    for read in (
        lambda: ImageStream.open_column(splits, "train", "image"),
        lambda: take_split(splits, "train").rows(folders[0] / "rows", ["text"], {}),
    ):
        try:
            read()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    queue.put(said)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("change", [None, "size", "name", "more"])
def test_processes_that_find_different_files_refuse_them_together(sources, tmp_path, change):
    for folder in ("a", "b"):
        shutil.copytree(sources / "shards", tmp_path / folder)  # written at other times
    path = tmp_path / "b" / "train-1.parquet"
    if change == "size":
        pq.write_table(pq.read_table(path).slice(0, 2), path)
    elif change == "name":
        path.rename(path.with_stem("train-2"))
    elif change == "more":
        shutil.copy(path, path.with_stem("train-2"))
    context = mp.get_context("fork")
    queue, folders = context.Queue(), [tmp_path / "a", tmp_path / "b"]
    jobs = [context.Process(target=_open, args=(rank, folders, tmp_path / "store", queue)) for rank in range(2)]
    for job in jobs:
        job.start()
    both = [queue.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join()
    told = "the processes read different files of the split 'train': process 0 has 2 from"
    assert [[told in said for said in one] for one in both] == [[bool(change)] * 2] * 2
    assert change or both == [["", ""]] * 2


@pytest.mark.parametrize("revision", ["1234", "5678"])
def test_revisions_of_the_hub_are_compared(monkeypatch, revision):
    """By the addresses of files, or what their server says of them."""

    def splits(address, tag):
        files = DataFilesList([f"hf://datasets/user/data{address}/a.parquet"], [("user/data", tag)])
        builder = SimpleNamespace(name="parquet", config=SimpleNamespace(data_files={"train": files}))
        found = Splits()
        found.builder, found.dataset_name = builder, "user/data"
        return found

    for change in ((f"@{revision}", "1234"), ("@1234", revision)):
        told = []
        monkeypatch.setattr(table_files, "from_all_processes", lambda value, told=told: [told.append(value) or value])
        compare_files(splits("@1234", "1234"), "train")
        monkeypatch.setattr(table_files, "from_all_processes", lambda value, told=told: [*told, value])
        same = [stream_identity(splits(*one), "train", "image") for one in (("@1234", "1234"), change)]
        assert (same[0] == same[1]) == (revision == "1234")
        if revision == "1234":
            compare_files(splits(*change), "train")
        else:
            with pytest.raises(ValueError, match=r"dataset_name='user/data': the processes read different files"):
                compare_files(splits(*change), "train")


def picture(row):
    data = io.BytesIO()
    Image.fromarray(np.full((9, 8, 3), 20 * row, np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for name in ("tars", "shards", "texts"):
        (root / name).mkdir()
    rows = [{"image": f"{row}.png", "text": f"caption {row}"} for row in range(COUNT)]
    for row, one in enumerate(rows):
        (root / "texts" / one["image"]).write_bytes(picture(row))
    (root / "texts" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "texts" / "a.csv").write_text("image,text\n" + "".join(f"{r['image']},{r['text']}\n" for r in rows))
    for shard, part in enumerate(np.array_split(np.arange(COUNT), 2)):
        table = {"image": [picture(row) for row in part], "text": [f"caption {row}" for row in part]}
        pq.write_table(pa.table(table), root / "shards" / f"train-{shard}.parquet")
        with tarfile.open(root / "tars" / f"train-{shard}.tar", "w") as file:
            for row in part:
                for ending, data in (("png", picture(row)), ("txt", f"caption {row}".encode())):
                    info = tarfile.TarInfo(f"{row:04d}.{ending}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    return root


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        *((name, range(COUNT)) for name in ("tars", "tars/*.tar", "tars/train-?.tar", "shards", "shards/*.parquet")),
        *(("texts/a.jsonl", range(COUNT)), ("texts/a.csv", range(COUNT)), ("**/*.tar", range(COUNT))),
        *(("tars/train-1.tar", range(3, 6)), ("shards/train-0.parquet", range(3))),
    ],
)
def test_samples_are_those_of_the_files(sources, tmp_path, name, rows):
    image, text = ("png", "txt") if name.endswith((".tar", "tars")) else ("image", "text")
    dataset = load_training_dataset(
        dataset_name=str(sources / name), image_column=image, columns=[text], cache_dir=str(tmp_path)
    )
    pictures, kept = decode_images(dataset, image, 8)
    assert pictures[:, 0, 0, 0].tolist() == [20 * row for row in rows] and kept == list(range(len(rows)))
    assert list(dataset[text]) == [f"caption {row}" for row in rows]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/*.tar", "matches no file"),
        ("texts/*", "has files that end in '.csv', '.jsonl', '.png'; give files of one kind"),
        ("texts/*.png", "end in '.png'; give files of one kind of .parquet, .arrow, .tar, .csv"),
        ("texts/b.csv", "there is no such file"),
    ],
)
def test_other_names_are_refused_with_what_was_found(sources, name, message):
    with pytest.raises(ValueError, match=message):
        load_training_dataset(dataset_name=str(sources / name))


def test_names_of_the_hub_and_folders_are_no_files(tmp_path):
    assert find_table_files("user/data") == find_table_files(str(tmp_path)) == []


@pytest.mark.parametrize("rows", ["1,a cat, sitting\n2,a dog", "1,a cat,\n2,a dog,"])
def test_a_csv_with_more_fields_than_its_header_is_refused(tmp_path, rows):
    """It would be read with its columns shifted."""
    (tmp_path / "data.csv").write_text(f"id,text\n{rows}\n")
    with pytest.raises(ValueError, match="the first row has more fields than the header's 2, 'id', 'text'"):
        load_splits(dataset_name=str(tmp_path / "data.csv"))
