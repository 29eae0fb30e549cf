"""Checkpoints that are verified, known by their run, and can't run code."""

import argparse
import pickle
import shutil
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_vqdit.training import checkpoints as module
from diffusers_vqdit.training.checkpoints import (
    MANIFEST,
    _write_manifest,
    check_identity,
    find_checkpoint,
    fingerprint,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    set_aside,
)
from diffusers_vqdit.training.files import checkpoints
from diffusers_vqdit.training.image_losses import LeCam


class Trained:
    """A model that is trained a little, with everything that a script's checkpoint holds."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.accelerator = Accelerator()
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.ema = EMAModel(model.parameters(), decay=0.7, foreach=True)
        self.lecam = LeCam(0.9)
        self.states = {"ema": self.ema, "lecam": self.lecam}

    def step(self):
        logits = self.model(torch.randn(8, 3))
        self.accelerator.backward(logits.square().mean() + self.lecam(logits, -logits))
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())

    def save(self, folder, step, **options):
        return save_checkpoint(self.accelerator, folder, step, states=self.states, **options)

    def tensors(self):
        lists = {f"ema{i}": value for i, value in enumerate(self.ema.shadow_params)}
        return {**self.model.state_dict(), **self.lecam.state_dict(), **lists, "random": torch.get_rng_state()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints 2, 4 and 6 of a run, and what was trained at step 8."""
    folder = tmp_path_factory.mktemp("saved")
    trained = Trained()
    for step in range(1, 9):
        trained.step()
        if step in (2, 4, 6):
            options = {"identity": {"objective": "flow", "model": {"size": [1, 2]}}, "settings": {"seed": 0}}
            trained.save(folder, step, run="20260101-a", measures={"loss": step / 7}, **options)
    return folder, trained.tensors()


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def go_on(folder):
    trained = Trained(seed=1)
    checkpoint = find_checkpoint(folder, "latest")
    manifest = load_checkpoint(trained.accelerator, checkpoint, trained.states)
    for _ in range(8 - manifest.step):
        trained.step()
    return trained.tensors()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_run_goes_on_in_fp16_with_a_new_scale(folder, saved):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trained = Trained()
    trained.accelerator.scaler = scaler
    load_checkpoint(trained.accelerator, find_checkpoint(folder, "latest"), trained.states)
    assert trained.accelerator.scaler is scaler and scaler.get_scale() == 8.0


def test_what_goes_on_from_a_checkpoint_is_bit_identical(saved, folder):
    assert equal(go_on(folder), saved[1])
    manifest = read_manifest(folder / "checkpoint-6")
    assert (manifest.step, manifest.run, manifest.measures) == (6, "20260101-a", {"loss": 6 / 7})
    written = {path.name for path in (folder / "checkpoint-6").iterdir()} - {MANIFEST}
    assert set(manifest.files) == written and {"ema.safetensors", "lecam.safetensors"} < written
    assert not list(folder.glob(".tmp*"))


FILES = ["model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "ema.safetensors"]
FILES += ["lecam.safetensors", MANIFEST]


def damage(path, how):
    data = path.read_bytes() if path.is_file() else b""
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how.startswith("flipped"):
        place = int(float(how.split()[1]) * (len(data) - 1))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.unlink()


HOW = ["emptied", "truncated", "flipped 0.1", "flipped 0.5", "flipped 0.9", "longer", "deleted", "a folder"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(saved, folder, caplog, file, how):
    damage(folder / "checkpoint-6" / file, how)
    assert find_checkpoint(folder, "latest") == folder / "checkpoint-4"
    assert "checkpoint-6" in caplog.text and file in caplog.text
    with pytest.raises(ValueError, match=f"resume_from_checkpoint='checkpoint-6'.*{file}"):
        find_checkpoint(folder, "checkpoint-6")
    if how == "flipped 0.5":
        assert equal(go_on(folder), saved[1])


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "pytorch_model.bin", "more/notes.txt"])
def test_a_file_that_is_not_the_checkpoints_is_refused(folder, caplog, name):
    (folder / "checkpoint-6" / name).parent.mkdir(exist_ok=True)
    (folder / "checkpoint-6" / name).write_text("x")
    assert find_checkpoint(folder, "latest").name == "checkpoint-4" and name in caplog.text


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint ran",))


