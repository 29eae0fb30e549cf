import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.utils import convert_to_fp32

from diffusers_vqdit import TextVQModel


RESIDUAL = {"quantizer_type": "rvq", "num_quantizers": 2, "codebook_norm": "none"}


def tokens(tokenizer, texts):
    return tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")


@pytest.mark.parametrize(
    "text, read",
    [
        *((text, text) for text in ("a red apple", "一个红苹果，中等肤色", "naïve façade 🙂", "ünbekannt: ∮ 한국 ☃")),
        ("tab\tand \x07 bell", "tab and bell"),
        (" two  spaces ", "two spaces"),
    ],
)
def test_the_tokenizer_is_lossless_on_any_text_as_its_normaliser_writes_it(tokenizer, text, read):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == read


def test_padding_changes_nothing(text_vq, tokenizer):
    batch = tokens(tokenizer, ["a red apple", "green"])
    noise = torch.where(batch.attention_mask == 0, torch.randint_like(batch.input_ids, 250), batch.input_ids)
    expected = text_vq.encode_codes(batch.input_ids, batch.attention_mask)
    assert torch.equal(text_vq.encode_codes(noise, batch.attention_mask), expected)
    torch.testing.assert_close(
        text_vq.embed(noise, batch.attention_mask), text_vq.embed(batch.input_ids, batch.attention_mask)
    )


def test_accelerate_can_cast_the_output(text_vq, tokenizer):
    batch = tokens(tokenizer, ["a red apple"])
    with torch.autocast("cpu", torch.bfloat16):
        output = text_vq(batch.input_ids, batch.attention_mask)
    assert output.logits.dtype == torch.bfloat16
    cast = convert_to_fp32(output)  # as the models that Accelerator prepares for mixed precision do
    assert cast.keys() == output.keys() and cast.logits.dtype == torch.float32
    assert torch.equal(cast.codes, output.codes)


def test_offloaded_layer_by_layer_it_gives_the_same(text_vq, tokenizer):
    batch = tokens(tokenizer, ["a red apple", "green"])
    codes, vectors = text_vq.encode_codes(**batch), text_vq.embed(**batch)
    logits = text_vq.decode_codes(codes)
    cpu_offload(text_vq, execution_device=torch.device("cpu"))
    assert torch.equal(text_vq.encode_codes(**batch), codes)
    torch.testing.assert_close(text_vq.decode_codes(codes), logits)
    torch.testing.assert_close(text_vq.embed(**batch), vectors)


