"""Rows with several texts as several rows with one."""

import itertools

from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_vqdit.training.text_rows import one_text_a_row


COUNTS = st.lists(st.tuples(*[st.integers(1, 3)] * 3), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS)
def test_a_row_for_each_text_with_each_of_the_others(counts):
    names = ["title", "poem", "word"]
    columns = {name: [list("abc"[: sizes[place]]) for sizes in counts] for place, name in enumerate(names)}
    dataset = Dataset.from_dict({**columns, "row": list(range(len(counts)))})
    expected = [(row, *places) for row, sizes in enumerate(counts) for places in itertools.product(*map(range, sizes))]
    found, turns = one_text_a_row(dataset, [*names, "title"])
    several = [name for place, name in enumerate(names) if any(sizes[place] > 1 for sizes in counts)]
    assert list(turns) == several
    own = [turns.get(name, [0] * len(found)) for name in names]
    assert list(zip(found["row"], *own, strict=True)) == expected
