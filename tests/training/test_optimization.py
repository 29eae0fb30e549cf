"""What an optimizer decays, and dropout of a loaded model."""

import torch

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.training.optimization import parameter_groups, set_dropout


def test_decay_is_for_matrices_only(transformer):
    decayed, plain = parameter_groups(transformer, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    names = {id(p): name for name, p in transformer.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "embedding" not in names[id(p)] for p in decayed["params"])
    assert decayed["params"] and all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 or "embedding" in names[id(p)] for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_a_loaded_model_takes_another_dropout():
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    model = VQDiTTransformer2DModel(**config, segments={"text": {"vocab_size": 5, "shape": [6]}}, tasks=["->text"])
    for parameter in model.parameters():  # the blocks start as the identity, which drops nothing
        torch.nn.init.normal_(parameter, std=0.1)
    codes = {"text": torch.arange(6)[None] % 5}
    plain = model.train()(codes).sample["text"]
    torch.testing.assert_close(model(codes).sample["text"], plain)
    set_dropout(model, 0.5)
    assert model.config.dropout == 0.5 and (model(codes).sample["text"] - plain).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(codes).sample["text"], plain)
