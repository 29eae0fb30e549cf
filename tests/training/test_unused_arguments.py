"""Flags that have no say given the others are refused, in every script: the cases are made from the parsers."""

import argparse
import itertools
import sys

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_vqdit import SpectrogramVQModel, VQDiTLatentPipeline
from diffusers_vqdit.__main__ import parse_args as parse_demo
from diffusers_vqdit.training import unused_arguments


NEEDED = {
    "train_image_vq": "--train_data_dir x",
    "train_text_vq": "--train_data_dir x",
    "train_audio_vq": "--train_data_dir x",
    "train_vqdit": "--train_data_dir x --image_vq x",
    "train_latent_dit": "--train_data_dir x --image_vq x",
    "distill_vqdit": "--train_data_dir x --pretrained_model_name_or_path x",
    "encode_dataset": "--train_data_dir x --text_vq x --output_dir x",
    "evaluate": "--pretrained_model_name_or_path x",
    "evaluate_tokenizer": "--tokenizer x",
}
FINETUNED = ("train_image_vq", "train_text_vq", "train_audio_vq", "train_vqdit", "train_latent_dit")
PRETRAINED = "--train_data_dir x --pretrained_model_name_or_path x"
WORDS = ("3", "0.3", "5", "x", "image=2x2", "a=label:b", "alice/x", "8,8;8,16")


@pytest.fixture(scope="module")
def modules(script):
    return {name: script(name) for name in NEEDED}


@pytest.fixture
def parser_of(modules, monkeypatch):
    """A script's parser."""
    parsers = []
    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda self, *a: parsers.append(self) or original(self, *a)
    )

    def find(name, arguments=None):
        modules[name].parse_args((NEEDED[name] if arguments is None else arguments).split())
        return parsers[-1]

    return find


def another_value(parser, action):
    """A flag's words that give another value than its default."""
    flag = action.option_strings[0]
    if action.nargs == 0:
        return [flag]
    count = action.nargs if isinstance(action.nargs, int) else 1
    for word in map(str, action.choices or WORDS):
        try:
            value = parser._get_values(action, [word] * count)
        except argparse.ArgumentError:
            continue
        if value != action.default:
            return [flag, *[word] * count]
    raise AssertionError(f"no value for {flag}")


def flags(parser, names):
    """One action for each of these destinations that the parser has."""
    found = {action.dest: action for action in reversed(parser._actions) if action.dest in names}
    return dict(sorted(found.items()))


CONVENIENCES = unused_arguments._CONVENIENCES


def told(parse, words, capsys):
    """What a parser says in refusing words; "" where it takes them."""
    try:
        parse(words)
        return ""
    except SystemExit:
        return capsys.readouterr().err.splitlines()[-1]


