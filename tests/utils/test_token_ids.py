"""Token ids in blocks."""

import pytest

from diffusers_vqdit.utils.token_ids import in_blocks


@pytest.mark.parametrize("count", range(9))
def test_blocks_end_once_at_least_and_padding_is_in_the_last_one_alone(count):
    ids = list(range(10, 10 + count))
    found = in_blocks(ids, 2, 4)
    assert found[:count] == ids and set(found[count:]) == {2} and len(found) % 4 == 0 and 0 < len(found) - count <= 4
    cut = in_blocks(ids, 2, 4, limit=4)
    assert len(cut) == 4 and cut == (ids[:4] if count >= 4 else found)
