"""Datasets become the same shards of codes whoever encodes them, and however often they are stopped."""

import json
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training.code_files import code_type
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset


COUNT = 40


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures of several sizes, two of them broken, with captions of one or several wordings."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for index in range(COUNT):
        size = rng.integers(12, 40, 2)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
        texts = ["a red apple", "an apple"] if index % 5 == 0 else ["a blue box"]
        rows.append({"file_name": f"{index:02d}.png", "text": texts, "label": f"kind {index % 3}"})
    for index in (7, 30):
        (folder / f"{index:02d}.png").write_bytes(b"broken")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def encode(pictures, image_vq, text_vq, tokenizer, tmp_path):
    def run(name, **options):
        dataset = load_training_dataset(train_data_dir=str(pictures), image_column="image")
        given = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer, "image_column": "image"}
        given |= {"caption_column": "text", "label_column": "label", "batch_size": 3, "shard_size": 8}
        given |= {"resolution": 16, "image_augmentations": 2, **options}
        return encode_dataset(dataset, tmp_path / name, **given)

    return run


def shards_of(folder):
    index = json.loads((folder / "segments.json").read_text())
    return [shard["sha256"] for shard in index["shards"]], index["fingerprints"]


def test_workers_change_nothing_and_name_what_they_skip(encode, caplog):
    alone = encode("alone")
    first = [record.message for record in caplog.records]
    caplog.clear()
    assert shards_of(encode("workers", dataloader_num_workers=2)) == shards_of(alone)
    assert [record.message for record in caplog.records] == first
    assert [part for part in first if "07.png" in part] and first[-1].startswith("skipped 2 of 40 pictures")
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


def test_parts_of_a_run_that_failed_are_taken_by_the_next(encode, image_vq, tmp_path, monkeypatch):
    whole, counted, plain = encode("whole"), [], image_vq.encode_codes

    def failing(pixels):
        counted.append(len(pixels))
        if len(counted) == 20:
            raise RuntimeError("out of memory")
        return plain(pixels)

    monkeypatch.setattr(image_vq, "encode_codes", failing)
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
# Processes


def encode_as(rank, world_size, store, pictures, image_vq, folder, workers):
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    model = ImageVQModel.from_pretrained(image_vq).eval()
    dataset = load_training_dataset(train_data_dir=str(pictures), image_column="image")
    options = {"image_column": "image", "resolution": 16, "batch_size": 2, "shard_size": 4, "lowres_factor": 2}
    encode_dataset(dataset, folder, image_vq=model, label_column="label", dataloader_num_workers=workers, **options)


def started(count, folder, *arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["diffusers_vqdit.training.encoding", "diffusers_vqdit.models.image_vq", "datasets"]
    )
    store = folder.parent / f"store-{time.time_ns()}"
    jobs = [context.Process(target=encode_as, args=(n, count, store, *arguments)) for n in range(count)]
    for job in jobs:
        job.start()
    return jobs


@pytest.mark.slow
def test_two_processes_killed_at_random_points_write_the_shards_of_one(pictures, image_vq, tmp_path):
    image_vq.save_pretrained(tmp_path / "image_vq")
    places = (pictures, tmp_path / "image_vq")
    alone = started(1, tmp_path / "alone", *places, tmp_path / "alone", 0)
    rng, folder, kills = random.Random(0), tmp_path / "codes", 0
    parts = folder / ".unfinished-codes"
    for _ in range(2):
        before = len(list(parts.glob("part-*.json")))
        jobs = started(2, folder, *places, folder, rng.randrange(2))
        limit = before + rng.randrange(1, 4)
        while len(list(parts.glob("part-*.json"))) < limit and any(job.is_alive() for job in jobs):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        for job in jobs:
            if job.is_alive():
                kills += 1
                os.kill(job.pid, signal.SIGKILL)
            job.join()
    assert kills
    for job in [*started(2, folder, *places, folder, 1), *alone]:
        job.join(120)
        assert job.exitcode == 0
    assert shards_of(folder) == shards_of(tmp_path / "alone") and not parts.exists()
    codes = CodeDataset(folder)
    assert len(codes) == COUNT - 2 and codes.labels == ["kind 0", "kind 1", "kind 2"]
