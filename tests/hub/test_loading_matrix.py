"""Every way to load a pipeline, from folders and over HTTP, in new processes with empty caches."""

import pytest


WAYS = ["own", "plugin", "code"]
CELLS = [
    "plain",
    "variant",
    "dtype",
    "shards",
    "from_pipe",
    "swap",
    "save_again",
    "models",
    "later_version",
    "missing_file",
]


@pytest.mark.parametrize("place", ["local", "hub"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", [*CELLS, "revision"])
def test_loading(processes, way, place, cell):
    if cell == "models" and way == "code":
        pytest.skip("single models need the package")
    if cell == "revision" and place == "local":
        pytest.skip("folders have no revisions")
    outcome = processes(way, place)[cell]
    assert outcome == "ok", outcome


@pytest.mark.parametrize("way", WAYS)
def test_loading_offline(processes, way):
    outcome = processes(way, "hub", offline=True)["offline"]
    assert outcome == "ok", outcome
