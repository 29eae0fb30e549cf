"""Muon and AdamW as one optimizer: who trains what, schedules, scalers, states, and what is refused."""

import argparse
import io
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.training.arguments import LR_SCHEDULERS
from diffusers_vqdit.training.checkpoints import save_checkpoint
from diffusers_vqdit.training.muon import SHARDING, MuonAdamW, block_matrices, check_muon, default_optimizer
from diffusers_vqdit.training.run import training_run
from diffusers_vqdit.training.setup import make_optimizer, prepare


SEGMENTS = {
    "image": {"vocab_size": 8, "shape": [2, 2]},
    "text": {"vocab_size": 5, "shape": [3]},
    "states": {"channels": 12, "shape": [4]},
}
MATRICES = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")


def arguments(**changes):
    values = {"optimizer": "muon", "adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-8, "seed": 0}
    values |= {"adam_weight_decay": 0.01, "learning_rate": 1e-2, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
    values |= {"lr_num_cycles": 1, "lr_power": 1.0}
    values |= {"train_batch_size": 4, "max_train_steps": 10, "gradient_accumulation_steps": 1, "ema_decay": 0.9}
    return argparse.Namespace(**values | changes)


def transformer(**options):
    torch.manual_seed(0)
    options = {"segments": SEGMENTS, "tasks": ["text->image", "->image", "states->image"]} | options
    return VQDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, **options)


def backward(model, step=0):
    """The gradients of predicting pictures' codes from nothing but their number; no text has a say."""
    codes = torch.randint(8, (4, 2, 2), generator=torch.Generator().manual_seed(step))
    logits = model({"image": torch.full_like(codes, 8)}).sample["image"]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), codes.flatten())
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(model, other):
    assert not [n for n, p in model.state_dict().items() if not torch.equal(p, other.state_dict()[n])]


@pytest.mark.parametrize("options", [{}, {"use_rotary_positional_embeddings": True}, {"attention_bias": False}])
def test_muon_has_the_matrices_of_attention_and_feed_forward_and_adamw_all_else(options):
    model = transformer(**options)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, *others = make_optimizer(arguments(), model, 1e-2).param_groups
    wanted = {f"transformer_blocks.{block}.{name}.weight" for block in range(2) for name in MATRICES}
    assert {names[id(p)] for p in muon["params"]} == wanted
    rest = [names[id(p)] for group in others for p in group["params"]]
    assert len(rest) == len(set(rest)) and set(rest) == set(names.values()) - wanted
    assert [group["weight_decay"] for group in (muon, *others)] == [0.01, 0.01, 0.0]
    assert {"heads.image.weight", "transformer_blocks.1.adaln.weight", "adaln_out.weight"} <= set(rest)


def test_what_is_frozen_is_left_out():
    model = transformer()
    model.transformer_blocks[0].requires_grad_(False)
    groups = make_optimizer(arguments(), model, 1e-2).param_groups
    assert len(block_matrices(model)) == len(MATRICES)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_without_the_flag_it_is_adamw():
    unsaid = arguments()
    del unsaid.optimizer
    for args in (unsaid, arguments(optimizer="adamw")):
        optimizer = make_optimizer(args, transformer(), 1e-2)
        assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 2


def test_a_step_is_that_of_both_and_leaves_what_has_no_gradient():
    model, other = transformer(), transformer()
    optimizer = make_optimizer(arguments(), model, 1e-2)
    matrices = block_matrices(other)
    of_muon = {id(p) for p in matrices}
    rest = [p for p in other.parameters() if id(p) not in of_muon]
    decayed = [p for p in rest if p.ndim > 1 and not any(p is m.weight for m in embeddings(other))]
    plain = [p for p in rest if id(p) not in {id(q) for q in decayed}]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    apart = (
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, fused=True),
    )
    before = transformer().state_dict()
    for step in range(3):
        backward(model, step)
        backward(other, step)
        for one in (optimizer, *apart):
            one.step()
            one.zero_grad()
    assert_equal(model, other)
    untouched = ("heads.text", "code_embeddings.text", "proj_in.states")
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items() if n.startswith(untouched))
    assert all(not torch.equal(p, before[n]) for n, p in model.state_dict().items() if "to_q.weight" in n)


def embeddings(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]


