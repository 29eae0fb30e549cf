"""Sizes of pictures that the machine has no room for."""

from types import SimpleNamespace

import psutil
import pytest

from diffusers_vqdit.training import evaluation_pictures
from diffusers_vqdit.training.evaluation_pictures import check_room


@pytest.mark.parametrize(
    ("size", "counts", "disk", "memory"),
    [
        ((32, 32), {"count": 7, "drawn": 3, "batch_size": 1}, 15 * 32 * 32 * 7, 24 * 32 * 32 * 3),
        ((64, 16), {"count": 5, "drawn": 1, "batch_size": 64}, 15 * 64 * 16 * 5, 4 * (3 + 8) * 64 * 16 * 5),
        ((4096, 4096), {"count": 3786, "drawn": 236, "batch_size": 32}, 15 * 2**24 * 3786, 24 * 2**24 * 236),
    ],
)
@pytest.mark.parametrize("lacks", ["nothing", "disk", "memory"])
def test_a_size_is_refused_where_what_it_takes_is_not_there(image_vq, monkeypatch, size, counts, disk, memory, lacks):
    image_vq.register_to_config(block_out_channels=[8, 16])
    there = {"disk": disk - (lacks == "disk"), "memory": memory - (lacks == "memory")}
    monkeypatch.setattr(evaluation_pictures.shutil, "disk_usage", lambda _: SimpleNamespace(free=there["disk"]))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=there["memory"]))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    if lacks == "nothing":
        return check_room("sizes", size, image_vq, **counts)
    place = {"disk": "GiB free on the disk of ", "memory": "GiB memory of cpu"}[lacks]
    with pytest.raises(ValueError, match=rf"sizes=\[{size[0]}, {size[1]}\] needs .* {place}.*: give a smaller one"):
        check_room("sizes", size, image_vq, **counts)
