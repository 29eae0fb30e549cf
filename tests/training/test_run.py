"""The output folder of a run, steps that are skipped, and the signals that end it."""

import argparse
import errno
import math
import multiprocessing
import os
import signal
import subprocess
import threading

import pytest
import torch
from accelerate import Accelerator

from diffusers_vqdit.training.checkpoints import find_checkpoint, read_manifest, save_checkpoint
from diffusers_vqdit.training.files import SCRATCH_PREFIX, checkpoints
from diffusers_vqdit.training.run import SETTINGS, check_drawable, due, prepare_output_dir, training_run
from diffusers_vqdit.training.setup import make_ema


ARGS = argparse.Namespace(**{name: 0 for name in SETTINGS})


@pytest.fixture
def accelerator():
    return Accelerator()


def begin(run, checkpoint=None, **identity):
    return run.begin(checkpoint, identity=identity, args=ARGS, states={})


# ---------------------------------------------------------------------------------------------------------------------
# The folder


@pytest.mark.parametrize("kind", ["new", "there", "a link", "the working folder", "brackets"])
def test_a_folder_that_can_be_written_is_left_as_it_was(accelerator, tmp_path, monkeypatch, kind):
    folder = tmp_path / ("out [1]" if kind == "brackets" else "out")
    if kind in ("there", "the working folder"):
        folder.mkdir()
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    if kind == "the working folder":
        monkeypatch.chdir(folder)
        folder = type(folder)(".")
    with training_run(accelerator, folder, folders=["samples"], files=["README.md"]):
        assert os.listdir(folder) == [".lock"]
    assert os.listdir(folder) == [".lock"]


