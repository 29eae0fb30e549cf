"""States of captions on disk: what they were made of, and that a run over latents needs no encoder after the start."""

import hashlib
import itertools
import json
import os
import signal

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from diffusers_vqdit import VQDiTLatentPipeline
from diffusers_vqdit.training import caption_states
from diffusers_vqdit.training.caption_states import CaptionStates, _digest, cache_captions
from diffusers_vqdit.training.columns import number_texts
from diffusers_vqdit.training.state_files import StatesColumn, write_states
from diffusers_vqdit.utils.distributed import process_rank


WORDS = ["a red box", "a blue box and a green dot", "pink", "a dot in a box", "green"]


@pytest.fixture
def made(encoders, tmp_path):
    """Makes a cache; by default of the same captions, encoder and file."""
    tokenizer = encoders.text_tokenizer(WORDS * 3)

    def make(texts=WORDS, kind="t5", length=9, kept=True):
        path, encoder = tmp_path / "states.arrow", encoders.text_encoder(kind)
        columns = [[[text] for text in texts]]
        return cache_captions(encoder, tokenizer, columns, length, path, kept=kept, device="cpu", batch_size=2)

    make.tokenizer = tokenizer
    return make


def test_states_are_those_of_each_text_alone(made, encoders, tmp_path):
    states, encoder = made([*WORDS, *WORDS]), encoders.text_encoder("t5")
    assert len(states.column) == len(WORDS)
    batch = states.draw(torch.tensor([6, 2]))
    assert batch.states.dtype == torch.float16 and batch.mask.sum(1).tolist() == [9, batch.mask[1].sum()]
    for row, text in enumerate((WORDS[1], WORDS[2])):
        ids = made.tokenizer(text, truncation=True, max_length=9, return_tensors="pt").input_ids
        alone = encoder(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(batch.states[row][batch.mask[row]].float(), alone, atol=2e-3, rtol=2e-3)
    # Read again, not made again.
    before = (tmp_path / "states.arrow").stat().st_mtime_ns
    rows = torch.arange(len(WORDS))
    assert torch.equal(made().draw(rows).states, states.draw(rows + len(WORDS)).states)
    assert (tmp_path / "states.arrow").stat().st_mtime_ns == before


def test_captions_are_drawn_evenly_from_columns_and_lists():
    captions = {"en": [["a"], ["b", "c", "d"]], "zh": [["e"], ["a"]]}
    numbers, is_first = number_texts(list(captions.values()))
    column = pa.chunked_array(
        [[[[float(number)]] for number in range(sum(is_first))]], pa.list_(pa.list_(pa.float16()))
    )
    states, generator = CaptionStates(StatesColumn(column, 1), numbers), torch.Generator().manual_seed(0)
    drawn = torch.stack([states.draw(torch.tensor([1, 0]), generator).states.flatten() for _ in range(2000)])
    for index, expected in enumerate(({"b": 1 / 6, "c": 1 / 6, "d": 1 / 6, "a": 1 / 2}, {"a": 1 / 2, "e": 1 / 2})):
        share = {text: (drawn[:, index] == number).float().mean().item() for number, text in enumerate("abcde")}
        for text in "abcde":
            assert share[text] == pytest.approx(expected.get(text, 0), abs=0.06), text  # five standard deviations


def test_the_identity_is_that_of_the_list_of_all_texts():
    texts = ["a", "红", 'a "b"', ""]
    assert _digest(texts) == hashlib.sha256(json.dumps(texts).encode()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "bert"}, "was made with other text encoder"),
        ({"texts": WORDS[1:]}, "was made with other captions"),
        ({"length": 8}, "was made with other max_sequence_length"),
    ],
)
def test_a_file_of_something_else_is_refused_where_it_is_to_be_kept(made, changes, message):
    made()
    with pytest.raises(ValueError, match=f"states_file=.* {message}; delete it or name another"):
        made(**changes)
    assert made(**changes, kept=False).draw(torch.tensor([1])).states.ndim == 3


def test_a_damaged_or_unfinished_file_is_refused(made, tmp_path):
    made()
    path, index = tmp_path / "states.arrow", tmp_path / "states.arrow.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its SHA-256"):
        made()
    index.unlink()
    with pytest.raises(ValueError, match="is not complete"):
        made()
    made(kept=False)
    assert json.loads(index.read_text())["max_sequence_length"] == "9"
    made()


@pytest.fixture
def encoded(monkeypatch, tmp_path):
    """The file that lists encoded texts; with `killed` beside it, the last rank ends at its fourth batch."""
    monkeypatch.setattr(caption_states, "PART_BATCHES", 2)
    encode, batches = caption_states.encode_captions, itertools.count(1)

    def listed(encoder, tokenizer, texts, *options):
        if (tmp_path / "killed").exists() and process_rank()[0] == process_rank()[1] - 1 and next(batches) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(tmp_path / "encoded.txt", "a") as file:
            file.writelines(f"{text}\n" for text in texts)
        return encode(encoder, tokenizer, texts, *options)

    monkeypatch.setattr(caption_states, "encode_captions", listed)
    return tmp_path / "encoded.txt"


