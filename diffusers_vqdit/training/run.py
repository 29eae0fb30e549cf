"""What the training scripts' loops share: the output folder, steps that are skipped, signals, where a run goes on."""

import argparse
import logging
import math
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout

from ..utils.checks import shown
from ..utils.weight_files import fsync, is_dangling
from .checkpoints import check_identity, load_checkpoint, read_manifest, set_aside
from .files import (
    SCRATCH_PREFIX,
    DiskFullError,
    check_kind,
    checkpoints,
    full_disk_error,
    full_disk_number,
    scratch_folder,
)
from .sharding import clip_gradients
from .validation import passing


logger = logging.getLogger(__name__)

# What changes the course of a run that is resumed, but not what it trains: a difference is told.
SETTINGS = (
    *("train_batch_size", "gradient_accumulation_steps", "seed", "learning_rate", "lr_scheduler", "lr_warmup_steps"),
    *("lr_num_cycles", "lr_power"),
    *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "ema_decay"),
    *("mixed_precision", "max_train_steps", "num_train_epochs", "scale_lr", "lora_dropout"),
    *("discriminator_learning_rate", "discriminator_max_grad_norm", "max_skipped_steps"),
)
# Those of them that the optimizers' state would bring back.
OPTIMIZER_SETTINGS = (
    *("learning_rate", "scale_lr", "discriminator_learning_rate"),
    *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
)


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps, never for 0, is due."""
    return every > 0 and step % every == 0


def prepare_output_dir(output_dir: str | Path, *, folders: Sequence[str] = (), files: Sequence[str] = ()) -> FileLock:
    """Make a run's output folder and try in it what the end of the run needs, before anything else is done.

    Args:
        folders, files: what the run will write there; what is there already must be of the same kind.

    Returns:
        the lock that keeps other runs out until it is released or the process ends.

    Raises:
        ValueError: if the folder can't be written, or another run is writing there.
    """
    output_dir = Path(output_dir)
    try:
        str(output_dir).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"output_dir={shown(str(output_dir))} must be valid UTF-8") from error
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / ".lock")  # which stays there: to remove a lock is to let two runs have it
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"output_dir={shown(str(output_dir))} is in use: another run is writing there") from error
    except OSError as error:
        raise _unusable(output_dir, error) from error
    try:
        check_kind(output_dir, folders, files)
        # What a run that was killed while it wrote has left; the lock says that it is no longer there.
        for left in output_dir.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        with scratch_folder(output_dir) as scratch:
            (scratch / "a").write_bytes(bytes(1 << 16))
            fsync(scratch / "a")
            (scratch / "folder").mkdir()
            (scratch / "a").rename(scratch / "folder" / "b")
            moved = output_dir / f"{scratch.name}-moved"
            (scratch / "folder").rename(moved)
            shutil.rmtree(moved)
            fsync(output_dir)
    except OSError as error:
        lock.release()
        raise _unusable(output_dir, error) from error
    except ValueError:
        lock.release()
        raise
    return lock


def _unusable(output_dir: Path, error: OSError) -> ValueError:
    reason, where = error.strerror or error, error.filename or output_dir
    if is_dangling(where):
        reason = "it is a link to what is not there"
    return ValueError(f"output_dir={shown(str(output_dir))} can't be written: {reason} ({where})")


class TrainingRun:
    """A run that goes on, from nothing or from a checkpoint: made by [`training_run`].

    Attributes:
        id (`str`): the run's name, by which its checkpoints are known; later runs' names sort after earlier ones'.
        step (`int`): the optimizer steps of the checkpoint that it went on from.
        identity, settings, states (`dict`): see [`save_checkpoint`].
        skipped_steps (`int`): the steps whose loss or gradients were not finite.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, max_skipped_steps: int) -> None:
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.max_skipped_steps = max_skipped_steps
        self.id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        self.step = 0
        self.identity: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.states: dict[str, Any] = {}
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._skipped_now = False
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def begin(
        self, checkpoint: Path | None, *, identity: dict[str, Any], args: argparse.Namespace, states: dict[str, Any]
    ) -> dict[str, Any]:
        """Go on from a checkpoint, or start anew where it is None, and from now on heed SIGTERM and SIGINT.

        Args:
            checkpoint: what [`find_checkpoint`] gave.
            identity: what must be as it was in the checkpoint, JSON values by name.
            args: the script's arguments; those in `SETTINGS` had better be as they were.
            states: see [`save_checkpoint`]; they are loaded too. Those that are None are not there.

        Returns:
            the checkpoint's measures, or none.

        Raises:
            ValueError: naming what of `identity` has changed.
        """
        self.identity = identity
        self.settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
        self.settings["processes"] = self.accelerator.num_processes
        self.states = {name: state for name, state in states.items() if state is not None}
        measures: dict[str, Any] = {}
        if checkpoint is not None:
            manifest = read_manifest(checkpoint)
            check_identity(checkpoint, manifest, self.identity, self.settings)
            wanted = [[dict(group, params=None) for group in one.param_groups] for one in self.accelerator._optimizers]
            load_checkpoint(self.accelerator, checkpoint, self.states)
            rates = ("processes", "gradient_accumulation_steps") if self.settings.get("scale_lr") else ()
            if any(manifest.settings.get(name) != self.settings.get(name) for name in (*OPTIMIZER_SETTINGS, *rates)):
                self._set_optimizers(wanted)
            if (ema := self.states.get("ema")) is not None:
                ema.decay = args.ema_decay  # not the one that its state brings back
            self.step, measures = manifest.step, manifest.measures
            self.skipped_steps = measures.get("skipped_steps", 0)
            if checkpoint.resolve().parent == self.output_dir.resolve():
                self.id = manifest.run
            logger.info(f"resumed from {checkpoint}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            set_aside(self.output_dir, self.id, self.step)
        self.accelerator.wait_for_everyone()
        self._watch_signals()
        return measures

    def _set_optimizers(self, wanted: list[list[dict[str, Any]]]) -> None:
        """Give the optimizers the arguments they were made with, in place of the checkpoint's; their moments stay."""
        for optimizer, groups in zip(self.accelerator._optimizers, wanted, strict=True):
            for group, new in zip(optimizer.param_groups, groups, strict=True):
                share = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0  # of the schedule, here
                kept = {name: new[name] for name in ("betas", "eps", "weight_decay", "initial_lr") if name in new}
                group.update(kept, lr=share * new.get("initial_lr", new["lr"]))
        for scheduler in self.accelerator._schedulers:
            scheduler.scheduler.base_lrs = [
                group["initial_lr"] for group in scheduler.scheduler.optimizer.param_groups
            ]

    def kept(self, **measures: Any) -> dict[str, Any]:
        """What [`save_checkpoint`] is to keep of the run, with the measures so far."""
        return {
            "run": self.id,
            "identity": self.identity,
            "settings": self.settings,
            "measures": {**measures, "skipped_steps": self.skipped_steps},
            "states": self.states,
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[torch.nn.Parameter],
        loss: torch.Tensor,
        max_grad_norm: float,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> tuple[float, bool]:
        """Clip the gradients and step, the learning rate too, unless they or the loss are not finite on any process.

        fp16's own overflows, which lower its scale, are no fault and are not counted, but those at a scale of 1 or
        less are.

        Args:
            max_grad_norm: 0 clips nothing; the norm is measured all the same.

        Returns:
            the norm before clipping, and whether the optimizer stepped.
        """
        scaler = self.accelerator.scaler
        norm = clip_gradients(self.accelerator, optimizer, parameters, max_grad_norm or math.inf)
        finite = torch.isfinite(loss.detach()).all()
        if scaler is None:
            finite &= torch.isfinite(norm).to(finite.device)
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce(finite.float(), "mean") == 1.0
        if bool(finite):
            scale = math.inf if scaler is None else scaler.get_scale()
            optimizer.step()
            # A fused optimizer leaves the step out by itself, unseen by its wrapper; the scale falls.
            stepped = not optimizer.step_was_skipped and (scaler is None or scaler.get_scale() >= scale)
            if lr_scheduler is not None and stepped:
                lr_scheduler.step()
            self._skipped_now |= not stepped and scale <= 1.0
            return float(norm), stepped
        self._skipped_now = True
        if scaler is not None:
            scaler.update()
        return float(norm), False

    def descend(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.nn.Parameter],
        loss: torch.Tensor,
        max_grad_norm: float,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        ema: Any = None,
        averaged: Sequence[torch.nn.Parameter] | None = None,
    ) -> float | None:
        """The gradients of a micro-batch's loss and, with a step's last one, [`optimizer_step`] and the averages'.

        Args:
            ema: an `EMAModel`, or None.
            averaged: its parameters, where they aren't all that are trained.

        Returns:
            the norm of a step's gradients before clipping; None before its last micro-batch.
        """
        norm = None
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm, stepped = self.optimizer_step(optimizer, parameters, loss, max_grad_norm, lr_scheduler)
            if ema is not None and stepped:
                ema.step(parameters if averaged is None else averaged)
        optimizer.zero_grad()
        return norm

    def end_step(self, step: int) -> None:
        """Count a step that was skipped.

        Raises:
            RuntimeError: if it was the last of `max_skipped_steps` in a row.
        """
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if self._skipped_now else 0
        if not self._skipped_now:
            return
        self._skipped_now = False
        self.skipped_steps += 1
        logger.warning(f"step {step} was skipped: its loss or gradients are not finite")
        if self._skipped_in_a_row == self.max_skipped_steps:
            found = checkpoints(self.output_dir)
            raise RuntimeError(
                f"loss or gradients were not finite in {self._skipped_in_a_row} steps in a row, up to step {step}. "
                "Lower --learning_rate, check the data, or train with --mixed_precision no; --max_skipped_steps "
                f"allows more. The last checkpoint is {found[-1] if found else 'not written yet'}"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Signals

    def stop_requested(self) -> bool:
        """Whether this or another process got SIGTERM or SIGINT: save, and leave the ``with`` block."""
        if self.accelerator.num_processes > 1:
            got = torch.tensor([self._signal or 0], device=self.accelerator.device)
            self._signal = int(self.accelerator.gather(got).max()) or None
        if self._signal is None:
            return False
        name = signal.Signals(self._signal).name
        logger.warning(f"{name}: the run ends after a checkpoint; once more ends it at once")
        return True

    def _watch_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other can
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note_signal)

    def _note_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None:  # the second ends it at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = number

    def restore_signals(self) -> None:
        """Give the signals back to those who had them."""
        for number, handler in self._handlers.items():
            # One that was ignored, as in the background of a shell's script, ends the process all the same.
            ignored = handler in (signal.SIG_IGN, None) and number == self._signal
            signal.signal(number, signal.SIG_DFL if ignored or handler is None else handler)
        self._handlers.clear()

    def end_by_signal(self) -> None:
        """End the process by the signal that it got, if it got one, so that whoever sent it is told so."""
        if self._signal is not None:
            os.kill(os.getpid(), self._signal)


@contextmanager
def training_run(
    accelerator: Accelerator,
    output_dir: str | Path,
    *,
    folders: Sequence[str] = (),
    files: Sequence[str] = (),
    max_skipped_steps: int = 3,
) -> Iterator[TrainingRun]:
    """A run that has `output_dir` to itself until the end of the ``with`` block.

    Where it was sent SIGTERM or SIGINT, the process ends by that signal at the end of the block.

    Args:
        folders, files: what the run will write, see [`prepare_output_dir`].
        max_skipped_steps: so many steps in a row that are not finite stop the run; 0 for never.

    Raises:
        ValueError: if the folder can't be written, or another run is writing there.
        OSError: if the disk is full, saying which checkpoint is whole.
    """
    output_dir = Path(output_dir)
    own = output_folder(output_dir, folders=folders, files=files) if accelerator.is_main_process else nullcontext()
    with own:
        accelerator.wait_for_everyone()
        run = TrainingRun(accelerator, output_dir, max_skipped_steps)
        try:
            yield run
        finally:
            run.restore_signals()
    run.end_by_signal()


@contextmanager
def output_folder(
    output_dir: str | Path, *, folders: Sequence[str] = (), files: Sequence[str] = (), kept: str | None = None
) -> Iterator[None]:
    """A folder that a program has to itself until the end of the ``with`` block, see [`prepare_output_dir`].

    Args:
        kept: what is whole where the disk is full; by default the last checkpoint.

    Raises:
        ValueError: if the folder can't be written, or another program is writing there.
        OSError: if the disk is full, saying what is whole.
    """
    lock = prepare_output_dir(output_dir, folders=folders, files=files)
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = full_disk_number(error)
        if number is None:
            raise
        raise full_disk_error(number, f"other files ({error})", Path(output_dir), kept) from error
    finally:
        lock.release()


def check_drawable(pipeline: Any, argument: str, flag: str, wanted: Sequence[str]) -> None:
    """Draw the validation prompts or labels in one step, so that those that can't be are refused before the first.

    Args:
        argument: of the pipeline's call, that takes them.
        flag: the script's flag, for the message.

    Raises:
        ValueError: with the pipeline's own reason.
    """
    if not wanted:
        return
    trained = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module) and part.training]
    for part in trained:
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(0) for _ in wanted]
    try:
        with torch.random.fork_rng():
            pipeline(**passing(pipeline, argument, wanted), num_inference_steps=1, generator=generators)
    except ValueError as error:
        raise ValueError(f"{flag}={shown(list(wanted))} can't be drawn: {error}") from error
    finally:
        for part in trained:
            part.train()