def test_folders_that_can_not_be_written_are_named_at_the_start(accelerator, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "dangling"):
        with pytest.raises(ValueError, match=f"output_dir='{path}' can't be written: ") as error:
            prepare_output_dir(path)
        assert ("it is a link to what is not there" in str(error.value)) == (path.name == "dangling")
    (tmp_path / "README.md").mkdir()
    for _ in range(2):  # what refuses gives the folder back
        with pytest.raises(ValueError, match="has a folder 'README.md'"):
            prepare_output_dir(tmp_path, files=["README.md"])

    def fails(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.rename", fails)
    with pytest.raises(ValueError, match="can't be written: Permission denied"):
        prepare_output_dir(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "README.md", "dangling", "file"]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_a_folder_without_the_right_to_write(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="can't be written: Permission denied"):
        prepare_output_dir(tmp_path / "out")


def test_what_a_killed_run_left_is_removed_and_nothing_else(accelerator, tmp_path):
    (tmp_path / f"{SCRATCH_PREFIX}checkpoint-5" / "x").mkdir(parents=True)
    mine = [tmp_path / name for name in ("tmp-out", ".tmp-mine", "notes", "checkpoint-best")]
    for folder in mine:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    with training_run(accelerator, tmp_path) as run:
        begin(run)
    assert sorted(tmp_path.iterdir()) == sorted([*mine, tmp_path / ".lock"])
    assert all((folder / "mine.txt").read_text() == "mine" for folder in mine)


def test_a_second_run_is_refused_until_the_first_ends(accelerator, tmp_path):
    with training_run(accelerator, tmp_path):
        with pytest.raises(ValueError, match=f"output_dir='{tmp_path}' is in use: another run"):
            with training_run(accelerator, tmp_path):
                raise AssertionError
    with pytest.raises(KeyError):
        with training_run(accelerator, tmp_path):
            raise KeyError
    with training_run(accelerator, tmp_path):
        pass


def _hold(folder, ready):
    lock = prepare_output_dir(folder)
    ready.set()
    threading.Event().wait()
    lock.release()


def test_a_run_that_is_killed_gives_its_folder_back(accelerator, tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match="is in use"):
        prepare_output_dir(tmp_path)
    process.kill()
    process.join()
    with training_run(accelerator, tmp_path):
        pass
    assert os.listdir(tmp_path) == [".lock"]


def test_a_full_disk_anywhere_in_a_run_is_called_that(accelerator, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(OSError, match="no space left on device while writing .*; checkpoint-3 is whole"):
        with training_run(accelerator, tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_the_end_needs_no_other_file_system(accelerator, image_vq, tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        accelerator.prepare(image_vq)
        with training_run(accelerator, tmp_path):
            save_checkpoint(accelerator, tmp_path, 1)
        assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Runs that follow each other


def save(accelerator, run, step, **options):
    return save_checkpoint(accelerator, run.output_dir, step, run=run.id, identity=run.identity, **options)


def test_a_run_knows_its_own_checkpoints(accelerator, tmp_path):
    accelerator.prepare(torch.nn.Linear(2, 2))
    with training_run(accelerator, tmp_path) as first:
        assert begin(first, objective="flow") == {} and first.step == 0
        for step in (2, 4, 6):
            save(accelerator, first, step, measures={"loss": 1.5, "skipped_steps": 2})
    with training_run(accelerator, tmp_path) as second:  # goes on from the middle
        with pytest.raises(ValueError, match="objective='flow', which is now 'epsilon'"):
            begin(second, tmp_path / "checkpoint-4", objective="epsilon")
        assert begin(second, tmp_path / "checkpoint-4", objective="flow")["loss"] == 1.5
        assert (second.id, second.step, second.skipped_steps) == (first.id, 4, 2)
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    with training_run(accelerator, tmp_path) as third:  # starts anew
        begin(third)
        assert third.id != first.id and not checkpoints(tmp_path)
        save(accelerator, third, 1, total_limit=1)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    aside = tmp_path / "older-checkpoints" / first.id
    assert {path.name for path in aside.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    with training_run(accelerator, tmp_path / "other") as fourth:  # goes on from another folder: a run of its own
        begin(fourth, aside / "checkpoint-6", objective="flow")
        assert fourth.step == 6 and fourth.id not in (first.id, third.id)
    assert read_manifest(aside / "checkpoint-6").run == first.id


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def one_step(run, optimizer, model, factor, max_grad_norm=1.0):
    loss = factor * model(torch.ones(1, 2)).sum()
    run.accelerator.backward(loss)
    result = run.optimizer_step(optimizer, model.parameters(), loss, max_grad_norm)
    optimizer.zero_grad()
    return result


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e39])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(accelerator, tmp_path, bad):
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with training_run(accelerator, tmp_path) as run:
        one_step(run, optimizer, model, 1.0)
        state = {k: v.clone() for k, v in optimizer.state[model.weight].items()}
        weight = model.weight.clone()
        norm, stepped = one_step(run, optimizer, model, bad)
        run.end_step(2)
        assert not stepped and not math.isfinite(norm) and run.skipped_steps == 1
        assert torch.equal(model.weight, weight)
        assert all(torch.equal(value, optimizer.state[model.weight][k]) for k, value in state.items())
        assert one_step(run, optimizer, model, 1.0)[1] and not torch.equal(model.weight, weight)


@pytest.mark.parametrize("allowed", [1, 3, 0])
def test_several_in_a_row_stop_the_run_with_the_remedy(accelerator, tmp_path, allowed):
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with training_run(accelerator, tmp_path, max_skipped_steps=allowed) as run:
        bad = [allowed > 1, allowed > 1, False, *[True] * (allowed - 1)] if allowed else [True] * 9
        for step, is_bad in enumerate(bad):  # with a good one between them, they are not in a row
            one_step(run, optimizer, model, math.nan if is_bad else 1.0)
            run.end_step(step)
        assert run.skipped_steps == sum(bad)
        if allowed:
            one_step(run, optimizer, model, math.nan)
            with pytest.raises(RuntimeError, match=f"{allowed} steps in a row.*Lower --learning_rate.*--mixed_prec"):
                run.end_step(9)


@pytest.mark.parametrize(("max_grad_norm", "expected"), [(0.0, 8.0), (1.0, 0.5), (16.0, 8.0)])
def test_no_norm_clips_nothing_and_is_measured(accelerator, tmp_path, max_grad_norm, expected):
    model = torch.nn.Linear(2, 2, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with training_run(accelerator, tmp_path) as run:
        before = model.weight.clone()
        norm, _ = one_step(run, optimizer, model, 8.0, max_grad_norm)
    assert norm == pytest.approx(16.0)
    torch.testing.assert_close(before - model.weight, torch.full((2, 2), expected), rtol=1e-5, atol=1e-5)


def test_overflows_of_fp16_are_its_own_business(tmp_path, monkeypatch):
    """They lower the scale and skip the step, uncounted; a loss that is not finite is counted."""
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    accelerator = Accelerator()
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**100)
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with training_run(accelerator, tmp_path) as run:
        for factor, stepping, skipped in ((1e20, False, 0), (1.0, True, 0), (math.nan, False, 1), (1.0, True, 1)):
            weight, scale = model.weight.clone(), accelerator.scaler.get_scale()
            assert one_step(run, optimizer, model, factor)[1] is stepping
            run.end_step(1)
            assert torch.equal(model.weight, weight) is not stepping and run.skipped_steps == skipped
            assert (accelerator.scaler.get_scale() < scale) is not stepping


@pytest.mark.parametrize("fused", [False, True])
def test_overflows_that_no_lower_scale_can_end_are_counted(tmp_path, monkeypatch, fused):
    """Gradients that are not finite whatever the scale, of a loss that is; fused optimizers leave steps out unseen."""
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=8.0)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    with training_run(accelerator, tmp_path, max_skipped_steps=2) as run:
        weight = model.weight.clone()
        with pytest.raises(RuntimeError, match="2 steps in a row, up to step 5"):
            for step in range(1, 9):
                loss = model(torch.ones(1, 2)).sum()
                accelerator.backward(loss)
                model.weight.grad.fill_(math.inf)
                assert not run.optimizer_step(optimizer, model.parameters(), loss, 1.0, schedule)[1]
                optimizer.zero_grad()
                run.end_step(step)
        assert torch.equal(model.weight, weight) and schedule.scheduler.last_epoch == 0


def test_the_scale_of_fp16_is_taken_once_off_gradients_that_wait_for_another_optimizer(tmp_path, monkeypatch):
    """As a discriminator's over several micro-batches, whose step comes after the tokenizer's."""

    def norms(scaled):
        torch.manual_seed(0)
        accelerator = Accelerator()
        if scaled:
            monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=1024.0)
        models = [torch.nn.Linear(3, 3) for _ in range(2)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in models]
        models, optimizers = ([accelerator.prepare(one) for one in every] for every in (models, optimizers))
        found = []
        with training_run(accelerator, tmp_path) as run:
            for last, batch in enumerate(torch.randn(2, 5, 3)):
                losses = [model(batch).square().mean() for model in models]
                for model, optimizer, loss in zip(models, optimizers, losses, strict=True):
                    accelerator.backward(loss)
                    if last:
                        found.append(run.optimizer_step(optimizer, model.parameters(), loss, 1.0)[0])
        return found

    torch.testing.assert_close(torch.tensor(norms(True)), torch.tensor(norms(False)), rtol=0.01, atol=0)


def test_zero_is_never():
    assert [step for step in range(1, 7) if due(step, 3)] == [3, 6]
    assert not any(due(step, 0) for step in range(1, 7))


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def test_a_signal_is_noted_and_sent_again_at_the_end(accelerator, tmp_path):
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    # A shell's background processes begin with Ctrl-C ignored.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with training_run(accelerator, tmp_path) as run:
            begin(run)
            assert not run.stop_requested()
            os.kill(os.getpid(), signal.SIGTERM)
            assert run.stop_requested() and not got and os.path.exists(tmp_path / ".lock")
        assert got == [signal.SIGTERM] and os.listdir(tmp_path) == [".lock"]
        with training_run(accelerator, tmp_path) as run:
            begin(run)
        assert got == [signal.SIGTERM] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            with training_run(accelerator, tmp_path) as run:
                begin(run)
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def _stop(folder, number, twice, ignored):
    if ignored:
        signal.signal(number, signal.SIG_IGN)
    with training_run(Accelerator(), folder) as run:
        begin(run)
        os.kill(os.getpid(), number)
        if twice:
            os.kill(os.getpid(), number)
        (folder / "saved").touch()


@pytest.mark.parametrize(("twice", "ignored"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_by_the_signal(tmp_path, number, twice, ignored):
    if (number, twice, ignored) == (signal.SIGINT, False, False):
        pytest.skip("multiprocessing catches KeyboardInterrupt")
    process = multiprocessing.get_context("fork").Process(target=_stop, args=(tmp_path, number, twice, ignored))
    process.start()
    process.join(60)
    assert process.exitcode == -number
    assert (tmp_path / "saved").exists() is not twice


def test_a_run_in_a_thread_leaves_signals_alone(accelerator, tmp_path):
    errors = []

    def run_in_thread():
        try:
            with training_run(accelerator, tmp_path) as run:
                begin(run)
                assert not run.stop_requested()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run_in_thread)
    thread.start()
    thread.join()
    assert not errors and os.listdir(tmp_path) == [".lock"]


# ---------------------------------------------------------------------------------------------------------------------
# Validation


def test_prompts_that_can_not_be_drawn_are_refused(pipeline):
    state, training = torch.get_rng_state(), pipeline.transformer.train().training
    check_drawable(pipeline, "prompt", "validation_prompts", ["a red apple", "a dot"])
    check_drawable(pipeline, "prompt", "validation_prompts", [])
    assert torch.equal(torch.get_rng_state(), state) and pipeline.transformer.training is training
    assert not pipeline.image_vq.training
    with pytest.raises(ValueError, match="validation_prompts=.''. can't be drawn: "):
        check_drawable(pipeline, "prompt", "validation_prompts", [""])
    pipeline.transformer.register_to_config(tasks=["->image"])
    with pytest.raises(ValueError, match="can't be drawn: .*text->image.*it knows"):
        check_drawable(pipeline, "prompt", "validation_prompts", ["a dot"])
    assert pipeline.transformer.training


# ---------------------------------------------------------------------------------------------------------------------
# Other settings


def test_a_resumed_run_takes_the_rates_it_is_given_and_else_the_checkpoints(tmp_path):
    """So that a run stopped by steps that were not finite goes on with a lower rate, as its message says."""

    def run_steps(rate, beta, steps, checkpoint):
        accelerator = Accelerator(step_scheduler_with_optimizer=False)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(beta, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        args = argparse.Namespace(**{**vars(ARGS), "learning_rate": rate, "adam_beta1": beta})
        with training_run(accelerator, tmp_path) as run:
            run.begin(checkpoint, identity={}, args=args, states={})
            for _ in range(steps):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                schedule.step()
            kept = run.kept()
            path = save_checkpoint(accelerator, tmp_path, run.step + steps, **kept)
        group = optimizer.param_groups[0]
        return path, group["lr"], group["betas"][0]

    path, rate, beta = run_steps(1.0, 0.9, 3, None)
    assert (rate, beta) == (pytest.approx(1 / 4), 0.9)
    path, rate, beta = run_steps(1.0, 0.9, 1, path)
    assert (rate, beta) == (pytest.approx(1 / 5), 0.9)
    _, rate, beta = run_steps(0.1, 0.8, 1, path)
    assert (rate, beta) == (pytest.approx(0.1 / 6), 0.8)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (3, 2), (2, 2)])
def test_a_resumed_run_begins_a_step_with_its_first_micro_batch(tmp_path, before, after):
    """However many a step had before."""
    path, counts = None, []
    for accumulation, steps in ((before, 5), (after, 3)):
        accelerator = Accelerator(gradient_accumulation_steps=accumulation)
        model = accelerator.prepare(torch.nn.Linear(2, 2))
        with training_run(accelerator, tmp_path) as run:
            begin(run, path)
            for _ in range(steps):
                counts.append(0)
                while not counts[-1] or not accelerator.sync_gradients:
                    with accelerator.accumulate(model):
                        counts[-1] += 1
            path = save_checkpoint(accelerator, tmp_path, run.step + steps, **run.kept())
    assert counts == [before] * 5 + [after] * 3


def test_a_resumed_run_averages_as_it_is_told(tmp_path):
    path = None
    for decay in (0.5, 0.75):
        accelerator = Accelerator()
        model = accelerator.prepare(torch.nn.Linear(2, 2))
        args = argparse.Namespace(**{**vars(ARGS), "ema_decay": decay, "use_ema": True})
        ema = make_ema(args, model.parameters(), accelerator.device)
        with training_run(accelerator, tmp_path) as run:
            run.begin(path, identity={}, args=args, states={"ema": ema})
            assert ema.decay == decay
            ema.step(model.parameters())
            path = save_checkpoint(accelerator, tmp_path, run.step + 1, **run.kept())
    assert ema.optimization_step == 2


def test_a_rate_that_follows_the_batch_follows_a_resumed_runs(tmp_path):
    path, rates = None, []
    for accumulation in (1, 4, 4):
        accelerator = Accelerator(gradient_accumulation_steps=accumulation, step_scheduler_with_optimizer=False)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * accumulation)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        own = {"scale_lr": True, "learning_rate": 0.1, "gradient_accumulation_steps": accumulation}
        with training_run(accelerator, tmp_path) as run:
            run.begin(path, identity={}, args=argparse.Namespace(**{**vars(ARGS), **own}), states={})
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
            path = save_checkpoint(accelerator, tmp_path, run.step + 1, **run.kept())
    assert rates == pytest.approx([0.1, 0.4, 0.4])
