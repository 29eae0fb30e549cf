"""Kinds of positions that are compared, whatever the folder of codes says."""

import pytest

from benchmarks.aspect_ratios import POSITIONS, with_positions


@pytest.mark.parametrize("said", [{}, {"centered_positions": True}, {"centered_positions": False}])
@pytest.mark.parametrize("positions", POSITIONS)
def test_grids_have_the_positions_that_are_compared(positions, said):
    text, image = {"vocab_size": 9, "shape": [4]}, {"vocab_size": 9, "shape": [4, 4]}
    found = with_positions({"text": text, "image": {**image, **said}}, positions)
    assert found == {"text": text, "image": {**image, "centered_positions": positions != "scaled"}}
