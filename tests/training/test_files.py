"""Files are written whole or not at all, and what was not written is not touched."""

import argparse
import copy
import errno
import itertools
import os
import re
import subprocess
import tempfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from diffusers_vqdit import ImageVQModel, TextVQModel
from diffusers_vqdit.training import files
from diffusers_vqdit.training.checkpoints import save_checkpoint
from diffusers_vqdit.training.code_files import write_shard
from diffusers_vqdit.training.file_lists import in_file
from diffusers_vqdit.training.files import (
    DiskFullError,
    check_kind,
    check_output_file,
    full_disk_named,
    save_pretrained_atomically,
)
from diffusers_vqdit.training.latent_files import save_latents
from diffusers_vqdit.training.lora import add_lora, save_lora
from diffusers_vqdit.utils.checks import shown


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def scaled(model, factor):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


SAVES = [{}, {"safe_serialization": False}, {"max_shard_size": "8KB"}, {"max_shard_size": "8KB", "variant": "fp16"}]


@pytest.mark.parametrize("first", SAVES)
@pytest.mark.parametrize("second", SAVES)
def test_what_was_saved_last_is_what_is_loaded(text_vq, tmp_path, first, second):
    """In whatever files the weights came before, and whatever else is in the folder."""
    variant = second.get("variant")
    save_pretrained_atomically(text_vq, tmp_path, **first)
    (tmp_path / "model.ckpt").write_text("mine")
    (tmp_path / "diffusion_pytorch_model.ema.safetensors").write_text("another variant")
    written = save_pretrained_atomically(scaled(text_vq, 2.0), tmp_path, **second)
    loaded = TextVQModel.from_pretrained(tmp_path, variant=variant, use_safetensors="safe_serialization" not in second)
    for key, value in text_vq.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    others = {"model.ckpt", "diffusion_pytorch_model.ema.safetensors"}
    if variant == first.get("variant"):
        assert set(names(tmp_path)) == {*written, *others}
    assert (tmp_path / "model.ckpt").read_text() == "mine"


def test_a_pipeline_and_a_tokenizer_are_saved_beside_the_users_files(pipeline, tmp_path):
    target, mine = tmp_path / "run", tmp_path / "tmp-run" / "notes.txt"
    (target / "transformer").mkdir(parents=True)
    mine.parent.mkdir()
    for path in (mine, target / "notes.txt", target / "transformer" / "notes.txt"):
        path.write_text("mine")
    written = save_pretrained_atomically(pipeline, target)
    assert "model_index.json" in written and "transformer/diffusion_pytorch_model.safetensors" in written
    assert set(names(target)) == {*written, "notes.txt", "transformer/notes.txt"} and mine.read_text() == "mine"
    assert isinstance(DiffusionPipeline.from_pretrained(target), type(pipeline))
    assert "tokenizer.json" in save_pretrained_atomically(pipeline.tokenizer, tmp_path / "tokenizer")


