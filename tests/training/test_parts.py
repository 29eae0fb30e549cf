"""Work in parts that several processes share."""

import json
import shutil
import time
from pathlib import Path

import pytest

from diffusers_vqdit.training.parts import make_parts


@pytest.mark.parametrize("slow", [0, 1])
def test_parts_are_taken_away_only_when_all_processes_have_read_them(in_processes, tmp_path, slow):
    def make_and_take_away(rank):
        if rank == slow:
            read = Path.read_bytes

            def read_slowly(path: Path) -> bytes:
                time.sleep(0.1)
                return read(path)

            Path.read_bytes = read_slowly  # of this process
        entries = make_parts(
            tmp_path / "parts", "identity", 5, lambda mine: ((n, {"maker": rank, "files": {}}) for n in mine)
        )
        if rank == 0:
            shutil.rmtree(tmp_path / "parts")
        (tmp_path / f"{rank}.json").write_text(json.dumps(entries))

    assert in_processes(make_and_take_away) == [0, 0]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] and [entry["maker"] for entry in found[0]] == [0, 1, 0, 1, 0]
