"""All training scripts when they are killed, stopped, given bad gradients, and started twice."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffusers_vqdit.training.checkpoints import read_manifest, verify_checkpoint
from diffusers_vqdit.training.files import checkpoints
from diffusers_vqdit.training.run import TrainingRun


SCRIPTS = ["train_image_vq", "train_text_vq", "train_audio_vq", "train_vqdit", "train_latent_dit", "distill_vqdit"]
SMALL = "--num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --dropout 0.1"


@pytest.fixture
def arguments(image_vq, text_vq, tokenizer, pipeline, picture_folder, audio_codecs, tmp_path):
    """The arguments of a small run of each script, as a function of its output folder."""
    image_vq.save_pretrained(tmp_path / "image_vq")
    text_vq.save_pretrained(tmp_path / "text_vq")
    tokenizer.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    pipeline.save_pretrained(tmp_path / "teacher")
    options = {
        "train_image_vq": "--validation_split none --block_out_channels 8 8 --norm_num_groups 4 --latent_channels 4 "
        "--resolution 16 --num_vq_embeddings 16 --validation_steps 3 --adversarial_weight 0.5 --adversarial_start 2 "
        "--lecam_weight 0.01 --discriminator_channels 4 --discriminator_layers 2",
        "train_text_vq": "--validation_split none --tokenizer_vocab_size 300 --num_codes 32 --hidden_size 8",
        "train_audio_vq": "--validation_split none --sampling_rate 1600 --n_fft 32 --hop_length 8 --num_mel_bins 6 "
        "--block_out_channels 8 8 --norm_num_groups 4 --latent_channels 4 --num_vq_embeddings 16 --crop_length 0.1 "
        "--validation_steps 3 --gradient_accumulation_steps 2",
        "train_vqdit": f"--image_vq {tmp_path}/image_vq --text_vq {tmp_path}/text_vq --tasks text->image:2,->image:1 "
        f"{SMALL} --gradient_accumulation_steps 2",
        "train_latent_dit": f"--image_vq {tmp_path}/image_vq --label_column label {SMALL}",
        "distill_vqdit": f"--pretrained_model_name_or_path {tmp_path}/teacher --num_teacher_steps 4 "
        "--num_student_steps 1 --tasks text->image:2,image->text:1 --gradient_accumulation_steps 2",
    }

    def arguments(name, folder, more=""):
        data = audio_codecs.sound_folder(tmp_path / "sounds") if name == "train_audio_vq" else picture_folder
        return (
            f"--train_data_dir {data} --output_dir {tmp_path / folder} --report_to none --use_ema "
            f"--ema_decay 0.9 --train_batch_size 4 --max_train_steps 6 --checkpointing_steps 2 {options[name]} {more}"
        ).split()

    return arguments


@pytest.fixture
def run(script, arguments):
    def run(name, folder, more="", **patches):
        module = script(name)
        for attribute, value in patches.items():
            setattr(module, attribute, value)
        module.main(module.parse_args(arguments(name, folder, more)))

    return run


def results(folder):
    """The weights that a run ended with, by file and name, and its card but for the command and the folder's name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(("checkpoint-", "older-")):
            found |= {f"{name} {key}": value for key, value in load_file(path).items()}
    card = (folder / "README.md").read_text().replace(folder.name, "out")
    return found, card.replace(" --resume_from_checkpoint latest", "")


