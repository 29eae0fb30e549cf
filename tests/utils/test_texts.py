"""Texts to tokens: spellings that look alike are one text, cuts are counted, threads don't meet."""

import threading
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from diffusers_vqdit.utils.texts import check_captions, check_counts, check_texts, normalized, tokenize_to_length


SPACES = [" ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "\u2028", "  ", " \t "]
WORDS = ["a", "red", "apple", "piñata", "红苹果", "한국", "é"]
NO_TEXTS = ["", " ", "\n", None, 3, b"a", [], ["a", ""], ["a", None], "\ud800", ["ok", "a\udfff"]]
NOTHING = ["", "\ufeff", "\u200b", "\u2060", "\u00ad", "\x00", "\x1b", "\x7f"]


@pytest.fixture(scope="module")
def shipped(root):
    return PreTrainedTokenizerFast.from_pretrained(root / "model_cards/vqdit-emoji-32", subfolder="tokenizer")


@pytest.fixture(scope="module")
def tokenizers(script, shipped):
    captions = ["a red apple", "piñata crème", "红苹果 蓝色", "an apple tree"] * 3
    lower = script("train_text_vq").train_tokenizer(captions, vocab_size=320, max_length=24)
    mixed = script("train_text_vq").train_tokenizer([*captions, "an OK hand"], vocab_size=320, max_length=24)
    return {"shipped": shipped, "lower": lower, "mixed": mixed}


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), words=st.lists(st.sampled_from(["a", "red", "apple", "piñata", "红苹果", "한국", "é"]), min_size=1)
)
def test_spellings_that_look_alike_are_one_text(tokenizers, data, words):
    plain = " ".join(words)
    hidden = st.sampled_from(NOTHING)
    odd = "".join(data.draw(st.sampled_from(SPACES)) + data.draw(hidden) + w + data.draw(hidden) for w in words)
    odd = data.draw(hidden) + odd + data.draw(st.sampled_from(["", *SPACES]))
    form = data.draw(st.sampled_from(["NFC", "NFD"]))
    for name, tokenizer in tokenizers.items():
        assert tokenizer(unicodedata.normalize(form, odd)).input_ids == tokenizer(plain).input_ids, name
        assert normalized(tokenizer, odd) == plain


def test_case_counts_only_where_the_training_captions_have_it(tokenizers):
    def same(name):
        return tokenizers[name]("A Red APPLE").input_ids == tokenizers[name]("a red apple").input_ids

    assert same("lower") and not same("mixed") and not same("shipped")


@pytest.mark.parametrize("text", ["a<mask> apple", "<mask> apple", "a red<mask>", "<mask>", "a<mask><mask> apple"])
def test_blanks_keep_the_spaces_beside_them_and_come_back(tokenizers, tmp_path, text):
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / name)
        for one in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path / name)):
            ids = one(f"\n{text} ").input_ids
            assert ids.count(one.mask_token_id) == text.count("<mask>")
            assert one.decode(ids) == text


@pytest.mark.parametrize("added", [0, 1])
@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_lengths_are_those_of_the_uncut_texts(added, padding):
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "w": 1, "</s>": 2}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if added:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    texts = [" ".join("w" * count) for count in (1, 2, 5, 9)]
    ids, mask, counts = tokenize_to_length(tokenizer, texts, 4, padding)
    assert counts == [count + added for count in (1, 2, 5, 9)]
    assert ids.shape == mask.shape == (4, 4) and ids.dtype == torch.int64
    assert mask.sum(1).tolist() == [min(4, count) for count in counts]
    if added:
        assert ids[3].tolist() == [1, 1, 1, 2]  # the end stays where a text is cut


def test_threads_with_other_lengths_and_paddings(shipped):
    texts = ["a red apple", "a sailboat on the sea, at night"]
    calls = [(length, padding) for length in range(3, 11) for padding in ("max_length", "longest")]
    alone = [tokenize_to_length(shipped, texts, *call) for call in calls]
    results: dict[int, tuple] = {}

    def work(index):
        for _ in range(20):
            results[index] = tokenize_to_length(shipped, texts, *calls[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(calls)
    for index, (ids, mask, counts) in enumerate(alone):
        assert torch.equal(results[index][0], ids) and torch.equal(results[index][1], mask)
        assert results[index][2] == counts


@pytest.mark.parametrize("counts", [[5], [4, 3], [4, 5, 9, 1], [9] * 40], ids=str)
def test_texts_of_an_argument_that_are_too_long_are_one_warning(counts):
    texts = [f"text {index} {'w' * 99}" for index in range(len(counts))]
    longer = [index for index, count in enumerate(counts) if count > 4]
    told = longer and f"{len(longer)} of {len(counts)} texts of prompt have more than 4 tokens and are cut; the first "
    warning = check_counts("prompt", texts, counts, 4)
    assert warning == (f"{told}is {repr(texts[longer[0]])[:60]}..." if longer else None)
    with pytest.raises(ValueError, match="^prompt 'text 1 w+"):
        check_counts("prompt", ["a", *texts[:1], "text 1 w"], [1, counts[0], 0], 4)


@pytest.mark.parametrize(
    "text", ["", " ", "\n", None, 3, b"a", [], ["a", ""], ["a", None], "\ud800", ["ok", "a\udfff"]]
)
def test_what_is_no_text_is_refused_by_name(text):
    with pytest.raises(ValueError, match="^prompt"):
        check_texts("prompt", text)


@pytest.mark.parametrize("text", ["\ufeff", "\u200b\u2060", "\x00"])
def test_a_prompt_of_nothing_visible_is_refused(shipped, pipeline, text):
    pipeline.tokenizer = shipped
    with pytest.raises(ValueError, match="prompt .* has nothing to read"):
        pipeline.encode_prompt([text])


def test_missing_captions_are_counted_and_placed():
    with pytest.raises(ValueError, match=r"'text': 2 rows have no caption, the first are rows \[1, 3\]"):
        check_captions(["a", None, "b", "  "], "text")


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
