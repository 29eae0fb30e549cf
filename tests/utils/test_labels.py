"""Names of labels and their numbers."""

import pytest
from datasets import ClassLabel

from diffusers_vqdit.utils.labels import encode_labels, label_names


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
