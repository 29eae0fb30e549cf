"""What every training script begins with, and what a run keeps."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.tasks import parse_tasks
from diffusers_vqdit.training.checkpoints import save_checkpoint
from diffusers_vqdit.training.optimization import tokenizer_learning_rate, transformer_learning_rate
from diffusers_vqdit.training.run import SETTINGS, training_run
from diffusers_vqdit.training.setup import make_accelerator, make_ema, prepare, run_batches, set_default
from diffusers_vqdit.training.sharding import evaluated
from diffusers_vqdit.training.validation import columns_of_grid, save_grid


def arguments(**changes):
    values = {
        **{
            "learning_rate": 0.1,
            "adam_beta1": 0.9,
            "adam_beta2": 0.99,
            "adam_epsilon": 1e-8,
            "adam_weight_decay": 0.1,
        },
        **{"lr_scheduler": "constant", "lr_warmup_steps": 0, "train_batch_size": 4, "max_train_steps": None},
        **{"lr_num_cycles": 1, "lr_power": 1.0},
        **{"num_train_epochs": 3, "gradient_accumulation_steps": 2, "seed": 0, "use_ema": True, "ema_decay": 0.9},
    }
    return argparse.Namespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [0.1, 0.05, 0.1, 0.05, 0.0]),
        ({"lr_scheduler": "cosine_with_restarts"}, [0.1, 0.1 * (2 + 2**0.5) / 4, 0.05, 0.1 * (2 - 2**0.5) / 4, 0.0]),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [0.1, 0.1 * 9 / 16, 0.1 / 4, 0.1 / 16, 1e-7]),
    ],
)
def test_restarts_and_powers_of_the_schedule(changes, rates):
    model = torch.nn.Linear(2, 2)
    args = arguments(max_train_steps=4, gradient_accumulation_steps=1, **changes)
    _, optimizer, schedule, _ = prepare(args, Accelerator(step_scheduler_with_optimizer=False), model, 16)
    found = []
    for _ in rates:
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates, abs=2e-7)


def test_a_launchers_config_that_says_another_accumulation_is_refused(monkeypatch, tmp_path):
    args = arguments(mixed_precision="no", report_to="none", output_dir=tmp_path, logging_dir="logs")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2, but the launcher.s config says 1"):
        make_accelerator(args)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert make_accelerator(args).gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("changes", "scale_lr", "steps", "rate"),
    [({}, False, 9, 0.1), ({}, True, 9, 0.2), ({"max_train_steps": 5}, False, 5, 0.1)],
)
def test_epochs_become_steps_and_the_rate_follows_the_batch(changes, scale_lr, steps, rate):
    """17 samples in batches of 2 x 4: three steps an epoch, the last of them short."""
    model = torch.nn.Linear(2, 2)
    _, optimizer, _, max_steps = prepare(arguments(**changes), Accelerator(), model, 17, scale_lr=scale_lr)
    assert (max_steps, [group["lr"] for group in optimizer.param_groups]) == (steps, [rate, rate])


def test_a_learning_rate_follows_the_model_but_a_run_that_goes_on_keeps_its_own(tmp_path):
    """Also one of before there was such a default."""
    assert tokenizer_learning_rate([24, 48, 96], 2048) == 2e-3 == tokenizer_learning_rate([16, 16], 8)
    assert tokenizer_learning_rate([24, 48, 96], 4096) == 1e-3
    rates = [tokenizer_learning_rate(widths, 1024) for widths in ([64, 128], [64, 128, 256], [64, 128, 256, 512, 512])]
    assert rates == pytest.approx([1.5e-3, 7.5e-4, 2.5e-4 * 96 / 512])
    checkpoint = save_checkpoint(Accelerator(), tmp_path, 3, settings={"learning_rate": 2e-3})
    for given, source, expected in ((None, None, 5e-4), (None, checkpoint, 2e-3), (1e-3, checkpoint, 1e-3)):
        args = argparse.Namespace(learning_rate=given)
        set_default(args, "learning_rate", source, 5e-4)
        assert args.learning_rate == expected


@pytest.mark.parametrize(
    ("steps", "warmup", "decay"),
    [
        (1, 1, 0.0),
        (5, 1, 0.0),
        (20, 1, 0.75),
        (21, 2, 1 - 5 / 21),
        (250, 13, 0.98),
        (4000, 200, 0.99875),
        (9**6, 200, 0.999),
    ],
)
def test_warmup_and_averages_follow_the_steps(steps, warmup, decay):
    """The rate is whole after the first twentieth; what the steps say is what was given where it was."""
    args = arguments(max_train_steps=steps, lr_scheduler="constant_with_warmup", lr_warmup_steps=None, ema_decay=None)
    _, optimizer, scheduler, _ = prepare(args, Accelerator(), torch.nn.Linear(2, 2), 17)
    assert (args.lr_warmup_steps, args.ema_decay) == (warmup, pytest.approx(decay))
    (scale,) = {scheduler.scheduler.lr_lambdas[0](warmup), scheduler.scheduler.lr_lambdas[1](warmup)}
    assert scale == 1 > scheduler.scheduler.lr_lambdas[0](warmup - 1)
    args = arguments(max_train_steps=steps, lr_warmup_steps=0, ema_decay=0.5)
    prepare(args, Accelerator(), torch.nn.Linear(2, 2), 17)
    assert (args.lr_warmup_steps, args.ema_decay) == (0, 0.5)


@pytest.mark.parametrize(
    ("warmup", "scheduler", "told"),
    [(10, "cosine", True), (2000, "linear", True), (9, "cosine", False)] + [(2000, "constant", False)],
)
def test_a_warmup_as_long_as_the_run_is_told(caplog, warmup, scheduler, told):
    args = arguments(max_train_steps=10, lr_scheduler=scheduler, lr_warmup_steps=warmup)
    prepare(args, Accelerator(), torch.nn.Linear(2, 2), 17)
    assert (f"lr_warmup_steps={warmup} are all of the run's 10 steps" in caplog.text) == told


def test_a_run_that_goes_on_keeps_its_warmup_and_averages(tmp_path):
    """Also where it is made longer, and where its version had other defaults."""
    checkpoint = save_checkpoint(Accelerator(), tmp_path, 3, settings={"lr_warmup_steps": 200, "ema_decay": 0.9999})
    args = arguments(max_train_steps=50, lr_warmup_steps=None, ema_decay=None)
    prepare(args, Accelerator(), torch.nn.Linear(2, 2), 17, checkpoint=checkpoint)
    assert (args.lr_warmup_steps, args.ema_decay) == (200, 0.9999)
    # One that had no averages goes on to be refused by its identity.
    checkpoint = save_checkpoint(Accelerator(), tmp_path, 4, settings={"lr_warmup_steps": 3, "ema_decay": None})
    args = arguments(max_train_steps=50, lr_warmup_steps=None, ema_decay=None)
    prepare(args, Accelerator(), torch.nn.Linear(2, 2), 17, checkpoint=checkpoint)
    assert (args.lr_warmup_steps, args.ema_decay) == (3, pytest.approx(0.9))


def test_a_pretrained_transformer_learns_faster_unless_it_is_wide():
    rates = [transformer_learning_rate(width, pretrained=True) for width in (64, 256, 512, 1024)]
    assert rates == pytest.approx([2e-3, 2e-3, 1e-3, 5e-4])
    assert {transformer_learning_rate(width, pretrained=False) for width in (64, 256, 1024)} == {1e-3}


def test_tasks_are_those_of_the_run_that_goes_on(script, tmp_path):
    """With their weights, to the last digit; where a run is new, texts are learned as well as pictures."""
    train = script("train_vqdit")
    weights = {"text->image": 0.1 + 0.2, "->image": 1.0, "image+text->label": 1e-7}
    identity = {"script": "train_vqdit", "tasks": weights}
    checkpoint = save_checkpoint(Accelerator(), tmp_path, 3, identity=identity)
    args = train.parse_args("--train_data_dir x --image_vq y --text_vq z".split())
    assert args.tasks == train.TASKS
    assert {str(task): weight for task, weight in parse_tasks(train.default_tasks(args, checkpoint))} == weights
    other = save_checkpoint(Accelerator(), tmp_path, 4, identity={"script": "distill_vqdit", "tasks": "->image"})
    assert train.default_tasks(args, other) == train.default_tasks(args) == train.TASKS
    known = ["->image", "text->image", "image->text"]
    sizes = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    segments = {"image": {"vocab_size": 4, "shape": [2, 2]}, "text": {"vocab_size": 4, "shape": [3]}}
    for tasks, found in ((known, train.TASKS), (known[:2], "->image,text->image"), (["->text"], "->text")):
        pretrained = VQDiTTransformer2DModel(**sizes, segments=segments, tasks=tasks)
        assert train.default_tasks(args, None, pretrained) == train.default_tasks(args, other, pretrained) == found
    new = {str(task): weight for task, weight in parse_tasks(train.TASKS)}
    assert list(new) == ["text->image", "image->text", "->image"] and new["image->text"] > new["->image"]


def test_labels_are_learned_where_the_data_have_them(script, monkeypatch):
    train = script("train_vqdit")
    labelled, alone = train.LABELLED, train.LABELS_ALONE
    for given, tasks in (("--text_vq z", labelled), ("--text_tokenizer gpt2", labelled), ("", alone)):
        options = f"--train_data_dir x --image_vq y {given} --label_column kind"
        assert train.parse_args(options.split()).tasks == tasks
    assert train.parse_args([*options.split(), "--tasks", "image->label"]).tasks == "image->label"
    sizes = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    segments = {"image": {"vocab_size": 4, "shape": [2, 2]}, "text": {"vocab_size": 4, "shape": [3]}}
    pretrained = VQDiTTransformer2DModel(**sizes, segments=segments, tasks=["text->image", "image->text", "->image"])
    args = train.parse_args("--train_data_dir x --pretrained_model_name_or_path y --label_column kind".split())
    assert args.tasks is None and train.default_tasks(args, None, pretrained) == labelled
    states = {"text": {"channels": 8, "shape": [7]}}
    given, with_label = "text->image:3,->image:0.5", "text->image:2,->image:0.5,label->image:1,image->label:3"
    for names, others, tasks in (
        ("label", {}, alone),
        ("text label", {}, labelled),
        ("text", {}, train.TASKS),
        ("", states, given),
        ("label", states, with_label),
    ):
        segments = dict.fromkeys(names.split(), {"vocab_size": 2}) | others
        monkeypatch.setattr(train, "CodeDataset", lambda _, segments=segments: SimpleNamespace(segments=segments))
        args = train.parse_args("--codes_dir x --image_vq y".split())
        assert args.tasks is None and train.default_tasks(args) == tasks
    options = "--train_data_dir x --image_vq y --text_encoder z"
    assert train.parse_args(options.split()).tasks == given
    assert train.parse_args(f"{options} --label_column kind".split()).tasks == with_label


def test_batches_go_on_where_the_steps_stopped():
    whole, rest = (run_batches(arguments(), Accelerator(), 10, step) for step in (0, 3))
    skipped = [next(whole) for _ in range(3 * 2)]
    assert len(skipped) == 6 and all(torch.equal(next(whole), next(rest)) for _ in range(8))


def test_averages_are_made_only_where_asked_for_and_given_back():
    model = torch.nn.Linear(2, 2)
    assert make_ema(arguments(use_ema=False), model.parameters(), torch.device("cpu")) is None
    ema = make_ema(arguments(), model.parameters(), torch.device("cpu"))
    start = model.weight.detach().clone()
    model.weight.data += 1
    with pytest.raises(KeyError), evaluated(Accelerator(), model, ema, model.parameters()) as whole:
        assert whole is model and not model.training and torch.equal(model.weight, start)
        raise KeyError
    assert model.training and torch.equal(model.weight, start + 1)


def test_a_run_keeps_its_states_and_skipped_steps(tmp_path):
    accelerator, ema = Accelerator(), object()
    with training_run(accelerator, tmp_path / "out") as run:
        args = argparse.Namespace(**{name: 0 for name in SETTINGS})
        run.begin(None, identity={"a": 1}, args=args, states={"ema": ema, "lecam": None})
        run.skipped_steps = 2
        kept = run.kept(loss=0.5)
    assert kept["states"] == {"ema": ema} and kept["identity"] == {"a": 1} and kept["run"] == run.id
    assert kept["measures"] == {"loss": 0.5, "skipped_steps": 2} and kept["settings"]["processes"] == 1


@pytest.mark.parametrize(("width", "columns"), [(32, 16), (128, 16), (256, 8), (512, 4), (4096, 4)])
def test_a_row_of_a_grid_is_no_wider_than_a_screen_where_four_images_are_not(width, columns):
    assert columns_of_grid(width, 16) == columns


@pytest.mark.parametrize(("count", "size"), [(1, (8, 8)), (3, (24, 8)), (5, (24, 16)), (6, (24, 16))])
def test_a_grid_holds_every_image(tmp_path: Path, count, size):
    images = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(count)]
    grid = save_grid(images, min(3, count), tmp_path, 7)
    assert grid.size == size
    assert Image.open(tmp_path / "samples" / "step-000007.png").tobytes() == grid.tobytes()
    found = [grid.getpixel((8 * (i % 3), 8 * (i // 3)))[0] for i in range(count)]
    assert found == [40 * i for i in range(count)]


def test_averages_are_in_float32_of_weights_in_half_precision(tmp_path):
    """There an update of a thousandth would be rounded away."""
    weight = torch.nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16))
    ema = make_ema(arguments(ema_decay=0.999), [weight], torch.device("cpu"))
    expected = 0.02
    for step in range(3000):
        weight.data.fill_(0.02 * (1 + step / 3000))
        ema.step([weight])
        decay = ema.cur_decay_value
        expected = decay * expected + (1 - decay) * float(weight[0])
    assert float(ema.shadow_params[0][0]) == pytest.approx(expected, rel=1e-3) and expected > 0.03
    ema.copy_to([weight])
    assert weight.dtype == torch.bfloat16 and float(weight[0]) == pytest.approx(expected, rel=0.01)
