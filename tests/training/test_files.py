"""Files are written whole or not at all, and what was not written is not touched."""

import errno
import os
import subprocess

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_vqdit import ImageVQModel, TextVQModel
from diffusers_vqdit.training import files
from diffusers_vqdit.training.files import DiskFullError, check_kind, full_disk_named, save_pretrained_atomically


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
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_called_that(tmp_path, error, wrapped):
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(
        OSError, match="no space left on device while writing checkpoint-6 in .*; checkpoint-4 is whole"
    ):
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
    (tmp_path / "samples").write_text("")
    (tmp_path / "README.md").mkdir()
    with pytest.raises(ValueError, match="has a file 'samples' where a folder"):
        check_kind(tmp_path, ["samples"], [])
    with pytest.raises(ValueError, match="has a folder 'README.md' where a file"):
        check_kind(tmp_path, [], ["README.md"])
    check_kind(tmp_path, ["README.md", "logs"], ["samples", "config.json"])
