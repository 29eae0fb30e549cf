"""Every way to load a pipeline, from folders and over HTTP, in new processes with empty caches."""

import pytest


WAYS = ["own", "plugin", "code"]
CELLS = [
    *("plain", "variant", "dtype", "shards", "from_pipe", "swap", "save_again", "models", "later_version"),
    *("missing_file", "revision", "segments", "several"),
]
# Single models need the package, and folders have no revisions.
MATRIX = [
    (way, place, cell)
    for way in WAYS
    for place in ("local", "hub")
    for cell in CELLS
    if not (cell == "models" and way == "code") and not (cell == "revision" and place == "local")
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "place", "cell"), MATRIX)
def test_loading(processes, way, place, cell):
    outcome = processes(way, place)[cell]
    assert outcome == "ok", outcome


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_loading_offline(processes, way):
    outcome = processes(way, "hub", offline=True)["offline"]
    assert outcome == "ok", outcome
