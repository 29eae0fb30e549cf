"""Codes that stay on disk: rows of any shards and record batches are read as they were written, and no others."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vqdit import Task
from diffusers_vqdit.training import code_files
from diffusers_vqdit.training.code_files import read_shard, write_index, write_shard
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.mapped_codes import CodeChunk, CodeColumn


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 99))
def test_rows_are_found_in_their_chunks(counts, seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 200, size) for chunk in counts for size in chunk]
    chunks, first = [], 0
    for chunk in counts:
        own = rows[first : first + len(chunk)]
        chunks.append(CodeChunk(np.concatenate(own).astype(np.uint8), np.cumsum([0, *chunk])))
        first += len(chunk)
    column = CodeColumn(chunks)
    assert len(column) == len(rows) and column.sizes().tolist() == [len(row) for row in rows]
    chosen = rng.integers(0, len(rows), 9)
    assert column.sizes(chosen).tolist() == [len(rows[row]) for row in chosen]
    starts = np.array([rng.integers(0, len(rows[row])) for row in chosen])
    found = column.read(chosen, starts, 1)
    assert found.dtype == np.int64
    assert found[:, 0].tolist() == [rows[row][start] for row, start in zip(chosen, starts, strict=True)]
    for wrong in (-1, len(rows)):
        with pytest.raises(IndexError, match="must be in"):
            column.read(np.array([wrong]), np.array([0]), 1)


@pytest.mark.parametrize("together", [1, 3, 1000])
@pytest.mark.parametrize("size", [7, 300, 70_000])
def test_shards_give_what_was_written(tmp_path, monkeypatch, together, size):
    monkeypatch.setattr(code_files, "ROWS_TOGETHER", together)
    rows = [torch.randint(size, (2, 3)) for _ in range(8)]
    path = tmp_path / "codes-00000.arrow"
    write_shard(path, {"image": rows, "image_prompts": [row.repeat(2, 1, 1) for row in rows]}, {"image": size})
    found = read_shard(path, {"image": {"vocab_size": size, "shape": [2, 3]}}, 8)
    column = CodeColumn(found["image"])
    assert len(column.chunks) == -(-8 // together)
    assert column.chunks[0].values.dtype.itemsize == {7: 1, 300: 2, 70_000: 4}[size]
    read = column.read(np.arange(8), np.zeros(8, np.int64), 6)
    assert torch.equal(torch.from_numpy(read).view(-1, 2, 3), torch.stack(rows))


def write_folder(folder, count):
    folder.mkdir()
    rows = torch.randint(1000, (count, 8, 8), dtype=torch.int16)
    entry = write_shard(folder / "codes-00000.arrow", {"image": list(rows)}, {"image": 1000})
    index = {"segments": {"image": {"vocab_size": 1000, "shape": [8, 8]}}, "labels": [], "lowres_factor": None}
    write_index(folder, {**index, "settings": {}, "fingerprints": {}, "shards": [entry]})
    return rows


def test_memory_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for count in (2_000, 40_000):
        rows = write_folder(tmp_path / str(count), count)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        codes = CodeDataset(tmp_path / str(count))
        chosen = torch.tensor([count - 1, 3, count // 2])
        drawn = codes.batch(chosen, Task.parse("->image"))[1]["image"]
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
        assert torch.equal(drawn, rows[chosen].long()) and torch.equal(codes.codes["image"], rows)
    assert peaks[1] - peaks[0] < 1 << 21  # of 5 MB more
