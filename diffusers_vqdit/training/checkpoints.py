"""Checkpoints of a run: verified by checksums, known by the run they are of, and free of pickles that can run code.

A checkpoint is a folder ``checkpoint-{step}`` with Accelerate's state, a safetensors file for each further state (EMA,
LeCam), and ``checkpoint.json``, which is written last and lists every file with its size and SHA-256, the run, what
must not change when it goes on (`identity`), and the measures so far.
"""

import dataclasses
import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file

from ..utils.checks import check_integer, shown
from ..utils.fingerprints import file_sha256
from ..utils.weight_files import check_finite, finish_file, fsync, new_file_mode
from .columns import CaptionColumn
from .files import (
    CHECKPOINT_PREFIX,
    SCRATCH_PREFIX,
    checkpoints,
    full_disk_named,
    remove_folder,
)
from .optimization import unwrap
from .sharding import like, whole


logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
OLDER = "older-checkpoints"
_FORMAT = 1


@dataclasses.dataclass
class Manifest:
    """What ``checkpoint.json`` says."""

    step: int
    run: str
    identity: dict[str, Any]
    settings: dict[str, Any]
    measures: dict[str, Any]
    files: dict[str, dict[str, Any]]  # relative path -> {"size", "sha256"}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    *,
    total_limit: int | None = None,
    run: str = "",
    identity: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    measures: dict[str, Any] | None = None,
    states: dict[str, Any] | None = None,
) -> Path:
    """Save the Accelerate state as ``checkpoint-{step}``, then drop the run's oldest ones.

    A run killed while it writes leaves the older checkpoints as they were.

    Args:
        total_limit: how many checkpoints of this run to keep, with the new one; None or 0 keeps all.
        run: the run's name. Checkpoints of others are never dropped.
        identity: what must be the same where the run is resumed, JSON values by name.
        settings: what had better be the same, JSON values by name.
        measures: figures so far, JSON values by name, for the run that goes on from here.
        states: further objects with a ``state_dict()`` of tensors, lists of tensors and JSON values, such as an
            `EMAModel`, by name.

    Raises:
        ValueError: if a weight, buffer or averaged weight is not finite. Nothing is written then.
        OSError: if the disk is full.
    """
    total_limit = check_integer("total_limit", total_limit or 0, 0)
    output_dir = Path(output_dir)
    final = output_dir / f"{CHECKPOINT_PREFIX}{step}"
    unfinished = output_dir / f"{SCRATCH_PREFIX}{final.name}"
    flat = {name: _flat_state(part.state_dict()) for name, part in (states or {}).items()}
    for name, (tensors, _) in flat.items():
        check_finite(tensors, f"{final.name} ({name}) is not saved")

    def check_weights(models: list, weights: list[dict], folder: str) -> None:
        for state in weights:
            check_finite(state, f"{final.name} is not saved")
        if not weights:  # of engines that save their own; a sharded tensor at a time, whole on all processes alike
            for name, value in (entry for model in models for entry in unwrap(model).state_dict().items()):
                check_finite({name: whole(value)}, f"{final.name} is not saved")

    hook = accelerator.register_save_state_pre_hook(check_weights)
    try:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        with full_disk_named(final.name, output_dir):
            accelerator.save_state(str(unfinished))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                for name, (tensors, values) in flat.items():
                    save_file(tensors, unfinished / f"{name}.safetensors", {"state": json.dumps(values)})
                _write_manifest(unfinished, step, run, identity or {}, settings or {}, measures or {})
                if final.exists():
                    remove_folder(final)
                unfinished.rename(final)
                fsync(output_dir)
    finally:
        hook.remove()
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
    if accelerator.is_main_process and total_limit:
        own = [path for path in checkpoints(output_dir) if path != final and _run_of(path) == run]
        for old in own[: max(0, len(own) + 1 - total_limit)]:
            remove_folder(old)
    accelerator.wait_for_everyone()
    return final