def test_a_block_without_gradients_stays_as_it_is():
    model, before = transformer(), transformer()
    optimizer = make_optimizer(arguments(), model, 1e-2)
    train(model, optimizer, range(2))  # those of a new one are 0 in the first step
    before.load_state_dict(model.state_dict())
    backward(model)
    model.transformer_blocks[0].zero_grad()
    optimizer.step()
    assert_equal(model.transformer_blocks[0], before.transformer_blocks[0])
    for name, weight in model.transformer_blocks[1].named_parameters():
        assert not torch.equal(weight, before.transformer_blocks[1].get_parameter(name)), name


def test_a_closure_gives_its_loss():
    model = transformer()
    optimizer = make_optimizer(arguments(), model, 1e-2)
    assert torch.equal(optimizer.step(lambda: backward(model)), backward(transformer()))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_state_that_is_saved_and_loaded_goes_on_bit_for_bit(steps):
    model = transformer()
    optimizer = make_optimizer(arguments(), model, 1e-2)
    train(model, optimizer, range(steps))
    file, other = io.BytesIO(), transformer()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(model.state_dict())
    again = make_optimizer(arguments(), other, 0.5)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, range(steps, 5))
    train(other, again, range(steps, 5))
    assert_equal(model, other)
    assert len(again.state) == len(optimizer.state) > len(block_matrices(model))


@pytest.mark.parametrize("lr_scheduler", LR_SCHEDULERS)
def test_all_groups_follow_the_schedule(lr_scheduler):
    """Also those of a state that was loaded, by the steps that the rates make."""
    model, before = transformer(), transformer()
    _, optimizer, schedule, _ = prepare(arguments(lr_scheduler=lr_scheduler), Accelerator(), model, 40)
    optimizer.load_state_dict(optimizer.state_dict())
    assert schedule.scheduler.base_lrs == [1e-2] * 3
    for step in range(4):
        train(model, optimizer, [step])
        schedule.step()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == schedule.get_last_lr() == rates[:1] * 3
    before.load_state_dict(model.state_dict())
    for rate in (0.0, 1.0):
        for group in optimizer.param_groups:
            group["lr"] = rate
        train(model, optimizer, [4])
        moved = [not torch.equal(*both) for both in zip(block_matrices(model), block_matrices(before), strict=True)]
        assert all(moved) if rate else not any(moved)


