import pytest

from benchmarks.text_baselines import END, WittenBell, equal_gpt2
from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.training.byte_pairs import train_text_tokenizer


@pytest.mark.parametrize(("layers", "width"), [(1, 16), (3, 64), (6, 96)])
def test_the_causal_transformer_is_as_large_as_the_checkpoint(layers, width):
    words = train_text_tokenizer(["once upon a time"] * 3, 270)
    transformer = VQDiTTransformer2DModel(
        num_layers=layers,
        num_attention_heads=width // 16,
        attention_head_dim=16,
        segments={"text": {"vocab_size": len(words), "shape": [32], "block_length": 8}},
        tasks=["->text"],
    )
    pipe = VQDiTPipeline(transformer, MaskedDiffusionScheduler(), tokenizer=words)
    model = equal_gpt2(pipe, 64)
    per_layer = sum(parameter.numel() for parameter in model.transformer.h[0].parameters())
    assert model.config.n_embd == width
    assert abs(model.num_parameters() - transformer.num_parameters()) <= per_layer / 2


@pytest.mark.parametrize("order", [1, 2, 4])
def test_counted_characters_have_probabilities_that_sum_to_one(order):
    """Those that were seen, and of all 2^16 the others, alike."""
    model = WittenBell(["abab", "abba", "b"], order)
    for history in ("", "a", "ab", "zzz")[: order + 1]:
        known = history[: order - 1]
        seen = sum(model.probability(character, known) for character in ("a", "b", END))
        unseen = model.probability("z", known)
        assert seen + (2**16 - 3) * unseen == pytest.approx(1)
    assert model.bits("ab") < model.bits("aa") < model.bits("zz")
