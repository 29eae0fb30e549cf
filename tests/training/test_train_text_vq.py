"""Captions packed into rows, and a text tokenizer's figures."""

import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState

from diffusers_vqdit import TextVQModel
from diffusers_vqdit.training.tokenizer_metrics import measure_text_tokenizer
from diffusers_vqdit.utils.texts import tokenize_to_length


@pytest.mark.parametrize("together", [7, 1000])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_packed_captions_are_all_there_each_at_a_position_of_its_own(script, factor, together, monkeypatch):
    lengths = torch.randint(1, 13, (200,)).clamp_max(torch.randint(1, 13, (200,)))
    tokens = torch.randint(1, 50, (200, 12)).masked_fill(torch.arange(12) >= lengths[:, None], 0)
    module = script("train_text_vq")
    monkeypatch.setattr(module, "READ_ROWS", together)
    rows = module.pack_captions(tokens, 0, factor)
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


@pytest.mark.parametrize("lengths", [[0], [0, 0], [0, 3], [4, 0], [2, 0, 4, 0]])
def test_a_caption_without_tokens_takes_no_more_than_a_row(script, lengths):
    tokens = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    rows = script("train_text_vq").pack_captions(tokens, 0, 1)
    assert 1 <= len(rows) <= len(tokens) and rows.sum() == sum(lengths)


def test_captions_stay_on_disk_and_are_tokenized_as_all_at_once(script, tokenizer, tmp_path, caplog):
    count = 4000
    first = [f"the {row}th picture of a red apple in the {row % 7}th style" for row in range(count)]
    second = [[f"{row} green boxes", "a box"] for row in range(count)]
    pq.write_table(pa.table({"text": first, "more": second}), tmp_path / "x.parquet", row_group_size=1000)
    module, columns = script("train_text_vq"), "--caption_columns text more --validation_split none"
    args = f"--dataset_name {tmp_path}/x.parquet {columns} --cache_dir {tmp_path}/cache --output_dir {tmp_path}/run"
    module.load_captions(args := module.parse_args(args.split()))  # into the cache
    tracemalloc.start()
    captions, held_out = module.load_captions(args)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    expected = [*first, *(text for texts in second for text in texts)]
    assert kept < 50 * count and len(captions) == len(expected)  # a string is 49 bytes and its characters
    assert list(captions) == expected and list(held_out) == expected  # each time anew
    PartialState()  # which warnings of scripts need
    tokens, _, counts = tokenize_to_length(tokenizer, expected, 12)
    assert torch.equal(module.tokenize(tokenizer, captions, 12), tokens)
    longer = [text for text, length in zip(expected, counts, strict=True) if length > 12]
    assert (
        f"{len(longer)} of {3 * count} captions have more than max_length=12 tokens and are cut; the first is "
        + (repr(longer[0]))
        in caplog.text
    )


@pytest.mark.parametrize(
    ("asked", "trained", "measured"),
    [("", 40, 10), ("--max_train_samples 30", 30, 10), ("--max_train_samples 4", 4, {"none": 4, "test": 10})],
)
@pytest.mark.parametrize("split", ["none", "test"])
def test_validation_measures_a_few_rows(script, tmp_path, monkeypatch, asked, trained, measured, split):
    texts = [f"caption {row}" for row in range(80)]
    table = {"text": texts, "split": ["train", "test"] * 40}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    module = script("train_text_vq")
    monkeypatch.setattr(module, "VALIDATION_ROWS", 10)
    measured = measured[split] if isinstance(measured, dict) else measured  # what is held out is not cut
    args = f"--dataset_name {tmp_path}/x.parquet --cache_dir {tmp_path}/cache --output_dir {tmp_path}/run"
    captions, held_out = module.load_captions(module.parse_args(f"{args} --validation_split {split} {asked}".split()))
    assert list(captions) == texts[::2][:trained]
    assert list(held_out) == texts[split == "test" :: 2][:measured]


@pytest.mark.parametrize("options", [{}, {"downsample_factor": 2, "quantizer_type": "rvq", "num_quantizers": 2}])
def test_figures_of_a_text_tokenizer_are_those_of_its_captions_in_any_batches(tokenizer, options, monkeypatch):
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
    written = [tokenizer(text, padding="max_length", max_length=12).input_ids for text in ("a red apple", "", "grey")]
    written += [tokenizer("红苹果", padding="max_length", max_length=12).input_ids]
    rows = iter(written)
    monkeypatch.setattr(model, "decode_codes", lambda codes: F.one_hot(torch.tensor([next(rows)]), len(tokenizer)))
    spelled = {"text": ["a  red apple ", "green box", "grey"], "text_zh": ["红苹果"]}  # as the normaliser doesn't
    found = measure_text_tokenizer(model, tokenizer, spelled, batch_size=1)
    assert found["exact_text"] == pytest.approx(2 / 3) and found["exact_text_zh"] == 1
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


@pytest.mark.parametrize(("num_codes", "kernel_size", "told"), [(600, 1, True), (100, 1, False), (600, 3, False)])
def test_codes_that_no_token_can_use_are_told(script, caplog, num_codes, kernel_size, told):
    module = script("train_text_vq")
    PartialState()
    flags = f"--num_codes {num_codes} --kernel_size {kernel_size} --tokenizer_vocab_size 500 --output_dir x"
    captions = [f"the {row}th picture of a red apple" for row in range(50)]
    _, tokenizer = module.build_model(module.parse_args(f"--train_data_dir x {flags}".split()), captions)
    assert (f"num_codes={num_codes} are more than the {len(tokenizer)} tokens" in caplog.text) == told
