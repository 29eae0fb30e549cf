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


def test_tokens_of_characters_are_never_longer():
    texts = ["床前明月光，\n疑是地上霜。", "明月 a king\r\n", "e\u0301 明月光光"] * 5
    plain, characters = (train_text_tokenizer(texts, 330, characters=only) for only in (False, True))
    tokens = [characters.decode([one]) for one in token_ids(characters, ["明月光，明月。\n a"])[0]]
    assert tokens == ["明", "月", "光", "，", "明", "月", "。", "\n", " ", "a"]
    assert len(token_ids(plain, ["明月光"])[0]) < 3  # without it, what stands together often is one token
    for text in [*texts, "霜月🍎", " a  b\n\n c "]:
        assert characters.decode(token_ids(characters, [text])[0]) == plain.decode(token_ids(plain, [text])[0])