MANY = [f"{WORDS[number % 5]} {number}" for number in range(23)]  # six parts of two batches of two


@pytest.mark.parametrize(("first", "second"), [(2, 2), (1, 2), (2, 1)])
def test_a_killed_run_goes_on_with_the_parts_it_lacks(made, encoded, in_processes, tmp_path, first, second):
    path, index = tmp_path / "states.arrow", tmp_path / "states.arrow.json"
    made([*MANY, *MANY])
    whole, said = path.read_bytes(), index.read_bytes()
    assert encoded.read_text().split("\n")[:-1] == MANY
    assert not list(tmp_path.glob(".unfinished*"))
    path.unlink()
    index.unlink()
    (tmp_path / "killed").touch()
    assert in_processes(lambda rank: made(MANY), first)[-1] == -signal.SIGKILL
    assert not path.exists()
    (tmp_path / "killed").unlink()
    encoded.unlink()
    assert in_processes(lambda rank: made(MANY), second) == [0] * second
    assert path.read_bytes() == whole and index.read_bytes() == said
    # The last of two processes had finished its first part of three, the other one all of its own.
    left = MANY[12:16] + MANY[20:] if first == 2 else MANY[4:]
    assert sorted(encoded.read_text().split("\n")[:-1]) == sorted(left)
    assert not list(tmp_path.glob(".unfinished*"))


def test_the_file_is_that_of_all_batches_one_after_the_other(made, encoders, tmp_path):
    states = made(MANY)

    def batches():
        for start in range(0, len(MANY), 2):
            rows = range(start, min(start + 2, len(MANY)))
            yield {"captions": [states.column.variants(row) for row in rows]}

    write_states(tmp_path / "plain.arrow", ["captions"], batches())
    assert (tmp_path / "plain.arrow").read_bytes() == (tmp_path / "states.arrow").read_bytes()


def test_processes_refuse_a_file_of_something_else_together(made, in_processes, tmp_path):
    made()
    told = tmp_path / "told"

    def refused(rank):
        with pytest.raises(ValueError, match="states_file=.* was made with other max_sequence_length"):
            made(length=8)
        told.with_suffix(f".{rank}").touch()

    assert in_processes(refused) == [0, 0]
    assert len(list(tmp_path.glob("told.*"))) == 2


def test_a_run_over_latents_reads_states(script, encoders, image_vq, picture_folder, tmp_path, caplog):
    """From an encoder of transformers; cut captions are told once; encoded or read, the weights are the same."""
    image_vq.save_pretrained(tmp_path / "image_vq")
    encoders.save(tmp_path / "clip", encoders.whole_clip(), encoders.text_tokenizer(WORDS * 3))
    arguments = (
        f"--train_data_dir {picture_folder} --image_vq {tmp_path / 'image_vq'} --text_encoder {tmp_path / 'clip'} "
        "--caption_columns text --num_layers 1 --num_attention_heads 2 --attention_head_dim 16 --patch_size 1 "
        "--report_to none --train_batch_size 4 --max_train_steps 3 --max_sequence_length 5 --validation_steps 0"
    )
    module = script("train_latent_dit")
    for name, more in (("one", ""), ("two", f"--states_file {tmp_path / 's.arrow'}")):
        module.main(module.parse_args(f"{arguments} {more} --output_dir {tmp_path / name}".split()))
    assert (tmp_path / "one" / "caption_states.arrow").is_file()
    told = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert len(told) == 2 and all("captions have more than max_sequence_length=5" in one for one in told)
    with pytest.MonkeyPatch.context() as patch:  # read, so that nothing is encoded
        patch.setattr("diffusers_vqdit.training.caption_states.encode_captions", None)
        more = f"--states_file {tmp_path / 's.arrow'} --output_dir {tmp_path / 'three'}"
        module.main(module.parse_args(f"{arguments} {more}".split()))
    weights = [
        load_file(tmp_path / n / "transformer/diffusion_pytorch_model.safetensors") for n in ("one", "two", "three")
    ]
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())
    pipe = VQDiTLatentPipeline.from_pretrained(tmp_path / "one")
    assert pipe.config.max_sequence_length == 5 and type(pipe.text_encoder).__name__ == "CLIPTextModel"
    assert pipe("a red box", negative_prompt="green", num_inference_steps=1).images[0].size == (16, 16)
    changed = arguments.replace("length 5", f"length 6 --states_file {tmp_path / 's.arrow'}")
    with pytest.raises(ValueError, match="states_file=.* was made with other max_sequence_length"):
        module.main(module.parse_args(f"{changed} --output_dir {tmp_path / 'x'}".split()))