def test_embeddings_are_unit_vectors(text_vq, tokenizer):
    batch = tokens(tokenizer, ["a red apple", "green", "a red apple"])
    vectors = text_vq.embed(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert torch.equal(vectors[0], vectors[2])
    assert vectors[0] @ vectors[1] < 0.99


def test_rare_codes_weigh_more_in_embeddings(text_vq, tokenizer):
    batch = tokens(tokenizer, ["a red apple"])
    codes = text_vq.encode_codes(batch.input_ids, batch.attention_mask)
    quantizer = text_vq.quantizers[0]
    quantizer.cluster_size.fill_(0.1)
    alike = text_vq.embed(batch.input_ids, batch.attention_mask)[0]
    states = text_vq._decode_states(text_vq._lookup(codes))[0]
    real = states[batch.attention_mask[0] == 1]
    torch.testing.assert_close(alike, torch.nn.functional.normalize(real.sum(0), dim=0))
    quantizer.cluster_size[codes[0, 0]] = 0
    weights = torch.where(codes[0, : len(real)] == codes[0, 0], 1.0, 1e-3 / (1e-3 + 0.1))
    expected = torch.nn.functional.normalize((real * weights[:, None]).sum(0), dim=0)
    torch.testing.assert_close(text_vq.embed(batch.input_ids, batch.attention_mask)[0], expected)
    del quantizer.cluster_size  # a codebook that keeps no statistics
    torch.testing.assert_close(text_vq.embed(batch.input_ids, batch.attention_mask)[0], alike)


@pytest.mark.parametrize(
    ("options", "positions"),
    [
        ({}, 12),
        ({"downsample_factor": 2, "num_codebooks": 2, "codebook_norm": "none", "kernel_size": 3}, 12),
        ({"downsample_factor": 3, "num_codebooks": 1, "num_layers": 2}, 4),
        ({**RESIDUAL, "downsample_factor": 2, "kernel_size": 3}, (6, 2)),
        ({**RESIDUAL, "downsample_factor": 4, "num_quantizers": 1}, (3, 1)),
    ],
)
def test_shapes_and_forward_agree_with_the_code_api(tokenizer, options, positions):
    model = TextVQModel(vocab_size=len(tokenizer), max_length=12, num_codes=64, hidden_size=16, code_dim=4, **options)
    model.eval()
    batch = tokens(tokenizer, ["a red apple", "红苹果"])
    codes = model.encode_codes(batch.input_ids, batch.attention_mask)
    shape = positions if isinstance(positions, tuple) else (positions,)
    assert codes.shape == (2, *shape) == (2, *model.code_shape) and model.num_code_positions == shape[0]
    assert codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < 64
    output = model(batch.input_ids, batch.attention_mask)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.logits, model.decode_codes(codes), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"downsample_factor": 2, "num_codebooks": 2, "codebook_norm": "none", "kernel_size": 3},
        {**RESIDUAL, "downsample_factor": 2},
    ],
)
def test_it_learns_to_give_captions_back(tokenizer, options):
    model = TextVQModel(vocab_size=len(tokenizer), max_length=12, num_codes=256, hidden_size=32, code_dim=8, **options)
    texts = ["a red apple", "green box", "红苹果", "a yellow dot"]
    batch = tokens(tokenizer, texts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(150):
        output = model(batch.input_ids, batch.attention_mask)
        loss = F.cross_entropy(output.logits.flatten(0, 1), batch.input_ids.flatten()) + output.commit_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    codes = model.encode_codes(batch.input_ids, batch.attention_mask)
    decoded = tokenizer.batch_decode(model.decode_codes(codes).argmax(-1), skip_special_tokens=True)
    assert decoded == texts


def test_merging_leaves_one_code_of_those_that_rounding_would_choose_among(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = TextVQModel(vocab_size=len(tokenizer), max_length=12, num_codes=300, hidden_size=16, code_dim=8).eval()
    ids = torch.arange(len(tokenizer)).repeat(12)[: len(tokenizer) // 12 * 12].view(-1, 12)
    quantizer = model.quantizers[0]
    vectors = F.normalize(model._encode(ids).detach().flatten(0, 1)[:200], dim=1)
    # 50 codes with a near duplicate on either side of them, 150 without; the one that is used most has to stay.
    codebook = torch.cat([vectors, vectors[:50] + 1e-4 * torch.randn(50, 8), vectors[:50] - 1e-4 * torch.randn(50, 8)])
    quantizer.embedding.weight.data.copy_(codebook)
    quantizer.cluster_size.fill_(1 / 300)
    quantizer.cluster_size[200:230] = 2 / 300
    kept = model.merge_codes(tolerance=1e-6)
    assert kept.tolist() == [*range(30, 230)] and model.num_codes == model.config.num_codes == 200
    torch.testing.assert_close(quantizer.codebook, F.normalize(codebook[kept], dim=1))
    codes = model.encode_codes(ids)
    for rows in (1, 3):
        assert torch.equal(torch.cat([model.encode_codes(part) for part in ids.split(rows)]), codes)
    model.save_pretrained(tmp_path)
    assert torch.equal(TextVQModel.from_pretrained(tmp_path).encode_codes(ids), codes)


def test_merging_residual_codes_puts_duplicates_out_of_reach(tmp_path):
    options = {"vocab_size": 50, "max_length": 12, "downsample_factor": 2, "num_codes": 60, "code_dim": 8}
    model = TextVQModel(**options, **RESIDUAL).train()
    ids = torch.randint(50, (64, 12))
    for _ in range(5):
        model(ids)
    for quantizer in model.quantizers:
        weight = quantizer.embedding.weight.data
        weight[40:] = weight[:20] + 1e-4 * torch.randn_like(weight[:20])
        quantizer.cluster_size[:40] = 1.0  # more used than their duplicates
    kept = model.eval().merge_codes(tolerance=1e-6)
    assert model.num_codes == model.config.num_codes == 60
    assert all(set(codes.tolist()).isdisjoint(range(40, 60)) for codes in kept)
    codes = model.encode_codes(ids)
    assert codes.max() < 40
    again = model.merge_codes(tolerance=1e-6)  # as after a finetuning; those out of use have no say
    assert [one.tolist() for one in again] == [one.tolist() for one in kept]
    assert model.encode_codes(ids).equal(codes)
    model.half().save_pretrained(tmp_path)
    loaded = TextVQModel.from_pretrained(tmp_path)
    assert loaded.decode_codes(torch.full((1, 6, 2), 59)).isfinite().all()
    assert loaded.encode_codes(ids).max() < 40
    model.float().train()(ids)  # where they may be restarted


@pytest.mark.parametrize("levels", [1, 3])
def test_residual_codes_are_those_that_lay_side_by_side_with_an_axis_of_their_own(tokenizer, tmp_path, levels):
    options = {"vocab_size": len(tokenizer), "max_length": 12, "num_codes": 64, "hidden_size": 16, "code_dim": 4}
    line = TextVQModel(**options, codebook_norm="none", num_codebooks=levels).eval()
    model = TextVQModel(**options, codebook_norm="none", quantizer_type="rvq", num_quantizers=levels).eval()
    model.load_state_dict(line.state_dict())
    batch = tokens(tokenizer, ["a red apple", "红苹果"])
    codes, flat = model.encode_codes(**batch), line.encode_codes(**batch)
    assert codes.shape == (2, 12, levels) and torch.equal(codes.flatten(1), flat)
    assert torch.equal(model.decode_codes(codes), line.decode_codes(flat))
    assert torch.equal(model.embed(**batch), line.embed(**batch))
    for ours, other in zip(model.encode_states(**batch), line.encode_states(**batch), strict=True):
        assert torch.equal(ours, other)
    output, other = model(**batch), line(**batch)
    assert torch.equal(output.logits, other.logits) and torch.equal(output.commit_loss, other.commit_loss)
    assert output.usage.shape == output.perplexity.shape == (levels,)
    torch.testing.assert_close(output.perplexity.mean(), other.perplexity)
    model.save_pretrained(tmp_path)
    assert torch.equal(TextVQModel.from_pretrained(tmp_path).encode_codes(**batch), codes)
    with pytest.raises(ValueError, match=rf"shape \(B, 12, {levels}\), got \(2, {12 * levels}\)"):
        model.decode_codes(flat)


@pytest.mark.parametrize(
    ("factor", "levels", "seen"), [(2, 2, [1, 2]), (4, 2, [2, 4]), (3, 2, [2, 3]), (2, 3, [1, 2, 2])]
)
def test_a_level_sees_the_first_tokens_of_a_position_only(factor, levels, seen):
    model = TextVQModel(
        vocab_size=50,
        max_length=12,
        downsample_factor=factor,
        num_codes=40,
        code_dim=4 * factor,
        codebook_norm="none",
        quantizer_type="rvq",
        num_quantizers=levels,
    ).train()
    ids = torch.randint(1, 50, (32, 12))
    for _ in range(3):
        model(ids)
    codes = model.eval().encode_codes(ids)
    for place in range(factor):
        changed = ids.unflatten(1, (-1, factor)).clone()
        changed[:, :, place] = changed[:, :, place] % 49 + 1
        other = model.encode_codes(changed.flatten(1))
        for level in range(levels):
            same = torch.equal(other[..., level], codes[..., level])
            if place >= seen[level]:
                assert same
            elif place >= [0, *seen][level]:  # what this level is the first to see
                assert not same


def test_residual_codes_halve_the_error():
    torch.manual_seed(0)
    errors = []
    for number in (1, 2, 4):
        model = TextVQModel(
            vocab_size=500, max_length=8, num_codes=16, code_dim=4, num_codebooks=number, codebook_norm="none"
        ).train()
        ids = torch.randint(500, (64, 8))
        for _ in range(20):
            model(ids)
        model.eval()
        with torch.no_grad():
            errors.append(F.mse_loss(model._lookup(model.encode_codes(ids)), model._encode(ids)).item())
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = TextVQModel(vocab_size=50, max_length=8, num_codes=16, hidden_size=16, num_layers=2, kernel_size=3)
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        output = model(torch.randint(50, (4, 8)))
        (output.logits.square().mean() + output.commit_loss).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_save_and_load(text_vq, tokenizer, tmp_path):
    text_vq.save_pretrained(tmp_path)
    loaded = TextVQModel.from_pretrained(tmp_path)
    batch = tokens(tokenizer, ["a red apple"])
    assert torch.equal(loaded.encode_codes(batch.input_ids), text_vq.encode_codes(batch.input_ids))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 11, dtype=torch.int64), r"shape \(B, 12\)"),
        (torch.zeros(1, 12), "float32"),
        (torch.full((1, 12), 100_000), "100000"),
    ],
)
def test_bad_tokens_are_named(text_vq, ids, message):
    with pytest.raises(ValueError, match=message):
        text_vq.encode_codes(ids)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 5, dtype=torch.int64), r"shape \(B, 12\)"),
        (torch.full((1, 12), 64), r"\[0, 64\)"),
    ],
)
def test_bad_codes_are_named(text_vq, codes, message):
    with pytest.raises(ValueError, match=message):
        text_vq.decode_codes(codes)


@pytest.mark.parametrize(
    "options",
    [{"max_length": 7, "downsample_factor": 2}, {"kernel_size": 2}, {"pad_token_id": -1}, {"num_codebooks": 2}],
)
def test_bad_configs_are_named(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        TextVQModel(**options)