def _flat_state(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    # Tensors by name, "list[3]" for those of a list, and the values that are none. What is sharded is gathered.
    tensors, values = {}, {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = whole(value.detach()).contiguous()
        elif isinstance(value, list):
            tensors |= {f"{name}[{index}]": whole(entry.detach()).contiguous() for index, entry in enumerate(value)}
        else:
            values[name] = value
    return tensors, values


def _write_manifest(
    folder: Path, step: int, run: str, identity: dict[str, Any], settings: dict[str, Any], measures: dict[str, Any]
) -> None:
    files, mode = {}, new_file_mode(folder)
    for name in _files_in(folder):
        finish_file(folder / name, mode)
        files[name] = {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    manifest = Manifest(step, run, _plain(identity), _plain(settings), _plain(measures), files)
    content = {"format": _FORMAT, **dataclasses.asdict(manifest)}
    content["sha256"] = _digest(content)
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    fsync(folder / MANIFEST)
    fsync(folder)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    # As JSON gives it back: tuples are lists, keys are strings.
    return json.loads(json.dumps(value, default=str))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files_in(folder: Path) -> list[str]:
    # Without what file managers and network file systems leave, such as .DS_Store; .metadata is that of shards.
    paths = (path for path in folder.rglob("*") if not path.is_dir() and not re.match(r"\.(?!metadata$)", path.name))
    return sorted(p.relative_to(folder).as_posix() for p in paths if p.name != MANIFEST)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_manifest(checkpoint: Path) -> Manifest:
    """What a checkpoint's ``checkpoint.json`` says; its other files are not looked at.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ValueError(f"there is no {MANIFEST} in it: written by an older version, or not a checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest, expected = content.pop("sha256"), _digest({k: v for k, v in content.items() if k != "sha256"})
        version = content.pop("format")
        if digest == expected and version == _FORMAT:
            return Manifest(**content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    if digest != expected:
        raise ValueError(f"{MANIFEST} is damaged: its checksum is another one")
    raise ValueError(f"{MANIFEST} has format {version}, but this version reads {_FORMAT}")


def verify_checkpoint(checkpoint: Path) -> Manifest:
    """Check every file of a checkpoint against its list of sizes and checksums.

    Raises:
        ValueError: naming the file that is missing, damaged or not of the checkpoint.
    """
    manifest = read_manifest(checkpoint)
    there = _files_in(checkpoint)
    for name in there:
        # Accelerate would unpickle those, whatever they do.
        if name not in manifest.files or re.fullmatch(r"custom_checkpoint_\d+\.pkl", name):
            raise ValueError(
                f"{name} is not a checkpoint's: written by an older version, or put there by someone else"
            )
    for name, entry in manifest.files.items():
        path = checkpoint / name
        if name not in there:
            raise ValueError(f"{name} is missing")
        if not path.is_file():
            raise ValueError(f"{name} is not a regular file")
        if path.stat().st_size != entry["size"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, but {entry['size']} were written")
    for name, entry in manifest.files.items():
        if file_sha256(checkpoint / name) != entry["sha256"]:
            raise ValueError(f"{name} is damaged: its checksum is another one")
    return manifest


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means, verified; by one process for all.

    Args:
        resume_from_checkpoint: ``latest``, the newest whole one of the newest run in `output_dir` (None where there is
            none at all; damaged ones are named in a warning); a name in `output_dir`; or the path of one elsewhere.

    Raises:
        ValueError: if the checkpoint named is not there or damaged, or if there are checkpoints but none is whole.
    """
    output_dir, state = Path(output_dir), PartialState()
    if resume_from_checkpoint is None:
        return None
    if state.num_processes == 1:
        return _find_checkpoint(output_dir, resume_from_checkpoint)
    found, error = None, None
    if state.is_main_process:
        try:
            found = _find_checkpoint(output_dir, resume_from_checkpoint)
        except ValueError as raised:
            error = str(raised)
    found, error = broadcast_object_list([found, error])
    if error is not None:
        raise ValueError(error)
    return found


def _find_checkpoint(output_dir: Path, resume_from_checkpoint: str) -> Path | None:
    found = checkpoints(output_dir) if output_dir.is_dir() else []
    if resume_from_checkpoint != "latest":
        by_name = resume_from_checkpoint == Path(resume_from_checkpoint).name
        path = output_dir / resume_from_checkpoint if by_name else Path(resume_from_checkpoint)
        if not path.is_dir():
            raise ValueError(
                f"resume_from_checkpoint={shown(resume_from_checkpoint)} is not "
                + (f"in {output_dir}: it has {[p.name for p in found]}" if by_name else "a folder")
            )
        try:
            verify_checkpoint(path)
        except ValueError as error:
            raise ValueError(f"resume_from_checkpoint={shown(resume_from_checkpoint)}: {error}") from error
        return path
    runs = [_run_of(path) for path in found]
    newest = max((run for run in runs if run is not None), default=None)
    damaged = []
    for path, run in zip(reversed(found), reversed(runs), strict=True):
        if run not in (newest, None):
            continue
        try:
            verify_checkpoint(path)
        except ValueError as error:
            damaged.append(f"{path.name}: {error}")
            logger.warning(f"{path} is not whole, the one before is tried: {error}")
            continue
        return path
    if damaged:
        raise ValueError(
            f"resume_from_checkpoint='latest': no checkpoint in {output_dir} is whole ({'; '.join(damaged)}); move "
            "them away to start anew"
        )
    logger.info(f"there is no checkpoint in {output_dir}: the run starts anew")
    return None


def _run_of(checkpoint: Path) -> str | None:
    try:
        return read_manifest(checkpoint).run
    except ValueError:
        return None


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, states: dict[str, Any] | None = None) -> Manifest:
    """Load a checkpoint that [`find_checkpoint`] gave into what was prepared and into `states`.

    No file of it can run code: Accelerate reads models as safetensors, and optimizers, schedulers, scalers and random
    states with ``torch.load(weights_only=True)``. What would be unpickled whole are objects registered for
    checkpointing; there are none, which is why `states` are safetensors. Sharded runs (FSDP, DeepSpeed) are another
    matter: their engines' readers unpickle, so that they should go on from their own checkpoints only.
    """
    manifest = read_manifest(checkpoint)
    random_states = f"random_states_{accelerator.process_index}.pkl"
    if random_states not in manifest.files:
        logger.warning(f"{checkpoint} has no {random_states}: it was written by fewer processes")
    scaler = accelerator.scaler
    if "scaler.pt" not in manifest.files:  # of a run in another precision: fp16 finds its scale anew
        accelerator.scaler = None
    try:
        accelerator.load_state(str(checkpoint))
    finally:
        accelerator.scaler = scaler
    accelerator.step = 0  # whose next micro-batch is a step's first, however many a step had before
    for name, part in (states or {}).items():
        with safe_open(checkpoint / f"{name}.safetensors", "pt") as file:
            state, layout = json.loads(file.metadata()["state"]), part.state_dict()
            lists: dict[str, dict[int, torch.Tensor]] = {}
            for key in file.keys():
                value = file.get_tensor(key).to(accelerator.device)
                if entry := re.fullmatch(r"(.+)\[(\d+)\]", key):
                    index = int(entry[2])
                    lists.setdefault(entry[1], {})[index] = like(value, layout[entry[1]][index])
                else:
                    state[key] = like(value, layout[key])
        part.load_state_dict(
            state | {stem: [v for _, v in sorted(entries.items())] for stem, entries in lists.items()}
        )
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# What a run is


def fingerprint(*values: Any) -> str:
    """SHA-256 of tensors, modules (weights and config), texts, numbers, and lists, columns and dicts of them."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.nn.Module):
            add([type(value).__name__, plain_config(value), value.state_dict()])
        elif isinstance(value, torch.Tensor):
            add([str(value.dtype), list(value.shape)])
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            add([entry for key in sorted(value, key=str) for entry in (str(key), value[key])])
        elif isinstance(value, list | tuple | CaptionColumn):
            digest.update(f"[{len(value)}".encode())
            for entry in value:
                add(entry)
        else:
            text = repr(value).encode("utf-8", "backslashreplace")
            digest.update(f"{len(text)}:".encode() + text)

    add(list(values))
    return digest.hexdigest()


def plain_config(model: Any) -> dict[str, Any]:
    """A model's config without what says where it came from, as JSON gives it back."""
    config = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {k: v for k, v in _plain(config).items() if not k.startswith("_") and k != "transformers_version"}


def check_identity(checkpoint: Path, manifest: Manifest, identity: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compare what a run is with what it was in a checkpoint; other `settings` are told in a warning.

    Raises:
        ValueError: naming what of `identity` differs, with both values.
    """
    if changed := _changes(manifest.identity, identity):
        raise ValueError(f"{checkpoint} can't be resumed, for it was trained with {'; '.join(changed)}")
    if changed := _changes(manifest.settings, settings):
        logger.warning(f"{checkpoint} was trained with {'; '.join(changed)}")


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    changes, now = [], _plain(now)
    for name in before.keys() & now.keys() if not prefix else before.keys() | now.keys():
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name}={shown(old)}, which is now {shown(new)}")
    return sorted(changes)


def set_aside(output_dir: Path, run: str, step: int) -> None:
    """Move the checkpoints that a run does not go on from, those of other runs and later ones of its own, away.

    They are in ``older-checkpoints/`` then: never deleted, and never taken for this run's.
    """
    for path in checkpoints(output_dir):
        owner = _run_of(path)
        if owner == run and read_manifest(path).step <= step:
            continue
        folder = output_dir / OLDER / (owner if owner and re.fullmatch(r"[\w-]+", owner) else "unknown")
        folder.mkdir(parents=True, exist_ok=True)
        target, count = folder / path.name, 1
        while target.exists():
            count += 1
            target = folder / f"{path.name}.{count}"
        path.rename(target)
        logger.warning(
            f"{path} is not one that this run goes on from; it is now {target}. What else the folder has is replaced "
            "at the end. To go on with it give --resume_from_checkpoint latest"
        )
