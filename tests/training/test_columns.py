import itertools

import pytest
from datasets import ClassLabel, Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vqdit.training.checkpoints import fingerprint
from diffusers_vqdit.training.columns import CaptionColumn, number_texts, texts_in_order, warn_of_cut
from diffusers_vqdit.utils.labels import encode_labels, label_names
from diffusers_vqdit.utils.texts import caption_lists, check_captions


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"1 rows have no caption, the first are rows \[1\]"),
        ("", "have no caption"),
        (" \n\t", "have no caption"),
        ([], "have no caption"),
        ([""], "have no caption"),
        (["a", None], "have no caption"),
        ([None], "have no caption"),
        (3, r"of the type int, the first are rows \[1\] with 3"),
        (0.5, "of the type float"),
        (float("nan"), "of the type float"),
        (True, "of the type bool"),
        (b"a", "of the type bytes"),
        ({"en": "a"}, "of the type dict"),
        (["a", 3], "of the type int"),
        ([["a"]], "of the type list"),
    ],
)
def test_what_is_no_caption_is_named(value, message):
    with pytest.raises(ValueError, match=f"column 'text'.*{message}"):
        check_captions(["fine", value, ["also", "fine"]], "text")


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
    column, expected = CaptionColumn(load_from_disk(tmp_path), "text"), caption_lists(values, "text")
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


@pytest.mark.parametrize(
    "value", [None, "", " cat", "cat ", "cat\n", "\u00a0cat", " ", float("nan"), 0.5, ["cat"], b"cat", {}]
)
def test_what_is_no_label_is_named(value):
    with pytest.raises(ValueError, match=r"column 'kind': 1 rows .*row 1 with "):
        label_names(["cat", value, "dog"], "kind")


@pytest.mark.parametrize("value", [None, -1, 3, "cat"])
def test_what_is_no_class_is_named(value):
    with pytest.raises(ValueError, match=r"column 'kind': 1 rows .*row 2 with "):
        label_names([0, 2, value], "kind", ClassLabel(names=["b", "a", "c"]))


def test_the_order_of_names():
    assert label_names([1, 0], "x", ClassLabel(names=["b", "a", "c"])) == (["a", "b"], ["b", "a", "c"])
    assert label_names([10, 2, -1, 2], "x") == (["10", "2", "-1", "2"], ["-1", "2", "10"])
    assert label_names([10.0, 2.0], "x")[1] == ["2", "10"]
    assert label_names(["10", "2", "x"], "x")[1] == ["10", "2", "x"]


def test_whole_names_come_before_parts():
    known = {0: "cat, dog", 1: "cat", 2: "food, meal"}
    numbers, names = encode_labels(["cat, dog", "cat", "dog", "meal"], "x", None, known, comma_names=True)
    assert numbers.tolist() == [0, 1, 0, 2] and names == known
    numbers, names = encode_labels(["cat, dog", "food"], "x")
    assert numbers.tolist() == [0, 1] and names == {0: "cat, dog", 1: "food"}
    # Without, a part is another label.
    assert encode_labels(["dog"], "x", None, known)[1] == {**known, 3: "dog"}


def test_new_names_come_after_the_known_numbers():
    numbers, names = encode_labels(["b", "z", "c"], "x", None, {0: "a", 1: "b"})
    assert numbers.tolist() == [1, 3, 2] and names == {0: "a", 1: "b", 2: "c", 3: "z"}
    assert encode_labels(["z"], "x", None, {0: "a"}, size=10)[1] == {0: "a", 10: "z"}
    assert encode_labels([7, 3], "x", None, {}, size=10)[0].tolist() == [7, 3]  # numbers without names
    assert encode_labels([7, 3], "x")[0].tolist() == [1, 0]