def test_a_scaler_scales_and_skips():
    model, other = transformer(), transformer()
    scaled, plain = (make_optimizer(arguments(), one, 1e-2) for one in (model, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, bad in enumerate([False, True, False]):
        codes = torch.randint(8, (4, 2, 2), generator=torch.Generator().manual_seed(step))
        logits = model({"image": torch.full_like(codes, 8)}).sample["image"]
        scaler.scale(torch.nn.functional.cross_entropy(logits.flatten(0, -2), codes.flatten())).backward()
        if bad:
            model.heads["image"].weight.grad[0, 0] = float("inf")
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
        if not bad:
            train(other, plain, [step])
    assert_equal(model, other)
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_learn_a_handful_of_pictures(optimizer):
    model = transformer(tasks=["text->image"])
    both = make_optimizer(arguments(optimizer=optimizer), model, 1e-2)
    text, codes = torch.arange(12).view(4, 3) % 5, torch.randint(8, (4, 2, 2))
    for _ in range(60):
        logits = model({"image": torch.full_like(codes, 8)}, given={"text": text}).sample["image"]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), codes.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        both.step()
        both.zero_grad()
    assert loss < 0.1, loss


def test_a_resumed_run_takes_another_rate_and_decay(tmp_path):
    def run_steps(checkpoint, **changes):
        accelerator, args = Accelerator(step_scheduler_with_optimizer=False), arguments(lr_warmup_steps=0, **changes)
        model, optimizer, schedule, _ = prepare(args, accelerator, transformer(), 40)
        with training_run(accelerator, tmp_path) as run:
            run.begin(checkpoint, identity={}, args=args, states={})
            for step in range(2):
                train(model, optimizer, [step])
                schedule.step()
            path = save_checkpoint(accelerator, tmp_path, run.step + 2, **run.kept())
        return path, [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]

    path, first = run_steps(None)
    _, same = run_steps(path)
    _, changed = run_steps(path, learning_rate=1e-3, adam_weight_decay=0.3)
    assert [decay for _, decay in first] == [decay for _, decay in same] == [0.01, 0.01, 0.0]
    assert [decay for _, decay in changed] == [0.3, 0.3, 0.0]
    assert [rate for rate, _ in changed] == pytest.approx([rate / 10 for rate, _ in same])
    assert len({rate for rate, _ in same}) == 1 and same[0][0] < first[0][0]


@pytest.mark.parametrize(
    ("kind", "pretrained", "wanted"),
    [
        (DistributedType.NO, False, "muon"),
        (DistributedType.MULTI_GPU, False, "muon"),
        (DistributedType.NO, True, "adamw"),
        *((kind, False, "adamw") for kind in SHARDING),
    ],
)
def test_a_new_transformer_has_muon_where_its_matrices_are_whole(kind, pretrained, wanted, monkeypatch):
    accelerator = argparse.Namespace(distributed_type=kind)
    assert default_optimizer(accelerator, None, transformer() if pretrained else None) == wanted
    monkeypatch.delattr(torch.optim, "Muon")
    assert default_optimizer(accelerator, None, transformer() if pretrained else None) == "adamw"


@pytest.mark.parametrize(
    ("identity", "wanted"), [({}, "adamw"), ({"optimizer": "adamw"}, "adamw"), ({"optimizer": "muon"}, "muon")]
)
def test_a_run_goes_on_with_its_own_optimizer(tmp_path, identity, wanted):
    accelerator, args = Accelerator(step_scheduler_with_optimizer=False), arguments(lr_warmup_steps=0)
    with training_run(accelerator, tmp_path) as run:
        run.begin(None, identity=identity, args=args, states={})
        checkpoint = save_checkpoint(accelerator, tmp_path, 1, **run.kept())
    for pretrained in (True, False):
        assert default_optimizer(accelerator, checkpoint, transformer() if pretrained else None) == wanted
    if wanted == "muon":
        with pytest.raises(ValueError, match="multi_gpu.yaml"):
            default_optimizer(argparse.Namespace(distributed_type=SHARDING[0]), checkpoint, None)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(("saved", "loaded"), [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_refused(saved, loaded):
    state = make_optimizer(arguments(optimizer=saved), transformer(), 1e-2).state_dict()
    told = {"muon": "another optimizer's state: give --optimizer adamw", "adamw": "parameter groups"}[loaded]
    with pytest.raises(ValueError, match=told):
        make_optimizer(arguments(optimizer=loaded), transformer(), 1e-2).load_state_dict(state)


def test_a_parameter_of_both_is_refused():
    model = transformer()
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="more than one parameter group"):
        MuonAdamW(block_matrices(model), adamw, lr=1e-3, weight_decay=0.0)


@pytest.mark.parametrize("kind", list(DistributedType))
def test_engines_that_shard_are_refused_by_name(kind):
    accelerator = argparse.Namespace(distributed_type=kind)
    if kind not in SHARDING:
        return check_muon(accelerator)
    told = f"optimizer='muon', which .*distributed_type='{kind.value}'.*multi_gpu.yaml, for one"
    with pytest.raises(ValueError, match=f"^{told}, or give --optimizer adamw$"):
        check_muon(accelerator)
    with pytest.raises(ValueError, match=f"^the run began with {told}$"):  # and takes no other
        check_muon(accelerator, resumed=True)


def test_a_torch_without_muon_is_told_before_the_work(script, tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    flags = f"--codes_dir x --image_vq x --report_to none --output_dir {tmp_path / 'out'} --optimizer muon"
    version = re.escape(torch.__version__)
    told = rf"optimizer='muon', which needs torch 2\.9 or later, this is {version}.*--optimizer adamw"
    with pytest.raises(ValueError, match=told):
        script("train_vqdit").main(script("train_vqdit").parse_args(flags.split()))
    assert not (tmp_path / "out").exists()
    assert type(make_optimizer(arguments(optimizer="adamw"), transformer(), 1e-2)) is torch.optim.AdamW


def test_muon_of_a_lora_is_refused(script, capsys):
    flags = "--codes_dir x --pretrained_model_name_or_path x --rank 4"
    with pytest.raises(SystemExit):
        script("train_vqdit").parse_args(f"{flags} --optimizer muon".split())
    assert "--optimizer muon trains whole matrices of blocks: drop --rank" in capsys.readouterr().err
