import pytest
import torch
from datasets import ClassLabel

from diffusers_vqdit.training.columns import draw_captions, warn_of_cut
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


def test_captions_are_drawn_evenly_from_columns_and_lists():
    assert caption_lists(["a", ["b", "c"]], "text") == [["a"], ["b", "c"]]
    captions = {"en": [["a"], ["b", "c", "d"]], "zh": [["e"], ["f"]]}
    generator = torch.Generator().manual_seed(0)
    drawn = [text for _ in range(2000) for text in draw_captions(captions, torch.tensor([1, 0]), generator)]
    share = {text: drawn.count(text) / 2000 for text in "abcdef"}
    expected = {"a": 1 / 2, "e": 1 / 2, "f": 1 / 2, "b": 1 / 6, "c": 1 / 6, "d": 1 / 6}
    for text, value in expected.items():
        assert share[text] == pytest.approx(value, abs=0.06), text  # five standard deviations


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