def assert_same(folder, other):
    (weights, card), (others, other_card) = results(folder), results(other)
    assert weights.keys() == others.keys() and weights
    assert not [name for name, value in weights.items() if not torch.equal(value, others[name])]
    assert card == other_card
    assert not [name for name in os.listdir(folder) if name.startswith(".") and name != ".lock"]


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_that_was_stopped_anywhere_ends_bit_identical(run, tmp_path, monkeypatch, name):
    """By SIGTERM, in a step, beside a damaged checkpoint, in the final save: as an unbroken run."""
    run(name, "whole")
    end_step = TrainingRun.end_step

    def stopped(self, step):
        end_step(self, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 5:
            raise Killed

    monkeypatch.setattr(TrainingRun, "end_step", stopped)
    got = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        run(name, "broken", "--checkpoints_total_limit 0")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert got == [signal.SIGTERM]
    assert [path.name for path in checkpoints(tmp_path / "broken")] == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(Killed):
        run(name, "broken", "--checkpoints_total_limit 0 --resume_from_checkpoint latest")
    (tmp_path / "broken" / "checkpoint-4" / "optimizer.bin").write_bytes(b"")
    monkeypatch.undo()

    def killed(*args, **kwargs):
        raise Killed

    with pytest.raises(Killed):
        final = (
            "publish_pipeline"
            if not name.endswith(("image_vq", "text_vq", "audio_vq"))
            else "save_pretrained_atomically"
        )
        run(name, "broken", "--resume_from_checkpoint latest", **{final: killed})
    assert verify_checkpoint(tmp_path / "broken" / "checkpoint-6").step == 6
    assert not (tmp_path / "broken" / "README.md").exists()
    run(name, "broken", "--resume_from_checkpoint latest")
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_gradients_that_are_not_finite_leave_nothing_behind(run, tmp_path, monkeypatch, name):
    backward, calls, bad = Accelerator.backward, [], {4, 5}  # at a checkpointing step, in all scripts

    def spoiled(self, loss, **kwargs):
        backward(self, loss, **kwargs)
        calls.append(loss)
        if len(calls) in bad or "always" in bad:
            for model in self._models:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.flatten()[0] = float("nan")

    monkeypatch.setattr(Accelerator, "backward", spoiled)
    run(name, "out")
    before, _ = results(tmp_path / "out")
    assert all(torch.isfinite(value).all() for value in before.values() if value.is_floating_point())
    skipped = read_manifest(checkpoints(tmp_path / "out")[-1]).measures["skipped_steps"]
    assert 1 <= skipped <= 2

    bad.add("always")
    with pytest.raises(RuntimeError, match="3 steps in a row, up to step 3. Lower --learning_rate"):
        run(name, "out")
    after, _ = results(tmp_path / "out")
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        run(name, "out", "--max_skipped_steps 2")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_must_not_change_is_refused(run, tmp_path, caplog, name):
    changes = {
        "train_image_vq": ("--reconstruction_loss l1", "reconstruction_loss='l2', which is now 'l1'"),
        "train_text_vq": ("--num_codes 40", "model.num_codes=32, which is now 40"),
        "train_audio_vq": ("--crop_length 0.2", "crop_length=0.1, which is now 0.2"),
        "train_vqdit": ("--loss_weighting nelbo", "loss_weighting='flat', which is now 'nelbo'"),
        "train_latent_dit": ("--objective v_prediction", "objective='flow', which is now 'v_prediction'"),
        "distill_vqdit": ("--num_teacher_steps 2", "num_teacher_steps=4, which is now 2"),
    }
    change, message = changes[name]
    run(name, "out", "--max_train_steps 2")
    with pytest.raises(ValueError, match=message):
        run(name, "out", f"{change} --resume_from_checkpoint latest")
    with pytest.raises(ValueError, match="(training|encoded) data="):
        run(name, "out", "--max_train_samples 8 --resume_from_checkpoint latest")
    run(name, "out", "--train_batch_size 2 --max_train_steps 3 --resume_from_checkpoint latest")
    assert "train_batch_size=4, which is now 2" in caplog.text
    one_round = "--num_teacher_steps 2" if name == "distill_vqdit" else ""  # which takes a step
    anew = f"--max_train_steps 1 --checkpointing_steps 0 --validation_steps 0 {one_round}"
    run(name, "out", anew)  # in the same folder
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-1"]
    assert sorted(path.name for path in (tmp_path / "out").glob("older-checkpoints/*/*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]


@pytest.mark.slow
def test_muon_goes_on_bit_identical_and_only_as_muon(run, tmp_path):
    more = "--optimizer muon --lr_scheduler linear --checkpoints_total_limit 0"
    run("train_vqdit", "whole", more)
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    with pytest.raises(ValueError, match="optimizer='muon', which is now 'adamw'"):
        run("train_vqdit", "broken", "--optimizer adamw --resume_from_checkpoint latest")
    more = more.removeprefix("--optimizer muon ")  # which the run had
    run("train_vqdit", "broken", f"{more} --resume_from_checkpoint latest")
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_vqdit", "--tasks=->image:1 --validation_prompts dot", "validation_prompts=.'dot'. can't be drawn"),
        ("train_latent_dit", "--validation_labels round cube", "validation_labels=.'round', 'cube'. can't be drawn"),
        ("train_latent_dit", "--validation_prompts dot", "validation_prompts=.'dot'. can't be drawn"),
    ],
)
def test_validation_is_tried_before_the_first_step(run, tmp_path, monkeypatch, name, change, message):
    monkeypatch.setattr(TrainingRun, "begin", None)
    with pytest.raises(ValueError, match=message):
        run(name, "out", change)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_folder_is_tried_before_anything_is_read(run, tmp_path, name):
    folders = {"train_image_vq": "samples", "train_text_vq": "tokenizer", "train_audio_vq": "samples"}
    logs = {"train_image_vq": "image_vq", "train_text_vq": "text_vq", "train_latent_dit": "vqdit-latent"}
    logs |= {"distill_vqdit": "vqdit-distillation", "train_audio_vq": "audio_vq"}
    folders = folders.get(name, "transformer")
    for number, place in enumerate(["logs", f"logs/{logs.get(name, 'vqdit')}", "older-checkpoints", folders]):
        path = tmp_path / f"out{number}" / place
        path.parent.mkdir(parents=True)
        path.write_text("")
        with pytest.raises(ValueError, match=f"output_dir='{tmp_path}/out{number}' has a file '{place}' where a fold"):
            run(name, f"out{number}", "--report_to tensorboard", train=None)
    (tmp_path / "out" / "README.md").mkdir(parents=True)
    with pytest.raises(ValueError, match="has a folder 'README.md'"):
        run(name, "out", train=None)


@pytest.mark.parametrize("place", ["folder", "file/x", "file/below/x", "no.safetensors", f"{'x' * 250}"])
def test_where_latents_are_kept_is_tried_before_anything_is_read(run, tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "no.safetensors").write_text("no latents")
    with pytest.raises(ValueError, match="latents_file='.* (can't be written|is no regular file|is damaged)"):
        run("train_latent_dit", "out", f"--latents_file {tmp_path / place}", train=None)


def test_layers_of_a_lora_are_looked_for_before_anything_is_encoded(script, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipe")
    module, source = script("train_vqdit"), f"--train_data_dir {tmp_path} --output_dir {tmp_path / 'out'}"
    start = f"{source} --pretrained_model_name_or_path {tmp_path / 'pipe'} --report_to none --rank 2 --lora_layers"
    module.load_codes = None
    bad = [
        "to_x",
        "to_q to_x",
        "q",
        "o_q",
        "attn1",
        "norm1 to_q",
        "transformer_blocks",
        "to_q.weight",
        "TO_Q",
        "to_out",
    ]
    bad += ["transformer_blocks.2.attn1.to_q", "all-linear", ".*", "to_q,to_k"]
    for layers in bad:
        with pytest.raises(ValueError, match="lora_layers has '.*', which must be linear layers, some of .*to_q'"):
            module.main(module.parse_args(f"{start} {layers}".split()))
    for layers in ["to_q", "attn1.to_k ff.net.2", "transformer_blocks.1.attn1.to_q"]:
        with pytest.raises(TypeError):  # goes on
            module.main(module.parse_args(f"{start} {layers}".split()))
    print(f"layers of LoRA that are not there: {len(bad)} refused")


def test_a_patch_of_a_pretrained_segment_is_refused_before_anything_is_encoded(script, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipe")
    module, source = script("train_vqdit"), f"--train_data_dir {tmp_path} --output_dir {tmp_path / 'out'}"
    start = f"{source} --pretrained_model_name_or_path {tmp_path / 'pipe'} --report_to none --tasks new->image".split()
    module.load_codes = None
    for patch in ("image=2x2", "text=3", "new=1 --patch image=1x2"):
        with pytest.raises(
            ValueError, match=f"{patch.split()[-1]} is of a new transformer; the pretrained one has no pa"
        ):
            module.main(module.parse_args([*start, "--patch", *patch.split()]))
    with pytest.raises(ValueError, match="patch: 'nwe' must be one of \\['image', 'label', 'new', 'text'\\]"):
        module.main(module.parse_args([*start, "--patch", "nwe=1"]))
    with pytest.raises(TypeError):  # goes on
        module.main(module.parse_args([*start, "--patch", "new=1"]))


# How many moments of each script:
# `KILLS=20 python -m pytest -m slow tests/training/test_run_scripts.py -k random_moment -n 0 -s`
KILLS = int(os.environ.get("KILLS", 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_process_stopped_at_a_random_moment_ends_bit_identical(run, root, arguments, tmp_path, name):
    """By SIGKILL and by Ctrl-C in turns: about any step, checkpoint or the final save, and then resumed."""
    more, folder = "--max_train_steps 60 --checkpointing_steps 5 --checkpoints_total_limit 0", tmp_path / "broken"
    run(name, "whole", more)
    found, chance = [], random.SystemRandom()  # each run seeds the module's own generator
    for number in range(KILLS):
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, root / "training" / f"{name}.py", *arguments(name, "broken", more)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        kind, step = (signal.SIGKILL, signal.SIGINT)[number % 2], chance.randrange(0, 61, 5)
        begun = folder / f"checkpoint-{step}" if step else folder / ".lock"
        while process.poll() is None and not begun.exists():
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 2.0 if step in (0, 60) else 0.2))
        process.send_signal(kind)
        assert process.wait() in (-kind, 0)  # 0: it had ended
        found.append(f"{len(checkpoints(folder))}{'' if process.returncode else ' (ended)'}")
        run(name, "broken", f"{more} --resume_from_checkpoint latest")
        assert_same(tmp_path / "whole", folder)
    print(f"\n{name}: {KILLS} of {KILLS} bit-identical; checkpoints there were when stopped: {', '.join(found)}")


@pytest.mark.slow
def test_a_run_in_which_nothing_is_wrong_warns_of_nothing(root, pipeline, picture_folder, tmp_path):
    """Nor does it repeat what other libraries tell of each file; a resumed finetuning, as the terminal shows it."""
    pipeline.save_pretrained(tmp_path / "pipe")
    command = f"--pretrained_model_name_or_path {tmp_path / 'pipe'} --train_data_dir {picture_folder} --use_ema "
    command += f"--tasks text->image:1 --train_batch_size 4 --checkpointing_steps 1 --output_dir {tmp_path / 'out'} "
    for more in ("--max_train_steps 2", "--max_train_steps 2 --resume_from_checkpoint latest"):
        command_line = [sys.executable, root / "training" / "train_vqdit.py", *command.split(), *more.split()]
        done = subprocess.run(command_line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [re.split("[\r\n]", line)[-1] for line in done.stderr.splitlines()]
        logged = [line for line in lines if re.search(r" (DEBUG|INFO|WARNING|ERROR) |[Ww]arning|float32", line)]
        assert logged and all(re.search(r" INFO (diffusers_vqdit|__main__)", line) for line in logged), logged
