"""Work in parts that several processes share."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from diffusers_vqdit.training.parts import make_parts


def make_and_take_away(rank: int, store: Path, folder: Path, slow: int) -> None:
    """Make parts in one of two processes, of which one is slow to read them; the first one then removes them."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank == slow:
        read = Path.read_bytes

        def read_slowly(path: Path) -> bytes:
            time.sleep(0.1)
            return read(path)

        Path.read_bytes = read_slowly
    entries = make_parts(
        folder / "parts", "identity", 5, lambda mine: ((n, {"maker": rank, "files": {}}) for n in mine)
    )
    if rank == 0:
        shutil.rmtree(folder / "parts")
    (folder / f"{rank}.json").write_text(json.dumps(entries))
    dist.destroy_process_group()


@pytest.mark.parametrize("slow", [0, 1])
def test_parts_are_taken_away_only_when_all_processes_have_read_them(tmp_path, slow):
    context = multiprocessing.get_context("spawn")
    jobs = [
        context.Process(target=make_and_take_away, args=(rank, tmp_path / "store", tmp_path, slow)) for rank in (0, 1)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] and [entry["maker"] for entry in found[0]] == [0, 1, 0, 1, 0]
