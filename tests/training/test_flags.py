"""Flags of all scripts: what is out of range is refused before any work, by flag, value and range."""

import importlib.util
import sys

import pytest


NEEDED = {
    "benchmarks/code_embeddings": "--codes_dir x --image_vq y",
    "benchmarks/text_positions": "--text_vq x",
    "training/train_vqdit": "--codes_dir x --image_vq x",
    "training/train_latent_dit": "--dataset_name x --image_vq x",
    "training/distill_vqdit": "--codes_dir x --pretrained_model_name_or_path x",
    "training/encode_dataset": "--image_vq x --output_dir x",
    "training/evaluate": "--pretrained_model_name_or_path x",
    "training/evaluate_tokenizer": "--tokenizer x",
    "training/evaluate_speech": "--pretrained_model_name_or_path x",
    "benchmarks/kinds_of_diffusion": "--checkpoints x",
}
TRAINING = [f"training/train_{name}" for name in ("image_vq", "text_vq", "audio_vq", "vqdit", "latent_dit")]
TRAINING.append("training/distill_vqdit")

# Flag, value, and what is accepted: of all training scripts, and of single ones.
SHARED = [
    *(("max_train_steps", value, "an integer of at least 1") for value in ("0", "-1", "1.5", "nan")),
    *((name, "0", "an integer of at least 1") for name in ("train_batch_size", "num_train_epochs")),
    *((name, "-3", "an integer of at least 1") for name in ("gradient_accumulation_steps", "max_train_samples")),
    *(("learning_rate", value, "a finite number of at least 0") for value in ("-1e-9", "-1e-3", "nan", "inf", "fast")),
    ("output_dir", "", "no path; give one, . for the working directory"),
    *(("ema_decay", value, "a finite number in [0, 1)") for value in ("2", "1", "-0.1", "nan")),
    *(("adam_beta1", "1.0", "a finite number in [0, 1)"), ("adam_beta2", "-1", "a finite number in [0, 1)")),
    *(
        ("adam_epsilon", "0", "a finite number above 0"),
        ("adam_weight_decay", "-0.1", "a finite number of at least 0"),
    ),
    *(("max_grad_norm", value, "a finite number of at least 0") for value in ("-1", "inf")),
    *((name, "-1", "an integer of at least 0") for name in ("checkpointing_steps", "validation_steps")),
    *((name, "-1", "an integer of at least 0") for name in ("checkpoints_total_limit", "lr_warmup_steps")),
    *(("seed", value, "an integer in [0, 4294967295]") for value in ("-1", "4294967296", "x")),
    *(("lr_scheduler", value, "choose from") for value in ("cosin", "piecewise_constant")),
    *(("report_to", value, "must be one of ['none', 'all'") for value in ("xyz", "tensorboards", "None")),
    *(("mixed_precision", "fp8", "choose from"), ("hub_strategy", "never", "choose from")),
]
SINGLE = {
    "training/train_image_vq": [
        *(("block_out_channels", "0", "at least 1"), ("layers_per_block", "-1", "at least 1")),
        *(("norm_num_groups", "0", "at least 1"), ("num_vq_embeddings", "0", "at least 1")),
        *(("vq_embed_dim", "0", "at least 1"), ("resolution", "0", "at least 1"), ("fsq_levels", "1", "at least 2")),
        ("num_quantizers", "0", "at least 1"),
        *(
            ("beta", "-1", "at least 0"),
            ("entropy_weight", "nan", "at least 0"),
            ("perceptual_weight", "-1", "at least 0"),
        ),
        *(("entropy_temperature", "0", "above 0"), ("discriminator_learning_rate", "0", "above 0")),
        *(("discriminator_max_grad_norm", "-1", "at least 0"), ("adversarial_start", "-1", "at least 0")),
        *(("restart_threshold", "-1", "at least 0"), ("lecam_weight", "inf", "at least 0")),
    ],
    "training/train_text_vq": [
        *(("random_token_probability", value, "in [0, 1]") for value in ("5", "-0.1", "nan")),
        *((name, "0", "at least 1") for name in ("tokenizer_vocab_size", "max_length", "downsample_factor")),
        *(
            (name, "0", "at least 1")
            for name in ("num_codebooks", "num_quantizers", "num_codes", "code_dim", "hidden_size", "num_layers")
        ),
    ],
    "training/train_audio_vq": [
        *((name, "0", "at least 1") for name in ("sampling_rate", "n_fft", "hop_length", "num_mel_bins")),
        *((name, value, "above 0") for name in ("max_frequency", "crop_length") for value in ("0", "nan")),
        *((name, "-1", "at least 0") for name in ("min_frequency", "beta", "restart_threshold")),
    ],
    "training/train_vqdit": [
        *(("dropout", "1.5", "in [0, 1]"), ("lora_dropout", "-1", "in [0, 1]"), ("rank", "0", "at least 1")),
        *(("lora_alpha", "0", "at least 1"), ("image_augmentations", "-1", "at least 0")),
        *(("lowres_factor", "1", "at least 2"), ("num_attention_heads", "0", "at least 1")),
        *(("segment", value, "NAME=MODALITY:COLUMN") for value in ("sketch", "a b=image:x", "=image:x", "a=image")),
        *(("max_sequence_length", "0", "at least 1"), ("segment", "a=states", "NAME=MODALITY:COLUMN")),
        *(("max_audio_length", "0", "above 0"), ("audio_codebooks", "0", "at least 1")),
        *(("segment", "a=smell:x", "must be one of"), ("segment", "a=label:x:y", "a label doesn't need")),
        *(("aspect_ratio_buckets", value, "must be pairs of height,width") for value in ("32", "32x32", "8,8;a,8")),
        ("aspect_ratio_buckets", "8,8;16,16", "which have one aspect ratio"),
        ("optimizer", "lion", "choose from"),
    ],
    "training/train_latent_dit": [
        *((name, "1.1", "in [0, 1]") for name in ("label_dropout", "caption_dropout", "dropout")),
        ("max_sequence_length", "-1", "at least 1"),
        *(("patch_size", "0", "at least 1"), ("snr_gamma", "0", "above 0"), ("shift", "nan", "above 0")),
        *(("alignment_layer", "0", "at least 1"), ("alignment_weight", "-1", "at least 0")),
    ],
    "training/distill_vqdit": [
        *(("num_teacher_steps", "0", "at least 1"), ("num_student_steps", "1.5", "at least 1")),
        *(("guidance_scale", value, "at least 0") for value in ("-1", "nan")),
    ],
    "training/encode_dataset": [
        *(("batch_size", "0", "at least 1"), ("shard_size", "0", "at least 1"), ("max_samples", "-1", "at least 1")),
        *(("lowres_factor", "1", "at least 2"), ("resolution", "0", "at least 1")),
    ],
    "training/evaluate": [
        *(("num_samples", "0", "at least 1"), ("num_inference_steps", "0", "at least 1"), ("seed", "-1", "in [0,")),
        *(("guidance_scale", "inf", "a finite number"), ("batch_size", "-1", "at least 1")),
    ],
    "training/evaluate_speech": [("num_samples", "0", "at least 1"), ("guidance_scale", "nan", "a finite number")],
    "training/prepare_speech": [
        *(("voices_per_caption", value, "in [1, 12]") for value in ("0", "13")),
        *(("sampling_rate", value, "in [1, 655350]") for value in ("-1", "655351")),
    ],
    "training/evaluate_tokenizer": [("batch_size", "0", "at least 1"), ("max_samples", "0", "at least 1")],
    "benchmarks/samplers": [("remask", "2", "in [0, 1]"), ("entropy_bounds", "-1", "at least 0")],
    "benchmarks/quantizers": [("seeds", "-1", "in [0,"), ("speed_rounds", "0", "at least 1")],
    "benchmarks/kinds_of_diffusion": [("num_inference_steps", "0", "at least 1")],
    "benchmarks/growth": [("rounds", "0", "at least 1")],
    "benchmarks/data_memory": [
        *((name, "0", "at least 1") for name in ("counts", "folder_counts", "code_counts", "max_train_steps")),
        *(("dataloader_num_workers", "-1", "at least 0"), ("output_dir", "", "no path")),
    ],
    "benchmarks/code_embeddings": [("max_train_steps", "0", "at least 1"), ("seeds", "-1", "in [0,")],
    "benchmarks/scaling": [("gpus", "0", "at least 1"), ("utilization", "2", "in [0, 1]")],
    "examples/lora_style": [("rank", "0", "at least 1"), ("num_train_pictures", "0", "at least 1")],
    "examples/animate_sampling": [("side", "0", "at least 1"), ("seed", "-1", "in [0,")],
    "diffusers_vqdit/app/__main__": [("push_to_space", "a/b/c", "must be the name of a repository")],
    "diffusers_vqdit/__main__": [("seed", "-1", "in [0,"), ("num_inference_steps", "0", "at least 1")],
}
BAD = [(script, *case) for script in TRAINING for case in SHARED]
BAD += [(script, *case) for script, cases in SINGLE.items() for case in cases]