class Traced(argparse.Namespace):
    """Arguments that note which are read."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            argparse.Namespace.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return argparse.Namespace.__getattribute__(self, name)


@pytest.fixture
def pretrained(tmp_path, image_vq, text_vq, tokenizer, pipeline, make_latent_transformer):
    """Saves a tiny model for a script to finetune, and gives its folder."""
    spectrograms = {"n_fft": 64, "hop_length": 32, "num_mel_bins": 16, "block_out_channels": (8, 8)}
    makers = {
        "train_image_vq": lambda: image_vq,
        "train_text_vq": lambda: text_vq,
        "train_audio_vq": lambda: SpectrogramVQModel(**spectrograms, norm_num_groups=4, latent_channels=4),
        "train_vqdit": lambda: pipeline,
        "train_latent_dit": lambda: VQDiTLatentPipeline(
            make_latent_transformer(), image_vq, FlowMatchEulerDiscreteScheduler(), text_vq, tokenizer
        ),
    }

    def save(name):
        makers[name]().save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return tmp_path

    return save


@pytest.mark.parametrize("name", FINETUNED)
def test_a_flag_of_a_new_model_is_refused_if_finetuning_never_reads_it(name, modules, parser_of, pretrained, capsys):
    module = modules[name]
    source = f"--train_data_dir x --pretrained_model_name_or_path {pretrained(name)}"
    args = Traced(**vars(module.parse_args(source.split())))
    if name == "train_text_vq":
        module.build_model(args, [])
    elif name in ("train_vqdit", "train_latent_dit"):
        parts = module.load_components(args)
        if name == "train_vqdit":
            module.build_transformer(args, parts["transformer"], {}, {}, [], set())
        else:
            module.build_transformer(args, parts, parts["id2label"], None)
            module.training_scheduler(args, parts["scheduler"])
    else:
        module.build_model(args)
    read = args._read | {"patch"}  # which new segments of a pretrained transformer take
    parser = parser_of(name, source)
    groups = [group for group in parser._action_groups if group.title in ("model", "models")]
    own = {action.dest for group in groups for action in group._group_actions}
    assert len(own - read) > 5 and "pretrained_model_name_or_path" in read
    for dest, action in flags(parser, own | {"shift"}).items():
        says = told(module.parse_args, [*PRETRAINED.split(), *another_value(parser, action)], capsys)
        if dest in read:
            assert "no effect" not in says, says
        elif dest != "image_vq" or name != "train_latent_dit":  # there one of both is given
            assert f"--{dest}=" in says and "has no effect" in says, dest


@pytest.mark.parametrize("name", NEEDED)
def test_what_needs_another_flag_is_refused_without_it(name, modules, parser_of, capsys):
    parser, parse, count = parser_of(name), modules[name].parse_args, 0
    for needed, dependents in unused_arguments._DEPENDENT.items():
        (wanted,) = flags(parser, {needed}).values() or [None]
        for dest, action in flags(parser, set(dependents) - CONVENIENCES).items() if wanted is not None else ():
            if f"--{needed}" in NEEDED[name]:
                continue
            words = [*NEEDED[name].split(), *another_value(parser, action)]
            says = told(parse, words, capsys)
            assert f"--{dest}=" in says and " has no effect without --" in says, (dest, needed, says)
            others = [key for key, names in unused_arguments._DEPENDENT.items() if dest in names]
            given = [another_value(parser, flags(parser, {key})[key]) for key in others]
            says = told(parse, words + list(itertools.chain(*given)), capsys)
            assert f"--{dest}=" not in says, says
            count += 1
    assert count or name in ("encode_dataset", "evaluate")


@pytest.mark.parametrize("name", NEEDED)
def test_default_values_are_taken_whatever_else_is_given(name, modules, parser_of, capsys):
    parser, finetuned = parser_of(name), name in FINETUNED
    given = PRETRAINED if finetuned else NEEDED[name]
    args = modules[name].parse_args(given.split())
    unused = set(unused_arguments.unused_arguments(args))
    words = given.split()
    for dest, action in flags(parser, unused).items():
        if isinstance(action.default, int | float | str) and not isinstance(action.default, bool):
            words += [f"--{dest}", str(action.default)]
    assert told(modules[name].parse_args, words, capsys) == "" and (len(words) > 6 or not finetuned)


def test_each_name_of_the_tables_is_a_flag(modules, parser_of):
    there = {action.dest for name in NEEDED for action in parser_of(name)._actions}
    tables = unused_arguments._OF_NEW_MODELS | unused_arguments._OF_DATA | unused_arguments._OF_PICTURES
    tables |= {*unused_arguments._DEPENDENT, *itertools.chain(*unused_arguments._DEPENDENT.values())}
    assert tables <= there


CASES = [
    ("train_image_vq", "", "--fsq_levels 8 8", "--quantizer_type vq"),
    ("train_image_vq", "--quantizer_type fsq --fsq_levels 8 8", "--num_vq_embeddings 7", "--quantizer_type fsq"),
    ("train_image_vq", "--quantizer_type lfq", "--num_vq_embeddings 7", "--quantizer_type lfq"),
    ("train_image_vq", "--quantizer_type simvq", "--restart_threshold 0.2", "--quantizer_type simvq"),
    (
        "train_image_vq",
        "--perceptual_weight 1 --lpips_weights a b",
        "--perceptual_image_size 8",
        "with --lpips_weights",
    ),
    ("train_text_vq", "", "--num_quantizers 2", "--quantizer_type vq"),
    ("train_latent_dit", "--objective epsilon", "--shift 2", "--objective epsilon"),
    ("train_latent_dit", "--lr_scheduler constant", "--lr_warmup_steps 7", "--lr_scheduler constant"),
    ("train_vqdit", "--text_vq x --tasks ->text", "--label_column label", "a task of 'label'"),
    ("train_vqdit", "--tasks label->image", "--caption_column title", "a task of 'text'"),
    ("train_vqdit", "--text_vq x --tasks ->text", "--image_augmentations 2", "a task of 'image'"),
    ("train_vqdit", "--label_column label", "--caption_column title", "a task of 'text'"),  # of the tasks by default
    ("train_vqdit", "", "--max_text_length 9", "--text_tokenizer"),
    ("encode_dataset", "", "--image_augmentations 2", "--image_vq"),
    ("encode_dataset", "--text_vq x", "--audio_codebooks 2", "--segment"),
    ("evaluate_tokenizer", "--features inception", "--features_image_size 9", "--features inception"),
]


@pytest.mark.parametrize(("name", "given", "unused", "why"), CASES)
def test_one_choice_leaves_flags_of_another_without_a_say(name, given, unused, why, modules, capsys):
    parse, needed = modules[name].parse_args, NEEDED[name].split()
    assert "no effect" not in told(parse, [*needed, *given.split()], capsys)
    says = told(parse, [*needed, *given.split(), *unused.split()], capsys)
    assert f"{unused.split()[0]}=" in says and says.endswith(": leave it out") and why in says


REPLACED = [
    ("image=image:photo", "--image_column picture", "--image_vq y"),
    ("image=image:photo:z", "--image_column picture --image_vq y", ""),
    ("image=codes", "--image_column picture --image_vq y", ""),
    ("text=text:words", "--caption_column caption --prompt_columns a --text_encoder y", "--text_vq y"),
    ("text=text:words", "--caption_column caption", "--text_tokenizer y"),
    ("text=text:words:z", "--caption_column caption --text_vq y --text_tokenizer y", ""),
    ("text=states:words", "--caption_column caption --text_vq y", "--text_encoder y"),
    ("text=codes:8", "--caption_column caption --prompt_columns a --text_vq y --text_encoder y", ""),
]


@pytest.mark.parametrize(("segment", "refused", "taken"), REPLACED)
@pytest.mark.parametrize("name", ["train_vqdit", "distill_vqdit", "encode_dataset"])
def test_one_flag_never_replaces_silently_what_another_makes(name, segment, refused, taken, modules, capsys):
    parse, flag = (
        modules[name].parse_args,
        "--segment" if segment.count(":") and "8" not in segment else "--code_columns",
    )
    given = f"--train_data_dir x {flag} {segment} " + ("" if name == "train_vqdit" else NEEDED[name])
    given = given.replace("--text_vq x", "").split()
    taken = [] if name == "distill_vqdit" else taken.split()  # whose tokenizers are the pipeline's
    assert "no effect" not in told(parse, given + taken, capsys)
    words = refused.split()
    for unread in zip(words[::2], words[1::2], strict=True):
        if name == "distill_vqdit" and "column" not in unread[0]:
            continue
        says = told(parse, [*given, *taken, *unread], capsys)
        assert f"{unread[0]}=" in says and f"has no effect with {flag} {segment.split('=')[0]}=" in says


def test_a_tokenizer_that_another_segment_takes_is_one_in_use(modules):
    words = "--segment sketch=image:drawing title=text:title --code_columns image=codes text=codes"
    words = words.replace(" title=text", " --segment title=text").split()
    modules["encode_dataset"].parse_args(
        [*"--train_data_dir x --output_dir x --image_vq x --text_vq x".split(), *words]
    )


@pytest.mark.parametrize("name", ["train_vqdit", "distill_vqdit"])
def test_codes_were_read_and_encoded_already(name, modules, parser_of, capsys):
    pretrained = "--codes_dir x --pretrained_model_name_or_path x"
    parser = parser_of(name, pretrained)
    for dest, action in flags(parser, unused_arguments._OF_DATA - CONVENIENCES).items():
        says = told(modules[name].parse_args, [*pretrained.split(), *another_value(parser, action)], capsys)
        assert f"--{dest}=" in says and "with --codes_dir" in says


def test_what_changes_nothing_that_is_made_is_taken(modules):
    words = "--lr_scheduler constant --lr_warmup_steps 0 --validation_steps 7 --report_to none --logging_dir logs"
    args = modules["train_latent_dit"].parse_args([*NEEDED["train_latent_dit"].split(), *words.split()])
    assert args.lr_warmup_steps == 0 and args.validation_steps == 7


def test_a_refusal_shows_no_secret(modules, capsys):
    words = "--train_data_dir x --hub_token plain-secret --dataset_config_name plain-secret"
    says = told(modules["train_image_vq"].parse_args, words.split(), capsys)
    assert "--dataset_config_name=" in says and "plain-secret" not in says


def test_the_packages_own_command_refuses_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    says = told(parse_demo, "--say a --prompt b".split(), capsys)
    assert "--prompt=" in says and "has no effect with --say or --listen" in says


def test_flags_of_another_kind_of_tokenizer_are_refused(modules, text_vq, image_vq, tmp_path, capsys):
    text_vq.save_pretrained(tmp_path / "text")
    image_vq.save_pretrained(tmp_path / "image")
    module = modules["evaluate_tokenizer"]
    for kind, words in (("text", "--resolution 32"), ("text", "--features x"), ("image", "--caption_columns a")):
        args = module.parse_args(["--tokenizer", str(tmp_path / kind), *words.split()])
        says = told(module.main, args, capsys)
        assert f"{words.split()[0]}=" in says and "with --tokenizer of a" in says


def test_a_lora_without_its_library_is_told_how_to_get_it(script, monkeypatch, capsys):
    train = script("train_vqdit")
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.parse_args(["--pretrained_model_name_or_path", "x", "--codes_dir", "x", "--rank", "4"])
    assert '--rank needs the library peft: pip install "diffusers_vqdit[lora]"' in capsys.readouterr().err
