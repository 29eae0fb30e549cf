"""Tokenizers trained on one's own texts."""

from diffusers_vqdit.training.byte_pairs import train_text_tokenizer
from diffusers_vqdit.utils.token_ids import END_TOKEN, token_ids


POEMS = ["once upon a time", "a king  had\na daughter, and she had a king", "the End", "there was a time " * 9]


def test_a_trained_tokenizer_keeps_texts_as_they_are():
    words = train_text_tokenizer(POEMS * 3, 300)
    for text in [*POEMS, " a  b\n\n c ", "静夜思\n床前明月光。"]:
        assert words.decode(token_ids(words, [text])[0]) == text.strip("\ufeff")
    assert words.eos_token == END_TOKEN
    assert token_ids(words, [f"a king{END_TOKEN} had"]) == [
        token_ids(words, ["a king"])[0] + token_ids(words, [" had"])[0]
    ]