@pytest.fixture(scope="module")
def parse(root):
    """Parse the arguments of a script, that is loaded once."""
    modules = {}

    def parse(name, arguments, monkeypatch):
        if name not in modules:
            package = name.rpartition("/")[0].replace("/", ".") if name.startswith("diffusers_vqdit") else None
            spec = importlib.util.spec_from_file_location(name.replace("/", "."), root / f"{name}.py")
            modules[name] = importlib.util.module_from_spec(spec)
            modules[name].__package__ = package
            spec.loader.exec_module(modules[name])
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])  # what the examples read
        return modules[name].parse_args()

    return parse


@pytest.mark.parametrize(("script", "flag", "value", "accepted"), BAD)
def test_a_value_out_of_range_is_refused(parse, monkeypatch, capsys, script, flag, value, accepted):
    with pytest.raises(SystemExit) as refused:
        parse(script, [*NEEDED.get(script, "").split(), f"--{flag}", value], monkeypatch)
    told = capsys.readouterr().err.splitlines()[-1]
    assert refused.value.code == 2
    assert f"argument --{flag}: " in told and accepted in told
    assert repr(value) in told or f"={value} " in told or f"={float(value)} " in told, told


# examples/lora_style hands what it doesn't know to train_vqdit.
@pytest.mark.parametrize("script", sorted({*TRAINING, *NEEDED, *SINGLE} - {"examples/lora_style"}))
def test_no_script_takes_an_abbreviation(parse, monkeypatch, capsys, script):
    args = parse(script, NEEDED.get(script, "").split(), monkeypatch)
    longest = max(vars(args), key=len)
    with pytest.raises(SystemExit):
        parse(script, [*NEEDED.get(script, "").split(), f"--{longest[:-1]}", "1"], monkeypatch)
    assert f"unrecognized arguments: --{longest[:-1]} 1" in capsys.readouterr().err


