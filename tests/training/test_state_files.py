"""Files of states: what is written comes back, row by row, from where it lies; what is damaged is named."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from diffusers_vqdit.pipelines.segment_base import SegmentColumn
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.state_files import StatesColumn, read_states, split_padded, write_states


WORDS = ["a red box", "a blue box and a green dot", "pink", "a dot in a box", "green"]


def rows(count, channels=3):
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, 6, (count, 2), generator=generator).tolist()
    return [
        [torch.randn(length, channels, generator=generator).half() for _ in range(variants)]
        for length, variants in sizes
    ]


@pytest.mark.parametrize("batches", [[4, 1, 3], [1], [7]])
def test_rows_come_back_whatever_batches_they_were_written_in(tmp_path, batches):
    every = [rows(count) for count in batches]
    write_states(tmp_path / "s.arrow", ["a", "b"], ({"a": part, "b": part[::-1]} for part in every))
    table = read_states(tmp_path / "s.arrow", {"a": 3, "b": 3}, sum(batches))
    column, wanted = StatesColumn(table["a"], 3), [row for part in every for row in part]
    assert len(column) == len(wanted)
    for index, variants in enumerate(wanted):
        found = column.variants(index)
        assert len(found) == len(variants) and all(map(torch.equal, found, variants))


def test_rows_stay_on_disk(tmp_path):
    """A row of a file of 64 MB is read without the rest."""
    part = [[torch.zeros(1024, 64).half()] for _ in range(64)]
    write_states(tmp_path / "s.arrow", ["a"], ({"a": part} for _ in range(8)))
    before = pa.total_allocated_bytes()
    column = StatesColumn(read_states(tmp_path / "s.arrow", {"a": 64})["a"], 64)
    drawn = column.draw(torch.tensor([500, 3]))
    assert drawn.states.shape == (2, 1024, 64) and drawn.mask is None
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_variant_is_drawn_by_the_row_and_padding_is_masked(tmp_path):
    part = rows(16)
    write_states(tmp_path / "s.arrow", ["a"], [{"a": part}])
    column = StatesColumn(read_states(tmp_path / "s.arrow", {"a": 3})["a"], 3)
    chosen = torch.tensor([3, 9, 11])
    generators = [torch.Generator().manual_seed(row) for row in chosen.tolist()]
    drawn = column.draw(chosen, generators)
    for place, row in enumerate(chosen.tolist()):
        alone = column.draw(torch.tensor([row]), [torch.Generator().manual_seed(row)])
        own = drawn.states[place] if drawn.mask is None else drawn.states[place][drawn.mask[place]]
        assert torch.equal(own, alone.states[0])
        assert any(torch.equal(own, one) for one in part[row])
    many = {
        column.draw(torch.tensor([r]), torch.Generator().manual_seed(s)).states.sum().item()
        for r in [max(range(16), key=lambda r: len(part[r]))]
        for s in range(40)
    }
    assert len(many) == max(len(row) for row in part)
    given, masks = split_padded({"a": drawn, "b": torch.zeros(3, 2)})
    assert torch.equal(given["a"], drawn.states) and set(masks) <= {"a"} and given["b"].shape == (3, 2)


@pytest.fixture
def folder(encoders, image_vq, tmp_path):
    pixels = [np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8) for i in range(7)]
    data = {"image": [Image.fromarray(one) for one in pixels], "words": [WORDS[i % 5] for i in range(7)]}
    features = datasets.Features({"image": datasets.Image(decode=False), "words": datasets.Value("string")})
    columns = {"prompt": SegmentColumn("states", "words", encoders.text_encoder("t5"), encoders.text_tokenizer(WORDS))}
    dataset = datasets.Dataset.from_dict(data, features=features)
    options = {"image_vq": image_vq, "image_column": "image", "resolution": 16, "shard_size": 4}
    return encode_dataset(dataset, tmp_path / "codes", segments=columns, **options)


def test_states_lie_beside_the_codes_of_their_shard(folder, encoders):
    assert sorted(path.name for path in folder.iterdir()) == [
        *("codes-00000.arrow", "codes-00001.arrow", "segments.json"),
        *("states-00000.arrow", "states-00001.arrow"),
    ]
    codes = CodeDataset(folder)
    assert set(codes.codes) == {"image"} and len(codes.states["prompt"]) == len(codes) == 7
    given, _ = codes.batch(torch.tensor([1, 6]), Task.parse("prompt->image"))
    encoder, tokenizer = encoders.text_encoder("t5"), encoders.text_tokenizer(WORDS)
    alone = encoder(**tokenizer(WORDS[1], return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(given["prompt"].states[0].float(), alone, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match=r"generates \['prompt'\]: states of an encoder are given"):
        codes.batch(torch.tensor([0]), Task.parse("image->prompt"))
    codes.check_tokenizers(text_encoder=encoder)
    with pytest.raises(ValueError, match="made by another text_encoder"):
        codes.check_tokenizers(text_encoder=encoders.text_encoder("bert"))


def damaged(folder):
    data = bytearray((folder / "states-00001.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "states-00001.arrow").write_bytes(data)


def unlisted(folder):
    (folder / "states-00002.arrow").write_bytes(b"")


def without_entry(folder):
    index = json.loads((folder / "segments.json").read_text())
    del index["shards"][1]["states"]
    (folder / "segments.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "states-00001.arrow").unlink(), r"shards states-00001.arrow are missing"),
        (damaged, r"shards states-00001.arrow are damaged"),
        (unlisted, r"shards states-00002.arrow are not listed"),
        (without_entry, "shards=.* must be file, rows and sha256"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        CodeDataset(folder)


def test_states_alone_and_states_beyond_float16_are_refused(encoders, tmp_path):
    dataset = datasets.Dataset.from_dict({"words": WORDS})
    encoder, tokenizer = encoders.text_encoder("t5"), encoders.text_tokenizer(WORDS)
    column = SegmentColumn("states", "words", encoder, tokenizer)
    with pytest.raises(ValueError, match=r"\['prompt'\] are states of encoders, which are only given: add"):
        encode_dataset(dataset, tmp_path / "x", segments={"prompt": column})
    encoder.encoder.final_layer_norm.weight.data *= 1e6
    data = dataset.add_column("kind", [i % 2 for i in range(5)])
    segments = {"prompt": column, "kind": SegmentColumn("label", "kind")}
    with pytest.raises(ValueError, match="column 'words': the encoder's states reach .* kept in float16, up to 65504"):
        encode_dataset(data, tmp_path / "x", segments=segments)
    assert not (tmp_path / "x" / "segments.json").exists()
