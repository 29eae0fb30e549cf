"""Types of flags: what is in range passes, what isn't is refused by flag, value and range."""

import argparse
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_vqdit.utils.arguments import (
    argument_parser,
    decay,
    model_name,
    number,
    positive_integer,
    positive_number,
    random_seed,
    share,
)


def parsed(kind, value):
    parser = argument_parser("A script.")
    parser.add_argument("--flag", type=kind)
    return parser.parse_args(["--flag", value]).flag


NUMBERS = {
    share: lambda x: 0 <= x <= 1,
    decay: lambda x: 0 <= x < 1,
    positive_number: lambda x: x > 0,
    number(): lambda x: True,
    positive_integer: lambda x: x == int(x) >= 1,
    random_seed: lambda x: x == int(x) and 0 <= x < 2**32,
}


@pytest.mark.parametrize(("kind", "fits"), NUMBERS.items())
@given(value=st.one_of(st.floats(), st.integers(-(2**40), 2**40), st.sampled_from([0, 1, -1, 2**32, 2**32 - 1])))
def test_a_value_passes_unchanged_or_is_refused(kind, fits, value):
    integers_only = kind in (positive_integer, random_seed)
    if math.isfinite(value) and fits(value) and (isinstance(value, int) or not integers_only):
        assert parsed(kind, repr(value)) == value
    else:
        with pytest.raises(SystemExit) as refused:
            parsed(kind, repr(value))
        assert refused.value.code == 2


@pytest.mark.parametrize("value", ["-1e-3", "-.5", "-inf", "-nan", "nan", "ten", "", "1,5", "9" * 5000])
def test_a_refusal_names_flag_value_and_range(value, capsys):
    with pytest.raises(SystemExit):
        parsed(decay, value)
    told = capsys.readouterr().err
    assert "argument --flag: value=" in told and "a finite number in [0, 1)" in told
    assert value[:20] in told or repr(float(value)) in told
    assert len(told) < 400


@pytest.mark.parametrize("tasks", ["->image", "->image,text->image:4", "->a+b:0.5"])
def test_a_task_that_nothing_is_given_to_is_no_flag(tasks):
    assert parsed(str, tasks) == tasks


@pytest.mark.parametrize(
    "words", [["--hub_tok", "hf_x"], ["--hub_tok=hf_x"], ["--hub_t", "hf_x"], ["hf_" + "a1" * 15]]
)
def test_abbreviations_are_refused_without_showing_a_token(words, capsys):
    parser = argument_parser("A script.")
    parser.add_argument("--hub_token")
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    told = capsys.readouterr().err
    assert "unrecognized arguments" in told and words[-1].split("=")[-1] not in told


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("checkpoint-10", "model.safetensors"),
        ("moved", "optimizer.bin"),
        ("moved", "random_states_0.pkl"),
        ("moved", "pytorch_model_fsdp_0/__0_0.distcp"),
        ("moved", "pytorch_model_fsdp.bin"),
        ("moved", "__0_0.distcp"),
        ("moved", "zero_to_fp32.py"),
        ("global", "global_step10/mp_rank_00_model_states.pt"),
        ("ranks", "mp_rank_00_model_states.pt"),
        ("lora", "pytorch_lora_weights.safetensors"),
    ],
)
def test_checkpoints_and_loras_are_no_models(tmp_path, folder, file):
    path = tmp_path / folder / file
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(Exception, match="is a LoRA, and not a model|is a training checkpoint, .* output_dir"):
        model_name(str(tmp_path / folder))
    (tmp_path / folder / "model_index.json").touch()  # an output_dir is a model, whatever else is in it
    assert model_name(str(tmp_path / folder)) == str(tmp_path / folder)
    assert model_name("someone/checkpoint-10") == "someone/checkpoint-10"


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_name_is_no_model(text):
    with pytest.raises(argparse.ArgumentTypeError, match="names no model"):
        model_name(text)


@pytest.mark.parametrize("text", ["someone/vqdit", "vqdit", "/nothing/there", "/" + 300 * "a", "."])
def test_what_is_not_there_is_told_by_those_who_load_it(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_name(text) == text


def test_the_help_tells_defaults_once(capsys):
    parser = argument_parser("x")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument_group("more").add_argument("--steps", type=int, default=7, help="How many.")
    parser.add_argument("--rate", default=3, help="By default as before.")
    parser.add_argument("--words", nargs="*", default=[], help="Some.")
    parser.add_argument("--flag", action="store_true", help="Whether.")
    for _ in range(2):
        told = parser.format_help()
        assert told.count("(default: 0)") == told.count("How many. (default: 7)") == 1
        assert told.count("default") == 3