@pytest.mark.parametrize(("place", "value"), [("parameter", float("nan")), ("buffer", float("inf"))])
def test_weights_that_are_not_finite_are_refused_before_anything_is_touched(pipeline, tmp_path, place, value):
    save_pretrained_atomically(pipeline, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    if place == "parameter":
        next(pipeline.transformer.parameters()).data.flatten()[0] = value
    else:
        pipeline.image_vq.register_buffer("usage", torch.tensor([value]))
    with pytest.raises(ValueError, match="(transformer|image_vq) is not saved: .* holds NaN or infinity"):
        save_pretrained_atomically(pipeline, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_save_that_fails_leaves_what_was_there(text_vq, tmp_path, monkeypatch):
    save_pretrained_atomically(text_vq, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def fails(folder, **kwargs):
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(text_vq, "save_pretrained", fails)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained_atomically(text_vq, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_called_that(tmp_path, error, wrapped):
    (tmp_path / "checkpoint-4").mkdir()
    full = {
        errno.EDQUOT: r"no space left on device while writing checkpoint-6 in .* \(the quota is used up\)",
        errno.EFBIG: r"file too large while writing checkpoint-6 in .* \(.*ulimit -f.*\)",
    }.get(getattr(error, "errno", None), "no space left on device while writing checkpoint-6 in .*")
    with pytest.raises(OSError, match=f"{full}; checkpoint-4 is whole"):
        with full_disk_named("checkpoint-6", tmp_path):
            if not wrapped:
                raise error
            try:
                raise error
            except Exception:
                raise RuntimeError("unexpected pos 109504 vs 109392") from None


def test_torch_and_safetensors_do_not_say_it_so_the_disk_is_asked(tmp_path, monkeypatch):
    def save():
        with full_disk_named("checkpoint-6", tmp_path):
            raise RuntimeError("unexpected pos 109504 vs 109392")

    with pytest.raises(RuntimeError, match="unexpected pos"):  # there is space: it is something else
        save()
    fsync = files.fsync

    def full(path):
        if path.name == "probe":
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(path)

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(DiskFullError, match="there is no checkpoint yet"):
        save()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_really_full(image_vq, tmp_path):
    size = 1 << 20
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        save_pretrained_atomically(image_vq, tmp_path)
        (tmp_path / "ballast").write_bytes(bytes(size - sum(p.stat().st_size for p in tmp_path.iterdir()) - 60_000))
        with pytest.raises(OSError, match="no space left on device while writing ImageVQModel"):
            save_pretrained_atomically(scaled(image_vq, 2.0), tmp_path)
        loaded = ImageVQModel.from_pretrained(tmp_path)
        key = "encoder.conv_in.weight"
        assert torch.equal(2.0 * loaded.state_dict()[key], image_vq.state_dict()[key])
        assert not [path for path in os.listdir(tmp_path) if path.startswith(".")]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_what_is_there_in_another_kind_is_named(tmp_path):
    """Of 8 folders and 16 files that runs write: a file, a link to nothing or a pipe in their place, at any depth."""
    folders = ["samples", "codes", "logs/vqdit", "logs", "older-checkpoints", "transformer", "tokenizer", "scheduler"]
    files = ["README.md", "model_index.json", "pipeline.py"]
    found = [*("config.json", "tokenizer.json", "segments.json", "scheduler_config.json", "codes-00003.parquet")]
    found += ["diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors", "step-000250.png", "7.png"]
    found += ["step-000250-3.wav", "0.wav", "step-000250.txt"]
    kinds = {
        "file": lambda path: path.write_text(""),
        "link": lambda path: path.symlink_to(path.parent / "nothing"),
        "pipe": os.mkfifo,
        "folder": os.mkdir,
    }
    count = 0
    for name, (kind, make), parent in itertools.product([*folders, *files, *found], kinds.items(), ("", "samples")):
        if (kind == "folder" and name in folders) or (parent and name not in found):
            continue
        place = tmp_path / str(count) / parent / name
        place.parent.mkdir(parents=True)
        make(place)
        if kind == "file" and name not in folders:
            check_kind(tmp_path / str(count), folders, files)
        else:
            with pytest.raises(ValueError, match=f"output_dir='{tmp_path / str(count)}' has .*{re.escape(name)}'"):
                check_kind(tmp_path / str(count), folders, files)
        count += 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"has a file '{tmp_path}/file'"):
        check_kind(tmp_path / "0" / "new", [f"{tmp_path}/file/logs"], [])
    print(f"things in the place of what a run writes: {count}")


@pytest.mark.parametrize("name", ["notes", "checkpoint-best", "config.json.d", "1.jpg", "model", "codes-1.csv"])
def test_folders_of_the_users_are_none_of_that(tmp_path, name):
    (tmp_path / name).mkdir()
    check_kind(tmp_path, ["samples", "logs"], ["README.md"])


def test_a_file_to_write_at_the_end_is_tried_at_the_start(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing" / "x")
    bad = ["file/x.png", "file/below/x.png", "folder.png", "pipe.png", "dangling.png", "dangling.png/x.png", "."]
    bad += [f"{'x' * 246}.png", f"{'x' * 256}/x.png", "/proc/nothing/x.png", "/dev/null", "x.jpg", "x", "x.png.zip"]
    for name in bad:
        named = f"output_file={shown(str(tmp_path / name))}"
        with pytest.raises(ValueError, match=f"^{re.escape(named)} .*(must|is|can't)"):
            check_output_file("output_file", tmp_path / name, ".png")
    good = ["x.png", "new/folder/x.png", "x.PNG", "brackets [1].png", "\u4e2d\u6587.png", "-x.png", "x y.png"]
    for name in good:
        check_output_file("output_file", tmp_path / name, ".png")
        assert not (tmp_path / name).exists() and not any((tmp_path / name).parent.glob(".*"))
    check_output_file("output_file", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    print(f"paths of files to write: {len(bad)} refused, {len(good)} taken")


@contextmanager
def limit_of_file_sizes(size):
    """In this process, as one that is forked from threads may wait for them for ever."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name == "nt", reason="needs limits of POSIX")
@pytest.mark.parametrize("size", [1 << 12, 40_000, 3 << 20])
def test_a_limit_of_the_size_of_files_is_named(image_vq, tmp_path, size):
    """In whatever way it is saved: the message tells the limit, and what was there is whole."""
    if size > 1 << 20:  # what the disk is asked with goes through
        image_vq.register_parameter("large", torch.nn.Parameter(torch.zeros(1 << 20)))
    accelerator = Accelerator()
    model, _ = accelerator.prepare(image_vq, torch.optim.AdamW(image_vq.parameters()))
    codes = torch.zeros(1 << 20, 2, dtype=torch.int32)
    saves = {
        "model": lambda: save_pretrained_atomically(image_vq, tmp_path / "model"),
        "pickle": lambda: save_pretrained_atomically(image_vq, tmp_path / "model", safe_serialization=False),
        "checkpoint": lambda: save_checkpoint(accelerator, tmp_path, 2),
        "own": lambda: image_vq.save_pretrained(tmp_path / "model"),
        "own pickle": lambda: image_vq.save_pretrained(tmp_path / "model", safe_serialization=False),
        "latents": lambda: save_latents(tmp_path / "latents.safetensors", codes.float(), {}),
        "codes": lambda: write_shard(tmp_path / "codes-00000.arrow", {"image": [torch.randperm(1 << 20)]}),
    }
    save_pretrained_atomically(image_vq, tmp_path / "model")
    (tmp_path / "latents.safetensors").write_text("whole")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    for name, save in saves.items():
        with pytest.raises(OSError) as refused, limit_of_file_sizes(size):
            save()
        told = str(refused.value)
        assert "File too large" in told or "file too large" in told or "limit of file sizes" in told, (name, told)
        assert "still whole" in told or "there is no checkpoint yet" in told, (name, told)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    print(f"saves beyond a limit of {size} bytes: {len(saves)}")


@pytest.mark.skipif(os.name == "nt", reason="needs limits of POSIX")
def test_a_tensor_that_has_no_room_in_a_file_says_where_it_would_be(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    told = rf"a temporary file of 8 MB could not be written to '{re.escape(str(tmp_path))}' .*; TMPDIR says where"
    with pytest.raises(OSError, match=told), limit_of_file_sizes(1 << 12):
        in_file((1000, 1000), np.int64)
    assert in_file((10, 10), np.int64).sum() == 0 and not names(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_of_any_new_file(pipeline, tmp_path, umask):
    """In whatever way they are saved, also over others; safetensors gives its files to the owner alone."""
    accelerator = Accelerator()
    model, _ = accelerator.prepare(pipeline.transformer, torch.optim.AdamW(pipeline.transformer.parameters()))
    lora = copy.deepcopy(pipeline.transformer)
    add_lora(lora, argparse.Namespace(rank=2, lora_alpha=None, lora_dropout=0.0, lora_layers=["to_q"]))
    index = pipeline.index(["a red apple", "a dot"])
    before = os.umask(umask)
    try:
        for _ in range(2):
            save_pretrained_atomically(pipeline, tmp_path / "run")
            pipeline.save_pretrained(tmp_path / "pipeline")
            pipeline.image_vq.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
            save_lora(lora, tmp_path / "lora")
            save_checkpoint(accelerator, tmp_path / "run", 2)
            save_latents(tmp_path / "latents.safetensors", torch.zeros(2, 1, 4, 4, 4), {})
            index.save(tmp_path / "gallery.safetensors")
            write_shard(tmp_path / "codes-00000.arrow", {"image": [torch.zeros(2)]})
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in names(tmp_path)}
    assert len(modes) > 20 and set(modes.values()) == {0o666 & ~umask}, modes
