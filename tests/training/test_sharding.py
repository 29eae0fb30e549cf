"""What is done before an engine shards a model, and which engines are refused; the training itself is in
test_processes.py."""

import argparse

import pytest
import torch
from accelerate.utils import DistributedType

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.training.alignment import AlignedTransformer
from diffusers_vqdit.training.sharding import check_unsharded, clip_gradients, evaluated, like, prepare_sharding, whole


def accelerator(kind, *, main=True, **state):
    plugin = argparse.Namespace(fsdp_version=2, transformer_cls_names_to_wrap=None)
    state = argparse.Namespace(**{"fsdp_plugin": plugin, **state})
    return argparse.Namespace(distributed_type=kind, is_main_process=main, state=state, device=torch.device("cpu"))


def transformer(**options):
    return VQDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, **options)


ARGS = argparse.Namespace(train_batch_size=4, max_grad_norm=0.5)
CODES = {"segments": {"image": {"vocab_size": 8, "shape": [2, 2]}}, "tasks": ["->image"]}


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_tokenizers_refuse_engines_that_shard_by_name(kind):
    with pytest.raises(ValueError, match=f"distributed_type='{kind}' is for transformers.*multi_gpu.yaml"):
        check_unsharded(accelerator(DistributedType[kind]))
    for other in ("NO", "MULTI_GPU", "MULTI_CPU"):
        check_unsharded(accelerator(DistributedType[other]))


def test_blocks_become_units_and_the_main_process_keeps_a_copy():
    for main in (True, False):
        model, engine = transformer(**CODES), accelerator(DistributedType.FSDP, main=main)
        prepare_sharding(ARGS, engine, model)
        assert engine.state.fsdp_plugin.transformer_cls_names_to_wrap == ["VQDiTBlock"]
        assert ("whole_copy" in model.__dict__) == main
        assert not any("whole_copy" in name for name in model.state_dict())
    assert engine.state.fsdp_plugin.fsdp_version == 2


def test_a_denoiser_of_latents_is_one_unit_and_named_blocks_stay():
    model = AlignedTransformer(transformer(in_channels=4, sample_size=4, num_embeds_ada_norm=3), 1, None)
    engine = accelerator(DistributedType.FSDP)
    prepare_sharding(ARGS, engine, model)
    assert engine.state.fsdp_plugin.transformer_cls_names_to_wrap == []
    engine.state.fsdp_plugin.transformer_cls_names_to_wrap = ["Mine"]
    prepare_sharding(ARGS, engine, model)
    assert engine.state.fsdp_plugin.transformer_cls_names_to_wrap == ["Mine"]


def test_the_first_version_of_fsdp_is_refused():
    engine = accelerator(DistributedType.FSDP, fsdp_plugin=argparse.Namespace(fsdp_version=1))
    with pytest.raises(ValueError, match="fsdp_version=1 must be 2"):
        prepare_sharding(ARGS, engine, transformer(**CODES))


def test_deepspeed_is_told_what_the_script_was():
    plugin = argparse.Namespace(deepspeed_config={"zero_optimization": {"stage": 2}})
    prepare_sharding(ARGS, accelerator(DistributedType.DEEPSPEED, deepspeed_plugin=plugin), transformer(**CODES))
    told = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5}
    assert plugin.deepspeed_config == {"zero_optimization": {"stage": 2}, **told}


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU"])
def test_nothing_is_done_where_nothing_is_sharded(kind):
    model = transformer(**CODES)
    prepare_sharding(ARGS, accelerator(DistributedType[kind]), model)
    assert "whole_copy" not in model.__dict__
    value = torch.ones(3)
    assert whole(value) is value and like(value, torch.zeros(3)) is value
    with evaluated(accelerator(DistributedType[kind], main=False), model) as found:
        assert found is None and model.training


def test_fsdp_that_does_not_engage_is_told(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    prepare_sharding(ARGS, accelerator(DistributedType.MULTI_CPU), transformer(**CODES))
    assert "nothing is sharded" in caplog.text


@pytest.mark.parametrize(("norm", "expected"), [(torch.tensor(2.0), 2.0), (2.5, 2.5), (None, 0.0)])
def test_norms_of_all_engines_are_tensors(norm, expected):
    """DeepSpeed's is a number, and none before its first step."""
    engine = argparse.Namespace(scaler=None, clip_grad_norm_=lambda parameters, max_norm: norm)
    assert clip_gradients(engine, None, [], 1.0).item() == expected


def test_what_a_checkpoint_holds_takes_the_dtype_that_it_has_now():
    """Such as averages in float32 of a checkpoint from when they were in half precision."""
    found = like(torch.ones(3, dtype=torch.bfloat16), torch.zeros(3))
    assert found.dtype == torch.float32 and torch.equal(found, torch.ones(3))
