"""Captions packed into rows, and a text tokenizer's figures."""

import pytest
import torch

from diffusers_vqdit import TextVQModel
from diffusers_vqdit.training.tokenizer_metrics import measure_text_tokenizer


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_packed_captions_are_all_there_each_at_a_position_of_its_own(script, factor):
    lengths = torch.randint(1, 13, (200,)).clamp_max(torch.randint(1, 13, (200,)))
    tokens = torch.randint(1, 50, (200, 12)).masked_fill(torch.arange(12) >= lengths[:, None], 0)
    rows = script("train_text_vq").pack_captions(tokens, 0, factor)
    assert len(rows) < 0.8 * len(tokens) and rows.shape[1] == 12
    row = position = 0
    for caption, length in zip(tokens, lengths.tolist(), strict=True):
        size = -(-length // factor) * factor
        if position + size > 12:
            assert (rows[row, position:] == 0).all()
            row, position = row + 1, 0
        assert torch.equal(rows[row, position : position + size], caption[:size])
        position += size
        assert (rows[row, position : position + factor] == 0).all()  # a position of padding after it
        position += factor
    assert row == len(rows) - 1


@pytest.mark.parametrize("options", [{}, {"downsample_factor": 2, "quantizer_type": "rvq", "num_quantizers": 2}])
def test_figures_of_a_text_tokenizer_are_those_of_its_captions_in_any_batches(tokenizer, options):
    model = TextVQModel(
        vocab_size=len(tokenizer),
        max_length=12,
        num_codes=64,
        hidden_size=16,
        code_dim=4,
        **({"codebook_norm": "none"} if options else {}),
        **options,
    ).eval()
    captions = {"text": ["a red apple", "green box", "grey"], "text_zh": ["红苹果"]}
    figures = measure_text_tokenizer(model, tokenizer, captions)
    assert figures == measure_text_tokenizer(model, tokenizer, captions, batch_size=2)
    assert figures["count"] == 4 and figures["exact_text"] == figures["exact_text_zh"] == 0  # it is untrained
    levels, codes = len(model.quantizers), []
    for text in [text for texts in captions.values() for text in texts]:
        batch = tokenizer(text, padding="max_length", max_length=12, return_tensors="pt")
        used = -(-int(batch.attention_mask.sum()) // model.config.downsample_factor)
        codes.append(model.encode_codes(batch.input_ids).view(-1, levels)[:used])
    codes = torch.cat(codes)
    assert figures["positions"] == len(codes) / 4
    shares = [torch.bincount(level).double() / len(codes) for level in codes.unbind(1)]
    usage = [(share > 0).sum().item() / 64 for share in shares]
    perplexity = [torch.distributions.Categorical(share).entropy().exp().item() for share in shares]
    assert figures["usage"] == pytest.approx(sum(usage) / levels)
    assert figures["perplexity"] == pytest.approx(sum(perplexity) / levels)
    each = {f"usage_{level}": value for level, value in enumerate(usage, 1)}
    each |= {f"perplexity_{level}": value for level, value in enumerate(perplexity, 1)}
    assert {name: figures[name] for name in each if name in figures} == (pytest.approx(each) if levels > 1 else {})