@pytest.mark.parametrize("file", ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"])
@pytest.mark.parametrize("listed", [False, True])
def test_no_checkpoint_runs_code(folder, file, listed):
    """Neither one whose manifest was left alone nor one whose maker wrote a manifest for it."""
    checkpoint = folder / "checkpoint-6"
    (checkpoint / file).write_bytes(pickle.dumps(Evil()))
    if listed:
        _write_manifest(checkpoint, 6, "20260101-a", {}, {}, {})
    trained = Trained()
    if file.startswith("custom") or not listed:
        with pytest.raises(ValueError, match=file):
            find_checkpoint(folder, "checkpoint-6")
        return
    ignored = file.startswith("random")  # by accelerate, which then goes on without
    refused = pytest.raises(pickle.UnpicklingError, match="weights_only|Weights only")
    with nullcontext() if ignored else refused:
        load_checkpoint(trained.accelerator, find_checkpoint(folder, "checkpoint-6"), trained.states)


def test_nothing_whole_is_an_error_and_nothing_at_all_a_new_run(folder, tmp_path, caplog):
    for path in checkpoints(folder):
        (path / MANIFEST).unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is whole .*checkpoint-6: .*written by an older version"):
        find_checkpoint(folder, "latest")
    caplog.set_level("INFO")
    assert find_checkpoint(tmp_path / "nothing", "latest") is None and "starts anew" in caplog.text
    assert find_checkpoint(folder, None) is None


def test_a_name_is_in_the_folder_and_a_path_is_that_path(folder, tmp_path):
    other = Trained().save(tmp_path / "other", 2)
    assert find_checkpoint(folder, "checkpoint-2") == folder / "checkpoint-2"
    assert find_checkpoint(folder, str(other)) == other
    with pytest.raises(ValueError, match=r"'checkpoint-7' is not in .*'checkpoint-2', 'checkpoint-4', 'checkpoint-6'"):
        find_checkpoint(folder, "checkpoint-7")
    with pytest.raises(ValueError, match="other/checkpoint-4' is not a folder"):
        find_checkpoint(folder, str(tmp_path / "other" / "checkpoint-4"))


def test_latest_is_of_the_newest_run(folder):
    trained = Trained()
    trained.save(folder, 3, run="20260102-b")
    assert find_checkpoint(folder, "latest").name == "checkpoint-3"
    (folder / "checkpoint-3" / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match="no checkpoint .* is whole .checkpoint-3: optimizer.bin is missing"):
        find_checkpoint(folder, "latest")


@pytest.mark.parametrize(("limit", "kept"), [(1, [15]), (2, [10, 15]), (0, [5, 10, 15]), (None, [5, 10, 15])])
def test_only_checkpoints_of_the_same_run_are_dropped(folder, limit, kept):
    trained = Trained()
    for step in (5, 10, 15):
        trained.save(folder, step, run="20260102-b", total_limit=limit)
    own = [path for path in checkpoints(folder) if read_manifest(path).run == "20260102-b"]
    assert [read_manifest(path).step for path in own] == kept
    assert {f"checkpoint-{step}" for step in (2, 4, 6)} <= {path.name for path in checkpoints(folder)}
    trained.save(folder, 1, run="20260102-b", total_limit=1)  # the one just saved, though it has the lowest number
    assert (folder / "checkpoint-1").is_dir()
    with pytest.raises(ValueError, match="total_limit=-1"):
        trained.save(folder, 20, total_limit=-1)


def test_other_runs_are_set_aside_whole(folder):
    before = {path.name: read_manifest(path) for path in checkpoints(folder)}
    set_aside(folder, "20260101-a", 4)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    set_aside(folder, "20260102-b", 0)
    assert not checkpoints(folder)
    aside = folder / "older-checkpoints" / "20260101-a"
    assert {path.name: read_manifest(path) for path in checkpoints(aside)} == before


@pytest.mark.parametrize("part", ["parameter", "buffer", "ema", "lecam"])
def test_what_is_not_finite_is_not_saved(folder, part):
    trained = Trained()
    tensors = {
        "parameter": trained.model[0].weight.data,
        "buffer": trained.model[1].running_var,
        "ema": trained.ema.shadow_params[0],
        "lecam": trained.lecam.real_mean,
    }
    tensors[part].fill_(float("nan"))
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="checkpoint-8.* is not saved: .* holds NaN or infinity"):
        trained.save(folder, 8, run="20260101-a", total_limit=1)
    assert sorted(folder.rglob("*")) == before


def test_what_must_not_change_is_named(folder, caplog):
    checkpoint = folder / "checkpoint-6"
    manifest = read_manifest(checkpoint)
    check_identity(checkpoint, manifest, {"objective": "flow", "model": {"size": (1, 2)}}, {"seed": 0})
    assert not caplog.text
    with pytest.raises(ValueError, match="checkpoint-6 .*trained with model.size=.1, 2., which is now .1, 3.; obj"):
        check_identity(checkpoint, manifest, {"objective": "v_prediction", "model": {"size": [1, 3]}}, {})
    check_identity(checkpoint, manifest, {}, {"seed": 5})
    assert "seed=0, which is now 5" in caplog.text


def test_fingerprints_tell_data_and_models_apart():
    base = torch.arange(6)
    values = [base, base.float(), base.view(2, 3), base.flip(0), [base], {"a": base}, {"b": base}, "a", ["a"], None]
    values += [["a", "bc"], ["ab", "c"], 1, 1.0, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), base.bfloat16()]
    assert len({fingerprint(value) for value in values}) == len(values)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


@pytest.mark.parametrize("main", [True, False])
def test_one_process_of_several_verifies(folder, monkeypatch, main):
    """The others hear what it found, or what is wrong."""
    told = []

    def broadcast(values):
        told.append(values)
        return values if main else from_main

    state = argparse.Namespace(num_processes=2, is_main_process=main)
    monkeypatch.setattr(module, "PartialState", lambda: state)
    monkeypatch.setattr(module, "broadcast_object_list", broadcast)
    if not main:
        monkeypatch.setattr(module, "verify_checkpoint", None)
    from_main = [folder / "checkpoint-6", None]
    assert find_checkpoint(folder, "latest") == folder / "checkpoint-6"
    from_main = [None, "resume_from_checkpoint='checkpoint-7' is not in"]
    with pytest.raises(ValueError, match="resume_from_checkpoint='checkpoint-7' is not in"):
        find_checkpoint(folder, "checkpoint-7")
    assert find_checkpoint(folder, None) is None and len(told) == 2
