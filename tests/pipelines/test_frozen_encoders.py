"""Frozen encoders by name: in a folder of their own, in a pipeline's, or as a tower of a model of two."""

import pytest
import torch

from diffusers_vqdit.pipelines.frozen_encoders import (
    check_sequence_length,
    encode_images_to_states,
    encode_texts_to_states,
    load_image_encoder,
    load_text_encoder,
    pixel_size,
    state_channels,
)


WORDS = ["a red box", "a blue box and a green dot", "pink"]


def states_of(encoder, tokenizer):
    return encode_texts_to_states(encoder, tokenizer, WORDS, 9, "cpu")


@pytest.mark.parametrize("kind", ["t5", "clip", "bert", "gpt2"])
def test_an_encoder_in_a_folder_gives_what_it_gave(encoders, tmp_path, kind):
    encoder, tokenizer = encoders.text_encoder(kind), encoders.text_tokenizer(WORDS * 3)
    if kind == "gpt2":
        tokenizer.pad_token = None
    loaded, own = load_text_encoder(str(encoders.save(tmp_path / "own", encoder, tokenizer)))
    assert type(loaded) is type(encoder) and not loaded.training and own.pad_token is not None
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and state_channels(loaded) == 16
    if kind == "gpt2":
        tokenizer.pad_token = tokenizer.eos_token
    states, mask, counts = states_of(loaded, own)
    expected, masked, counted = states_of(encoder, tokenizer)
    assert torch.equal(mask, masked) and counts == counted
    torch.testing.assert_close(states[mask], expected[mask])


def test_the_tokenizer_is_that_of_the_encoder_that_is_named(encoders, tmp_path):
    """Of a pipeline of diffusers' the one of its number; of ours, whose `tokenizer` is the text VQ's, the second."""
    first, second = encoders.text_tokenizer(["one"]), encoders.text_tokenizer(["two"])
    for place, numbers in (("sdxl", ("", "_2")), ("ours", ("",))):
        for number in numbers:
            encoders.text_encoder("t5").save_pretrained(tmp_path / place / f"text_encoder{number}")
        first.save_pretrained(tmp_path / place / "tokenizer")
        second.save_pretrained(tmp_path / place / "tokenizer_2")
    for name, expected in (
        ("sdxl", first),
        ("sdxl/text_encoder", first),
        ("sdxl/text_encoder_2", second),
        ("ours", second),
        ("ours/text_encoder", second),
    ):
        assert load_text_encoder(str(tmp_path / name))[1].get_vocab() == expected.get_vocab(), name


def test_each_tower_of_clip_is_as_in_the_whole(encoders, tmp_path):
    whole, tokenizer = encoders.whole_clip(), encoders.text_tokenizer(WORDS * 3)
    encoders.save(tmp_path, whole, tokenizer)
    encoders.feature_extractor().save_pretrained(tmp_path)
    text, own = load_text_encoder(str(tmp_path))
    states, mask, _ = states_of(text, own)
    ids = tokenizer(WORDS, padding=True, truncation=True, max_length=9, return_tensors="pt")
    torch.testing.assert_close(states, whole.text_model(**ids).last_hidden_state)
    vision, extractor = load_image_encoder(str(tmp_path))
    assert pixel_size(vision, extractor) == (16, 16)
    pixels = torch.rand(2, 3, 16, 16)
    inputs = extractor(list((pixels * 255).round().byte()), return_tensors="pt").pixel_values
    expected = whole.vision_model(pixel_values=inputs).last_hidden_state
    rounded = (pixels * 255).round() / 255
    torch.testing.assert_close(
        encode_images_to_states(vision, extractor, rounded, "cpu"), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "limit", "length", "expected"),
    [
        *(("clip", 14, None, 14), ("clip", 10**30, None, 14), ("clip", 9, None, 9), ("clip", 14, 14, 14)),
        *(("t5", 10**30, None, 512), ("t5", 14, None, 14), ("t5", 14, 700, 700)),
        *(("clip", 14, 15, None), ("bert", 9, 10, None), ("t5", 14, 0, None), ("t5", 14, 2.5, None)),
    ],
)
def test_the_length_is_what_encoder_and_tokenizer_take(encoders, kind, limit, length, expected):
    encoder, tokenizer = encoders.text_encoder(kind), encoders.text_tokenizer(WORDS)
    tokenizer.model_max_length = limit
    if expected is None:
        with pytest.raises(ValueError, match=f"max_sequence_length={length} must be an integer"):
            check_sequence_length(length, encoder, tokenizer)
    else:
        assert check_sequence_length(length, encoder, tokenizer) == expected


def test_what_stands_beside_is_missed_by_name(encoders, tmp_path):
    encoders.text_encoder("t5").save_pretrained(tmp_path / "t5")
    encoders.image_encoder("dinov2").save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="text_encoder=.* has no tokenizer"):
        load_text_encoder(str(tmp_path / "t5"))
    with pytest.raises(ValueError, match="image_encoder=.* has no feature extractor"):
        load_image_encoder(str(tmp_path / "dinov2"))
