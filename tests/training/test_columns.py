import itertools

import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vqdit.training.checkpoints import fingerprint
from diffusers_vqdit.training.columns import CaptionColumn, number_texts, texts_in_order, warn_of_cut
from diffusers_vqdit.utils.texts import texts_of


TEXTS = st.lists(st.sampled_from(["a", "b", "红", "b ", "ab"]), min_size=1, max_size=3)  # of a row


@given(columns=st.lists(st.lists(TEXTS, min_size=1, max_size=6), min_size=1, max_size=3))
def test_equal_texts_have_one_number_in_the_order_of_the_first(columns):
    numbers, is_first = number_texts(columns)
    every = list(texts_in_order(columns))
    unique = list(dict.fromkeys(every))
    assert list(itertools.compress(every, is_first)) == unique
    for column, (found, bounds) in zip(columns, numbers, strict=True):
        rows = [[unique[number] for number in found[start:end]] for start, end in itertools.pairwise(bounds)]
        assert rows == column


@pytest.mark.parametrize("values", [["a", "b", "c", "红"], [["a"], ["b", "c"], ["d"], ["e", "e"]]])
def test_a_column_on_disk_is_the_list_of_its_rows(values, tmp_path):
    dataset = Dataset.from_dict({"text": values, "other": [0, 1, 2, 3]})
    dataset.save_to_disk(tmp_path)
    column, expected = CaptionColumn(load_from_disk(tmp_path), "text"), list(map(texts_of, values))
    assert list(column) == expected and [column[row] for row in range(4)] == expected and len(column) == 4
    assert list(column.take([0, 1, 2, 3])) == expected
    assert list(column.take([3, 1])) == [expected[3], expected[1]] and column.take([3, 1])[0] == expected[3]
    assert fingerprint({"text": column}) == fingerprint({"text": expected})
    with pytest.raises(ValueError, match="column 'other' has 4 rows of the type int"):
        CaptionColumn(dataset, "other")


def test_one_warning_for_captions_that_are_cut(tokenizer, caplog):
    warn_of_cut(["a dot"] * 5, tokenizer, 12)
    assert not caplog.text
    warn_of_cut(["a dot"] * 1500 + ["word " * 30] * 7, tokenizer, 12)
    assert len(caplog.records) == 1 and "7 of 1507 captions have more than max_length=12 tokens" in caplog.text
    assert "and are cut; the first is 'word word word" in caplog.text and len(caplog.messages[0]) < 160
    caplog.clear()
    warn_of_cut([*["a dot"] * 1500, "first " * 12, "second " * 30], tokenizer, 12)
    assert (
        f"2 of 1502 captions have more than max_length=12 tokens and are cut; the first is '{'first ' * 3}"
        in caplog.text
    )