@pytest.mark.parametrize("script", TRAINING)
def test_an_abbreviated_token_is_refused_and_not_shown(parse, monkeypatch, capsys, script):
    with pytest.raises(SystemExit):
        parse(script, [*NEEDED.get(script, "").split(), "--hub_tok", "hf_x"], monkeypatch)
    assert "hf_x" not in capsys.readouterr().err


@pytest.mark.parametrize(("teacher", "student"), [(16, 16), (2, 4), (12, 2), (5, 2), (3, 1)])
def test_steps_are_halved_round_by_round(parse, monkeypatch, capsys, teacher, student):
    steps = ["--num_teacher_steps", str(teacher), "--num_student_steps", str(student)]
    with pytest.raises(SystemExit):
        parse("training/distill_vqdit", [*NEEDED["training/distill_vqdit"].split(), *steps], monkeypatch)
    message = f"num_teacher_steps={teacher} must be 2, 4, 8, ... times num_student_steps={student}"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "image_vq", "text_vq"])
def test_a_training_checkpoint_is_no_model(parse, monkeypatch, capsys, tmp_path, flag):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(SystemExit):
        parse("training/train_vqdit", ["--codes_dir", "x", f"--{flag}", str(tmp_path / "checkpoint-3")], monkeypatch)
    assert f"argument --{flag}" in (told := capsys.readouterr().err) and "output_dir" in told


@pytest.mark.parametrize("script", TRAINING)
def test_zero_means_never_and_every_training_script_compiles(parse, monkeypatch, script):
    zeros = ["checkpointing_steps", "validation_steps", "checkpoints_total_limit", "max_grad_norm", "lr_warmup_steps"]
    arguments = [word for flag in zeros for word in (f"--{flag}", "0")]
    args = parse(script, [*NEEDED.get(script, "").split(), *arguments, "--compile"], monkeypatch)
    assert [getattr(args, flag) for flag in zeros] == [0] * 5 and args.compile
