"""Texts of any length through the public scripts: a tokenizer, codes in blocks, training, saving, continuing."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.segment_base import SegmentColumn
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.byte_pairs import train_text_tokenizer
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.finetuning import extend_transformer
from diffusers_vqdit.training.masked_loss import block_timesteps, masked_diffusion_loss
from diffusers_vqdit.training.row_order import bucket_batches
from diffusers_vqdit.training.text_rows import one_text_a_row
from diffusers_vqdit.training.tokenizers import load_text_tokenizer
from diffusers_vqdit.utils.token_ids import END_TOKEN, in_blocks, token_ids


TITLES = ["king", "two kings and a queen", "a time", "upon a time in a far land"]
POEM = {"poem": SegmentColumn("text", "poem")}
POEMS = ["once upon a time", "a king  had\na daughter, and she had a king", "the End", "there was a time " * 9]


@pytest.fixture(scope="module")
def words():
    return train_text_tokenizer([*TITLES, *POEMS] * 3, 300)


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words.save_pretrained(folder / "tokenizer")
    Dataset.from_dict({"title": TITLES * 4, "poem": POEMS * 4}).to_parquet(folder / "texts.parquet")
    columns = {name: SegmentColumn("text", name) for name in ("title", "poem")}
    data = Dataset.from_parquet(str(folder / "texts.parquet"))
    options = {"tokenizer": words, "block_length": 4, "max_text_length": 30}
    encode_dataset(data, folder / "codes", segments=columns, **options)
    return folder


def test_rows_of_equal_lengths_are_a_bucket(folder, words):
    codes = CodeDataset(folder / "codes")
    assert codes.segments["poem"] == {
        **{"vocab_size": len(words), "shape": [28], "block_length": 4, "shared_with": "title"}
    }
    assert codes.entries["poem"] == {"modality": "text", "tokenizer": "tokenizer"}
    for rows, _ in zip(bucket_batches(codes.buckets, 4, seed=0), range(6), strict=False):
        given, generated = codes.batch(rows, Task.parse("title->poem"))
        for name, texts in (("title", TITLES), ("poem", POEMS)):
            value = {**given, **generated}[name]
            for row, ids in zip(rows.tolist(), value.tolist(), strict=True):
                assert ids == in_blocks(token_ids(words, [texts[row % 4]])[0], words.eos_token_id, 4, 28)
    with pytest.raises(ValueError, match="a batch has rows of one"):
        codes.batch(torch.arange(4), Task.parse("title->poem"))


def test_texts_that_are_cut_are_counted_before_the_work(folder, words, tmp_path, caplog):
    data = Dataset.from_parquet(str(folder / "texts.parquet"))
    with caplog.at_level(logging.WARNING, "diffusers_vqdit"):
        encode_dataset(
            data, tmp_path, segments={"poem": SegmentColumn("text", "poem")}, tokenizer=words, max_text_length=16
        )
    said = (
        "column 'poem': 8 of 16 texts have more than max_text_length=16 tokens with their end, and are cut; the first"
    )
    assert said in caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_text_length": 3}, "max_text_length=3 must be at least block_length=4"),
        ({"block_length": 0}, "block_length=0"),
        ({"prompts": True}, "token ids have no other wordings"),
    ],
)
def test_what_does_not_fit_is_named(words, tmp_path, change, message):
    data = Dataset.from_dict({"poem": POEMS})
    prompts = ("poem",) if change.pop("prompts", False) else None
    column = SegmentColumn("text", "poem", prompt_columns=prompts)
    with pytest.raises(ValueError, match=message):
        encode_dataset(data, tmp_path, segments={"poem": column}, tokenizer=words, **{"block_length": 4, **change})


def test_a_row_of_several_texts_is_one_for_each(words, tmp_path):
    """Each text of one column with each of another, and with what else the row has; nothing else is changed."""
    lists = [["a king"], ["once upon a time", "a king", "the end of a time and a king"], ["a"]]
    data = Dataset.from_dict({"poem": lists, "title": [["x"], ["y", "z"], ["w"]], "kind": ["a", "b", "c"]})
    segments = {name: SegmentColumn("text", name) for name in ("poem", "title")}
    segments["kind"] = SegmentColumn("label", "kind")
    codes = CodeDataset(encode_dataset(data, tmp_path, segments=segments, tokenizer=words, block_length=4))
    found = set()
    for row in range(len(codes)):
        given, generated = codes.batch(torch.tensor([row]), Task.parse("poem+kind->title"))
        texts = [words.decode(one[0], skip_special_tokens=True) for one in (given["poem"], generated["title"])]
        found.add((*texts, int(given["kind"])))
    expected = {(poem, title, 1) for poem in lists[1] for title in "yz"} | {("a king", "x", 0), ("a", "w", 2)}
    assert found == expected and len(codes) == 8
    single = Dataset.from_dict({"poem": ["a king", "a"]})
    assert one_text_a_row(single, ["poem", "poem"]) == (single, {})


def test_a_tokenizer_without_an_end_gets_one_and_it_is_told(words, tmp_path, caplog):
    bare = train_text_tokenizer(POEMS, 300)
    bare.eos_token = None
    bare.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "diffusers_vqdit"):
        found = load_text_tokenizer(str(tmp_path))
    assert found.eos_token == END_TOKEN and "has no end of texts" in caplog.text
    with pytest.raises(ValueError, match="has no tokenizer of transformers"):
        load_text_tokenizer(str(tmp_path / "nothing"))
    # As train_text_vq.py writes it, beside its model.
    words.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    assert load_text_tokenizer(str(tmp_path / "text_vq")).get_vocab() == words.get_vocab()


ENDED, BLANK = f"{END_TOKEN}a king{END_TOKEN}", "a <mask> king"


@pytest.mark.parametrize("texts", [["a"], ["a", ENDED], ["a", BLANK, BLANK], [ENDED, "a", BLANK, ENDED]])
def test_what_texts_have_of_their_tokenizer_is_told(words, tmp_path, caplog, texts):
    encode_dataset(Dataset.from_dict({"poem": texts}), tmp_path, tokenizer=words, segments=POEM)
    for text, what in ((ENDED, "name the end of a text, '<|endoftext|>'"), (BLANK, "have '<mask>', which is learned")):
        note = f"column 'poem': {texts.count(text)} of {len(texts)} texts {what}"
        assert (note in caplog.text) == (text in texts) and (what in caplog.text) == (text in texts)


@pytest.mark.parametrize("empty", [END_TOKEN, END_TOKEN * 3])
def test_a_text_of_ends_alone_is_refused(words, tmp_path, empty):
    data = Dataset.from_dict({"poem": ["a", empty, "a king", empty]})
    with pytest.raises(ValueError, match="column 'poem': 2 of 4 texts have no tokens but the end of a text"):
        encode_dataset(data, tmp_path, tokenizer=words, segments=POEM)
    assert not (tmp_path / "segments.json").exists()


def test_the_loss_is_that_of_each_block_alone():
    """At K codes of equal logits it is log K; its gradient is that of blocks computed one by one."""
    torch.manual_seed(0)
    segments = {"poem": {"vocab_size": 5, "shape": [6], "block_length": 2}}
    model = VQDiTTransformer2DModel(2, 8, num_layers=2, segments=segments).train()
    codes, times = torch.randint(5, (3, 6)), torch.tensor([0.3, 0.6, 0.9])
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    options = {"timesteps": times, "generator": generators, "weighting": "nelbo"}
    scheduler = MaskedDiffusionScheduler(masking="linear")
    flat = masked_diffusion_loss(model, scheduler, {}, {"poem": codes}, timesteps=times)
    assert flat.item() == pytest.approx(torch.tensor(5.0).log().item(), rel=1e-5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found = masked_diffusion_loss(model, scheduler, {}, {"poem": codes}, **options)
    found.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    blocks = block_timesteps(times, 3, generators)
    noised = scheduler.add_noise(
        codes.view(9, 2), blocks.flatten(), mask_token_id=5, generator=[one for one in generators for _ in range(3)]
    ).view(3, 3, 2)
    total, prefix = 0.0, None
    for block in range(3):
        part, hidden = codes[:, 2 * block : 2 * block + 2], noised[:, block]
        scores = model({"poem": hidden}, prefix=prefix).sample["poem"].log_softmax(-1)
        nll = -scores.gather(-1, part[..., None])[..., 0] * (hidden == 5)
        total = total + (nll * scheduler.loss_weight(blocks[:, block])[:, None]).sum()
        prefix = model.extend_prefix(prefix, {"poem": part})
    (total / 18).backward()
    assert found.item() == pytest.approx(total.item() / 18, rel=1e-5)
    for expected, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(torch.zeros_like(expected) if parameter.grad is None else parameter.grad, expected)


def test_longer_texts_than_the_pretrained_ones_go_on():
    segments = {"poem": {"vocab_size": 5, "shape": [6], "block_length": 2}}
    model = VQDiTTransformer2DModel(2, 8, num_layers=1, segments=segments, tasks=["->poem"])
    longer = {"poem": {"vocab_size": 5, "shape": [40], "block_length": 2}}
    assert extend_transformer(model, longer, {}, ["->poem"]).config.segments == segments
    with pytest.raises(ValueError, match="in the data but"):
        extend_transformer(model, {"poem": {"vocab_size": 5, "shape": [6], "block_length": 3}}, {}, ["->poem"])


def test_a_block_text_is_generated_alone():
    segments = {"poem": {"vocab_size": 5, "shape": [6], "block_length": 2}, "kind": {"vocab_size": 2, "shape": [1]}}
    with pytest.raises(ValueError, match=r"'->kind\+poem' generates 'poem' by blocks, which is generated alone"):
        VQDiTTransformer2DModel(2, 8, num_layers=1, segments=segments, tasks=["->kind+poem"])


REPLACED = "had another tokenizer, which this one replaces"


@pytest.mark.parametrize(
    ("change", "told"),
    [("", False), ("--max_samples 16", False), ("--vocab_size 301", True), ("--text_columns title", True)],
)
@pytest.mark.parametrize("broken", [False, True])
def test_a_tokenizer_that_replaces_another_says_so(run, folder, tmp_path, caplog, change, told, broken):
    command = f"--dataset_name {folder / 'texts.parquet'} --output_dir {tmp_path} --vocab_size 300"
    command += " --text_columns title poem"
    run("train_tokenizer", command)
    assert REPLACED not in caplog.text
    if broken:
        (tmp_path / "tokenizer.json").write_text("{")
    run("train_tokenizer", f"{command} {change}")
    assert (REPLACED in caplog.text) == (told or broken)
    caplog.clear()
    run("train_tokenizer", f"{command} {change}")
    assert REPLACED not in caplog.text


@pytest.mark.parametrize("encoded", [True, False])
def test_texts_are_encoded_trained_saved_loaded_and_continued(run, folder, tmp_path, encoded):
    """From a trained tokenizer to a pipeline that goes on; with the codes on disk, and encoded at the start."""
    data, tokenizer = folder / "texts.parquet", tmp_path / "tokenizer"
    run(
        "train_tokenizer", f"--dataset_name {data} --text_columns title poem --vocab_size 300 --output_dir {tokenizer}"
    )
    source = f"--dataset_name {data}"
    texts = "--segment title=text:title --segment poem=text:poem --block_length 4 --max_text_length 24"
    if encoded:
        codes = tmp_path / "codes"
        run("encode_dataset", f"{source} --text_tokenizer {tokenizer} {texts} --output_dir {codes}")
        source, texts = f"--codes_dir {codes}", ""
    options = "--num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --max_train_steps 3 --train_batch_size 4"
    tasks = "title->poem:2,poem->title,->poem"
    command = (
        f"{source} {texts} --text_tokenizer {tokenizer} --tasks {tasks} {options} --output_dir {tmp_path / 'out'}"
    )
    run("train_vqdit", command)
    pipe = VQDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.transformer.config.segments["poem"]["block_length"] == 4
    assert pipe.transformer.config.segments["poem"]["shared_with"] == "title"
    text = pipe(inputs={"poem": "once upon"}, output="poem", gen_length=12, num_inference_steps=2).texts[0]
    assert text.startswith("once upon")
    assert len(pipe(inputs={"title": TITLES[:2]}, output="poem", gen_length=8, num_inference_steps=1).texts) == 2
    again = f"{source} --pretrained_model_name_or_path {tmp_path / 'out'} --tasks title->poem --max_train_steps 2 "
    segments = "" if encoded else "--segment title=text:title --segment poem=text:poem --max_text_length 24"
    run("train_vqdit", f"{again} {segments} --train_batch_size 4 --output_dir {tmp_path / 'more'}")
    assert "->poem" in VQDiTPipeline.from_pretrained(tmp_path / "more").transformer.config.tasks


def test_poems_are_read_from_an_unpacked_package(run, tmp_path):
    folder = tmp_path / "package" / "tang"
    folder.mkdir(parents=True)
    (folder / "authors.tang.json").write_text("[]")
    good = [
        {"title": f"t{'一' * n}".strip("t"), "paragraphs": ["床前。", "疑是" * n], "author": "李白"}
        for n in range(1, 60)
    ]
    bad = [{"title": "", "paragraphs": ["a"]}, {"title": "二", "paragraphs": ["□。"]}, good[0]]
    (folder / "poet.tang.1000.json").write_text(json.dumps(good[30:]))
    (folder / "poet.tang.0.json").write_text(json.dumps([*good[:30], *bad]))
    (tmp_path / "package" / "poet.tang.0.json").write_text(json.dumps([{"strains": []}]))
    run("prepare_poems", f"--data_dir {tmp_path / 'package'} --output_file {tmp_path / 'poems.parquet'}")
    rows = Dataset.from_parquet(str(tmp_path / "poems.parquet"))
    assert rows["title"] == [one["title"] for one in good] and rows[1]["poem"] == "床前。\n疑是疑是"
    assert set(rows["split"]) <= {"train", "test"} and set(rows["dynasty"]) == {"tang"}


def test_another_folders_tokenizer_loads_as_auto_tokenizer_does(folder, words):
    found = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert token_ids(found, POEMS) == token_ids(words, POEMS)
