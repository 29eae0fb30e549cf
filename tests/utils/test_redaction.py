"""Secrets and local paths in what is published: struck out wherever they stand, and nothing else is."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vqdit.utils.redaction import known_secrets, without_paths, without_secrets


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PLACES = [
    *("{}", "--hub_token {}", "--hub_token={}", "'{}'", '"{}"', "`{}`", "({})", "[{}]", "a,{},b", "token:{}"),
    *("https://{}@hf.co/x", "https://user:{}@hf.co/x", "https://hf.co/x?token={}", "https://hf.co/{}/x", "x={}&y"),
    *("user:{}@host/data", "s3://{}@bucket/x", "Bearer {}", "text\n{}\ntext", "| `hub_token` | `{}` |", "<{}>", "{}."),
    *("/home/{}/x", "../{}", "a_{}_b", "{}{}", "{}.parquet", "#{}", "\\{}", "--unknown={}", "key: {}"),
]


@pytest.mark.parametrize("place", PLACES)
@given(secret=st.text(LETTERS, min_size=8, max_size=40))
def test_a_known_secret_is_struck_out_by_its_value(place, secret):
    shown = without_secrets(place.format(secret, secret), [secret])
    assert secret not in shown and "..." in shown


@pytest.mark.parametrize("place", PLACES)
@given(body=st.text(LETTERS, min_size=20, max_size=40))
def test_what_looks_like_a_token_is_struck_out(place, body):
    assert body not in without_secrets(place.format(f"hf_{body}", f"hf_{body}"), [])


@pytest.mark.parametrize(
    "text",
    [
        "https://user:pass@example.org/data",
        "user:p@ss@example.org/data",
        "https://example.org/data.parquet?X-Amz-Signature=passw",
        "--hub_tok passw",
        "--hf_token=passw",
    ],
)
def test_credentials_of_urls_and_flags_are_struck_out(text):
    assert "pass" not in without_secrets(text, []) and "p@ss" not in without_secrets(text, [])


@pytest.mark.parametrize(
    "text",
    [
        *("hf_alice", "someone/hf_model", "https://huggingface.co/docs", "a@b.org", "tasks: text->image:4,->image:1"),
        *("--hub_model_id alice/mine", "--tokenizer_vocab_size 2048", "time: 10 h @ home", "what?", "l2"),
    ],
)
def test_other_text_stays(text):
    assert without_secrets(text, ["mit", "secretsecret"]) == text


def test_short_secrets_are_struck_out_as_words():
    assert without_secrets("hf_x permit mit, 'mit'", ["mit", "hf_x"]) == "... permit ..., '...'"


def test_the_secrets_of_environment_and_login_are_known(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("hf_saved\n")
    (tmp_path / "stored").write_text("[work]\nhf_token = hf_stored\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored"))
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_older")
    assert set(known_secrets("hf_given", None, "")) == {
        *("hf_given", "hf_saved", "hf_stored", "hf_environment", "hf_older")
    }


HOME = str(Path.home())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/data/cats/train", "train"),
        ("/data/cats/train/", "train"),
        ("/data/my cats/the train", "the train"),
        ("~/pictures/cats", "cats"),
        ("~carol/cats", "cats"),
        ("../cats", "cats"),
        ("../../cats/a.parquet", "a.parquet"),
        ("runs/../../cats", "cats"),
        ("file:///data/cats", "cats"),
        ("C:\\Users\\bob\\cats", "cats"),
        ("C:/Users/bob/cats", "cats"),
        ("\\\\server\\share\\cats", "cats"),
        *[
            (hidden, "...")
            for hidden in ("/", "~", "..", "~bob", "/home/bob", "/home/bob/", "/Users/bob", "C:\\", HOME)
        ],
        (f"{HOME}/cats", "cats"),
        ("my pictures in /home/bob/cats, CC0", "my pictures in cats, CC0"),
        ("see ~/cats and ../dogs (C:\\x\\y)", "see cats and dogs (y)"),
        ("of /home/bob.", "of ..."),
        ("outputs/image_vq", "outputs/image_vq"),
        ("./outputs/x", "./outputs/x"),
        ("someone/base", "someone/base"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("text->image:4,->image:1", "text->image:4,->image:1"),
        ("a cat and/or a dog / 2", "a cat and/or a dog / 2"),
    ],
)
def test_paths_are_shortened(value, shown):
    assert without_paths(value) == shown
