"""Datasets become the same shards of codes whoever encodes them, and however often they are stopped."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training import code_files
from diffusers_vqdit.training.code_files import code_type
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset, shard_size_of
from diffusers_vqdit.utils.fingerprints import file_sha256


COUNT = 40  # of the pictures, two of them broken


@pytest.fixture
def pictures(data_sources, tmp_path):
    return data_sources.write_pictures(tmp_path / "pictures")


@pytest.fixture
def encode(pictures, image_vq, text_vq, tokenizer, tmp_path):
    def run(name, **options):
        dataset = load_training_dataset(train_data_dir=str(pictures), image_column="image")
        given = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer, "image_column": "image"}
        given |= {"caption_column": "text", "label_column": "label", "batch_size": 3, "shard_size": 8}
        given |= {"resolution": 16, "image_augmentations": 2, **options}
        return encode_dataset(dataset, tmp_path / name, **given)

    return run


@pytest.mark.parametrize("rows", [1, 255, 373, 4000, 10_639, 16_384, 1_000_000, 6_400_001, 10**9])
def test_by_default_every_process_has_shards_to_encode_and_few_rows_to_lose(rows):
    size = shard_size_of(rows)
    shards = -(-rows // size)
    assert 256 <= size <= 100_000 and shards >= min(64, rows // 256)
    assert shards <= 64 or size == 100_000  # each is a file that is mapped
    assert size == 256 or size <= rows / 63


def shards_of(folder):
    index = json.loads((folder / "segments.json").read_text())
    return [shard["sha256"] for shard in index["shards"]], index["fingerprints"]


def test_workers_change_nothing_and_name_what_they_skip(encode, caplog):
    alone = encode("alone")
    first = [record.message for record in caplog.records]
    caplog.clear()
    assert shards_of(encode("workers", dataloader_num_workers=2)) == shards_of(alone)
    assert [record.message for record in caplog.records] == first
    assert [part for part in first if "07.png" in part]
    assert [part for part in first if part.startswith("skipped 2 of 40 pictures")]
    assert len(CodeDataset(alone)) == COUNT - 2


def test_buckets_and_parts_of_any_size_give_the_same_codes(encode):
    options = {"resolution": 0, "aspect_ratio_buckets": [[16, 16], [24, 12], [12, 24]]}
    found = [CodeDataset(encode(str(size), **options, batch_size=size, shard_size=COUNT)) for size in (1, 5, 64)]
    for codes in found[1:]:
        for name in codes.codes:
            assert torch.equal(codes.codes[name], found[0].codes[name])
        # The moved copies of a picture depend on it alone.
        assert torch.equal(codes.prompts["image"], found[0].prompts["image"])
        assert codes.fingerprints == found[0].fingerprints


def test_shards_of_any_size_have_the_same_data_fingerprint(encode):
    sizes = [shards_of(encode(str(size), shard_size=size))[1] for size in (3, 8, 100)]
    assert sizes[0] == sizes[1] == sizes[2]


def test_what_is_there_is_not_encoded_again(encode, image_vq, pictures, monkeypatch):
    folder = encode("codes")
    before = (folder / "segments.json").stat().st_mtime_ns
    counted, plain = [], image_vq.encode_codes
    monkeypatch.setattr(image_vq, "encode_codes", lambda x: counted.append(len(x)) or plain(x))
    encode("codes")
    assert not counted and (folder / "segments.json").stat().st_mtime_ns == before
    os.utime(pictures / "03.png")  # written again, with whatever in it
    encode("codes")
    assert sum(counted) == 3 * (COUNT - 2) and not list(folder.glob(".unfinished*"))
    with torch.no_grad():
        image_vq.encoder.conv_in.bias[0] += 1e-3
    counted.clear()
    encode("codes")
    assert counted


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    ("change", "told"), [({}, False), ({"batch_size": 4}, True), ({"label_column": None}, True), ("bias", True)]
)
def test_codes_that_are_replaced_are_told(encode, image_vq, caplog, change, told, damaged):
    folder = encode("codes")
    assert "they are replaced when" not in caplog.text  # by the first
    if change == "bias":
        with torch.no_grad():
            image_vq.encoder.conv_in.bias[0] += 1e-3
    if damaged:
        shutil.copyfile(next(folder.glob("codes-*")), folder / "codes-00099.arrow")
    options = {} if change == "bias" else change
    encode("codes", **options)
    assert (f"{str(folder)!r} has codes of other data, tokenizers or options" in caplog.text) == (told or damaged)
    caplog.clear()
    encode("codes", **options)
    assert "they are replaced when" not in caplog.text


def fail_once(image_vq, monkeypatch):
    """Let the twentieth call fail; how many pictures each is of is listed."""
    counted, plain = [], image_vq.encode_codes

    def encode_codes(pixels):
        counted.append(len(pixels))
        if len(counted) == 20:
            raise RuntimeError("out of memory")
        return plain(pixels)

    monkeypatch.setattr(image_vq, "encode_codes", encode_codes)
    return counted


def test_parts_of_another_run_are_not_removed_without_a_word(encode, image_vq, monkeypatch, caplog):
    fail_once(image_vq, monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode("codes")
    encode("codes", batch_size=2)
    assert "parts in" in caplog.text and "are of other data, models or options: they are removed" in caplog.text


def test_parts_of_a_run_that_failed_are_taken_by_the_next(encode, image_vq, tmp_path, monkeypatch):
    whole = encode("whole")
    counted = fail_once(image_vq, monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        encode("codes")
    left = tmp_path / "codes" / ".unfinished-codes"
    done = sorted(left.glob("part-*.json"))
    assert done
    next(left.glob("codes-00000-0.arrow")).write_bytes(b"damaged")  # which is made again
    stopped = sum(counted)
    assert shards_of(encode("codes")) == shards_of(whole)
    assert sum(counted) - stopped < 3 * (COUNT - 2)


@pytest.mark.parametrize(
    ("size", "kind"),
    [(2, pa.uint8()), (2**8, pa.uint8()), (2**8 + 1, pa.uint16()), (2**16, pa.uint16()), (2**16 + 1, pa.int32())],
)
def test_codes_take_the_smallest_type_that_holds_them(size, kind):
    assert code_type(size) == kind and np.iinfo(kind.to_pandas_dtype()).max >= size - 1


# ---------------------------------------------------------------------------------------------------------------------
# Processes that are killed


def strike(rank: int, number: int, after: bool) -> None:
    """End this process at one of the moments when something is written, moved or removed, just before or after it."""
    places = [(Path, name) for name in ("replace", "unlink", "hardlink_to", "write_text", "mkdir")]
    places += [(shutil, "rmtree"), (code_files.ShardWriter, "_write")]
    count = 0

    def watched(plain):
        def call(*args, **options):
            nonlocal count
            count += 1
            last = count == number
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = plain(*args, **options)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for owner, name in places:
        setattr(owner, name, watched(getattr(owner, name)))


def encode_as(rank, world_size, store, source, image_vq, folder, workers, blow):
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of processes that read, as in the scripts
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    model = ImageVQModel.from_pretrained(image_vq).eval()
    dataset = load_training_dataset(**source)
    if blow is not None and blow[0] == rank:
        strike(*blow)
    options = {"image_column": source["image_column"], "resolution": 16, "batch_size": 2, "shard_size": 3}
    options |= {"lowres_factor": 2, "dataloader_num_workers": workers}
    encode_dataset(dataset, folder, image_vq=model, label_column=source["columns"][1], **options)
    if world_size > 1:
        dist.destroy_process_group()


def started(count, folder, source, image_vq, workers=0, blow=None):
    context = multiprocessing.get_context("forkserver")
    modules = ["training.encoding", "models.image_vq"]
    context.set_forkserver_preload([*(f"diffusers_vqdit.{name}" for name in modules), "datasets"])
    store = folder.parent / f"store-{time.time_ns()}"
    jobs = [
        context.Process(target=encode_as, args=(n, count, store, source, image_vq, folder, workers, blow))
        for n in range(count)
    ]
    for job in jobs:
        job.start()
    return jobs


def content(folder):
    """All files below a folder, and the index of its codes but for what it was encoded from."""
    files = {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}
    index = json.loads((folder / "segments.json").read_text())
    del files["segments.json"], index["source"]
    return files, index


@pytest.mark.parametrize(
    ("kind", "kills", "seed"),
    [
        ("parquet", 2, 0),
        *(pytest.param(kind, 9, 1, marks=pytest.mark.slow) for kind in ("folder", "parquet", "tar")),
    ],
)
def test_two_processes_killed_at_random_points_write_the_shards_of_one(
    pictures, data_sources, image_vq, tmp_path, kind, kills, seed
):
    image_vq.save_pretrained(tmp_path / "image_vq")
    source = data_sources.source_of(pictures, tmp_path / "source", kind)
    source |= {"max_samples": 24, "cache_dir": str(tmp_path / "cache")}
    (alone,) = started(1, tmp_path / "alone", source, tmp_path / "image_vq")
    alone.join(120)
    source["streaming"] = kind != "folder"
    whole = content(tmp_path / "alone")
    rng, left, number, found = random.Random(seed), kills, 0, Counter()
    while left:
        folder, number = tmp_path / f"codes-{number}", number + 1
        for _ in range(rng.randrange(1, 7)):
            how = rng.choice(["one", "all", "writing"])
            rank, blow = rng.randrange(2), None
            if how == "writing":
                blow = (rank, rng.randrange(1, 60), rng.random() < 0.5)
            jobs = started(2, folder, source, tmp_path / "image_vq", rng.randrange(2), blow)
            limit = len(list(folder.rglob("*.json"))) + rng.randrange(6)
            while all(job.is_alive() for job in jobs) and (blow or len(list(folder.rglob("*.json"))) < limit):
                time.sleep(0.002)
            time.sleep(rng.random() * 0.1)
            if not blow and all(job.is_alive() for job in jobs):
                for job in jobs if how == "all" else [jobs[rank]]:
                    os.kill(job.pid, signal.SIGKILL)
                time.sleep(rng.random() * 0.2)  # the other goes on, until it waits
            else:
                jobs[1 - rank].join(0.2)
            killed = False
            for job in jobs:
                killed = killed or job.exitcode == -signal.SIGKILL
                job.kill()
                job.join()
            if not killed and all(job.exitcode == 0 for job in jobs):
                break
            left, found[how] = left - killed, found[how] + killed
            if not left:
                break
        for job in started(2, folder, source, tmp_path / "image_vq", 1):
            job.join(120)
            assert job.exitcode == 0
        assert content(folder) == whole
        assert not list(folder.glob(".unfinished*"))
    print(f"{kind}: {dict(found)} over {number} folders")
