"""Scripts with ``--streaming``: they train on the rows that they train on without it, and go on where they stopped."""

import itertools
import json
import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from diffusers_vqdit.pipelines.image_segment import ImageReader
from diffusers_vqdit.training import row_stream, sample_stream
from diffusers_vqdit.training.audio_data import SoundDataset, SoundStream, as_waveform
from diffusers_vqdit.training.data import load_splits, load_training_dataset, take_split
from diffusers_vqdit.training.image_dataset import ImageDataset
from diffusers_vqdit.training.picture_tensors import _Readable
from diffusers_vqdit.training.streamed_images import StreamedImages
from diffusers_vqdit.training.table_files import split_names


QUIET = "--report_to none --validation_steps 0 --max_train_steps 6 --checkpointing_steps 4 --train_batch_size 4"


def go_on(run, name, arguments, tmp_path):
    """Run a script, and again from its checkpoint in the middle; the folders of both."""
    run(name, f"{arguments} --output_dir {tmp_path / 'whole'}")
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    run(name, f"{arguments} --output_dir {tmp_path / 'broken'} --resume_from_checkpoint latest")
    return tmp_path / "whole", tmp_path / "broken"


def assert_same_weights(folders, file):
    first, *others = (load_file(folder / file) for folder in folders)
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], value) for name, value in first.items())


def with_splits(path, files, held_out):
    """The rows of a parquet file as several, with a column that has ``test`` in some rows and nothing in the first."""
    table = pq.read_table(path)
    said = ["test" if row in held_out else "train" for row in range(len(table))]
    table = table.append_column("split", pa.array(["", *said[1:]]))
    path.unlink()
    for number, rows in enumerate(np.array_split(np.arange(len(table)), files)):
        pq.write_table(table.take(rows), path.with_name(f"{path.stem}-{number}.parquet"))
    return f"{path.parent}/{path.stem}-*.parquet"


# ---------------------------------------------------------------------------------------------------------------------
# Latents


@pytest.fixture
def latents(data_sources, image_vq, text_vq, tokenizer, tmp_path):
    """The arguments for pictures of a kind of source."""
    image_vq.save_pretrained(tmp_path / "image_vq")
    text_vq.save_pretrained(tmp_path / "text_vq")
    tokenizer.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    pictures = data_sources.write_pictures(tmp_path / "pictures")

    def arguments(kind):
        source = data_sources.source_of(pictures, tmp_path / kind, kind)
        caption_column, label_column = source["columns"]
        return (
            f"--dataset_name {source['dataset_name']} --cache_dir {tmp_path / 'cache'} --image_column "
            f"{source['image_column']} --label_column {label_column} --caption_columns {caption_column} --random_flip "
            f"--image_vq {tmp_path / 'image_vq'} --text_vq {tmp_path / 'text_vq'} --num_layers 1 "
            f"--num_attention_heads 2 --attention_head_dim 8 --patch_size 1 --resolution 16 {QUIET}"
        )

    return arguments


@pytest.mark.parametrize(
    ("kind", "more"), [("parquet", "--dataloader_num_workers 1"), ("tar", "--max_train_samples 17")]
)
def test_latents_of_a_stream_are_those_of_a_copy(run, latents, tmp_path, monkeypatch, kind, more):
    read, plain = [], row_stream.RowStream._tables

    def tables(self, columns, shard):
        read.append(tuple(columns))
        return plain(self, columns, shard)

    monkeypatch.setattr(row_stream.RowStream, "_tables", tables)
    arguments = f"{latents(kind)} {more}"
    run("train_latent_dit", f"{arguments} --output_dir {tmp_path / 'copied'}")
    assert not read
    folders = go_on(run, "train_latent_dit", f"{arguments} --streaming", tmp_path)
    assert_same_weights([tmp_path / "copied", *folders], "transformer/diffusion_pytorch_model.safetensors")
    configs = [json.loads((folder / "vae" / "config.json").read_text()) for folder in (tmp_path / "copied", *folders)]
    assert configs[0]["latents_mean"] == configs[1]["latents_mean"] == configs[2]["latents_mean"]

    # What is there isn't read again; a run over a copy isn't taken for one over a stream.
    read.clear()
    arguments = f"{arguments} --output_dir {folders[0]} --max_train_steps 7 --resume_from_checkpoint latest"
    run("train_latent_dit", f"{arguments} --streaming")
    assert not read
    with pytest.raises(ValueError, match="streaming=True, which is now False"):
        run("train_latent_dit", arguments)


def test_a_file_of_latents_is_known_by_its_stream(run, latents, data_sources, tmp_path):
    arguments = f"{latents('parquet')} --streaming --latents_file {tmp_path / 'latents.safetensors'} --output_dir"
    run("train_latent_dit", f"{arguments} {tmp_path / 'a'}")
    run("train_latent_dit", f"{arguments} {tmp_path / 'b'}")
    path = tmp_path / "parquet" / "2.parquet"
    pq.write_table(pq.read_table(path), path)  # written again, with whatever in it
    with pytest.raises(ValueError, match="was made with other pictures; delete it or name another"):
        run("train_latent_dit", f"{arguments} {tmp_path / 'c'}")


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("workers", [0, 1])
def test_parts_of_the_pictures_are_found_where_they_lie(data_sources, tmp_path, kind, workers):
    """As each of several processes reads them."""
    source = data_sources.source_of(data_sources.write_pictures(tmp_path / "pictures"), tmp_path / kind, kind)
    column = source["image_column"]
    copied = ImageDataset(load_training_dataset(**source, cache_dir=str(tmp_path / "cache")), column, 8)
    stream = load_training_dataset(**source, streaming=True)
    images = StreamedImages(stream, stream.rows(tmp_path / "rows", [], {column: ImageReader}), column, 8)
    batches = [list(range(start, start + 3)) for start in (3, 6, 21, 33, 36)]  # two are broken
    loader = DataLoader(
        _Readable(images), batch_size=None, sampler=images.with_files(batches), num_workers=workers, collate_fn=tuple
    )
    for rows, (pictures, kept, problems) in zip(batches, loader, strict=True):
        assert kept == [row for row in rows if row not in (7, 30)] and len(kept) + len(problems) == 3
        expected = [copied.pictures[copied.rows.index(row)] for row in kept]
        assert torch.equal(pictures, torch.stack(expected))


# ---------------------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize("more", ["", "--max_train_samples 9 --pack_captions"])
def test_texts_of_a_stream_are_those_of_a_copy(run, tmp_path, caplog, more):
    texts = [[f"caption {row}", f"another of {row % 3}"][: 1 + row % 2] for row in range(20)]
    names = [f"name {row}" for row in range(20)]
    pq.write_table(pa.table({"text": texts, "name": names, "image": [b"x" * 100] * 20}), tmp_path / "t.parquet")
    data = with_splits(tmp_path / "t.parquet", 3, held_out=(3, 8, 17))
    arguments = (
        f"--dataset_name {data} --cache_dir {tmp_path / 'cache'} --caption_columns text name {QUIET} {more} "
        "--tokenizer_vocab_size 300 --num_codes 32 --hidden_size 8"
    )
    run("train_text_vq", f"{arguments} --output_dir {tmp_path / 'copied'}")
    folders = go_on(run, "train_text_vq", f"{arguments} --streaming", tmp_path)
    assert caplog.text.count("1 of 20 rows have nothing in the column 'split'") == 3  # once a run
    assert_same_weights([tmp_path / "copied", *folders], "diffusion_pytorch_model.safetensors")
    tokenizers = [(folder / "tokenizer" / "tokenizer.json").read_bytes() for folder in (tmp_path / "copied", *folders)]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]
    assert "test split" in (folders[0] / "README.md").read_text()
    listed = next((folders[0] / "rows" / "train").glob("*.arrow"))
    assert pa.ipc.open_stream(listed).schema.names == ["text", "name", row_stream.POSITION]

    # The order and the rows are the same, so either goes on with the other's checkpoint.
    arguments = f"{arguments} --output_dir {folders[0]} --max_train_steps 7 --resume_from_checkpoint latest"
    run("train_text_vq", arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Sounds


def sounds_of(data, split="train", **options):
    splits = load_splits(dataset_name=data, streaming=True)
    dataset = SoundStream.open_column(splits, split, "audio")
    return SoundStream(dataset, "audio", 1600, 160, seed=1, source="x", **options)


def test_parts_of_sounds_are_of_the_splits_rows_and_each_comes_once_an_epoch(audio_codecs, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_stream, "WINDOW", 3)
    held_out = (2, 3, 9)
    data = with_splits(audio_codecs.sound_table(tmp_path / "s.parquet", count=13), 3, held_out)
    splits = load_splits(dataset_name=data, cache_dir=str(tmp_path / "cache"))
    for split, count in (("train", 9), ("test", 3)):
        whole = SoundDataset(take_split(splits, split), "audio", 1600)
        assert len(whole) == count
        batches = sounds_of(data, split).batches(count)
        orders = []
        for batch in itertools.islice(batches, 3):
            found = [
                next(
                    number
                    for number, sound in enumerate(map(as_waveform, whole))
                    if any(
                        torch.equal(part[: min(160, len(sound))], one)
                        for one in sound.unfold(0, min(160, len(sound)), 1)
                    )
                    and not part[len(sound) :].any()
                )
                for part in batch
            ]
            assert sorted(found) == list(range(count))
            orders.append(found)
        assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("taken", [0, 1, 2, 4, 5, 9])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
def test_sounds_go_on_with_the_next_one(audio_codecs, tmp_path, monkeypatch, taken, workers, split):
    monkeypatch.setattr(sample_stream, "WINDOW", 3)
    path = audio_codecs.sound_table(tmp_path / "s.parquet", count=13, broken=(4,))
    data = with_splits(path, 3, (2, 3, 9)) if split else str(path)
    whole = list(itertools.islice(sounds_of(data).batches(4), 14))
    first = sounds_of(data)
    batches = first.batches(4, workers)
    for _ in range(taken):
        next(batches)
    again = sounds_of(data)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for index, batch in enumerate(itertools.islice(again.batches(4), 4)):
        assert batch.shape == (4, 160) and torch.equal(batch, whole[taken + index])


def test_processes_share_the_rows_of_a_split(audio_codecs, tmp_path, monkeypatch):
    data = with_splits(audio_codecs.sound_table(tmp_path / "s.parquet", count=13), 3, held_out=(2, 3, 9, 12))
    found = []
    for rank in range(2):
        monkeypatch.setattr(sample_stream, "process_rank", lambda rank=rank: (rank, 2))
        stream = sounds_of(data)
        found.append([value["bytes"] for value, _ in itertools.islice(stream.samples(), 4)])
    assert len({*found[0], *found[1]}) == 8


def test_the_audio_tokenizer_resumes_on_a_stream(run, audio_codecs, tmp_path, caplog, capsys):
    for part in audio_codecs.audio_codec("dac"):
        part.save_pretrained(tmp_path / "dac")
    path = audio_codecs.sound_table(tmp_path / "s.parquet", count=13, broken=(1,))
    data = with_splits(path, 3, held_out=(2, 3, 9))
    arguments = f"--pretrained_model_name_or_path {tmp_path / 'dac'} --crop_length 0.1 --streaming {QUIET}"
    with caplog.at_level(logging.WARNING):
        folders = go_on(run, "train_audio_vq", f"{arguments} --dataset_name {data}", tmp_path)
    assert "skipped sound at position" in caplog.text
    assert_same_weights(folders, "model.safetensors")
    assert "test split" in (folders[0] / "README.md").read_text()
    path = tmp_path / "s-1.parquet"
    pq.write_table(pq.read_table(path), path)
    with pytest.raises(ValueError, match="trained with sounds="):
        run(
            "train_audio_vq",
            f"{arguments} --dataset_name {data} --output_dir {folders[0]} --resume_from_checkpoint latest",
        )


def test_columns_that_are_no_sounds_are_refused(audio_codecs, tmp_path):
    data = str(audio_codecs.sound_table(tmp_path / "s.parquet"))
    for column, told in (("text", "streamed sounds must be bytes"), ("sound", "column 'sound' is not in the data")):
        with pytest.raises(ValueError, match=told):
            SoundStream.open_column(load_splits(dataset_name=data, streaming=True), "train", column)
    with pytest.raises(ValueError, match=r"split='val' is not in the data: it has \['train'\]"):
        sounds_of(data, "val")
    data = with_splits(tmp_path / "s.parquet", 2, held_out=range(8))
    assert split_names(load_splits(dataset_name=data, streaming=True)) == ["test"]
    with pytest.raises(ValueError, match=r"split='train' is not in the data: it has \['test'\]"):
        sounds_of(data)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


ENCODED = {"train_latent_dit": "--image_vq x", "train_text_vq": ""}


@pytest.mark.parametrize("name", ENCODED)
def test_streams_need_the_name_of_a_dataset(script, capsys, name):
    with pytest.raises(SystemExit):
        script(name).parse_args(f"--streaming --train_data_dir x {ENCODED[name]}".split())
    assert "--streaming needs --dataset_name" in capsys.readouterr().err
    assert script(name).parse_args(f"--streaming --dataset_name x {ENCODED[name]}".split()).streaming


@pytest.mark.parametrize("name", ["train_image_vq", "train_audio_vq"])
@pytest.mark.parametrize("given", ["--train_data_dir x", "--dataset_name x", "--dataset_name x --max_train_samples 3"])
def test_streams_without_an_end_need_steps(script, capsys, name, given):
    with pytest.raises(SystemExit):
        script(name).parse_args(f"--streaming {given}".split())
    assert "--streaming needs --dataset_name and --max_train_steps" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_text_vq", "train_audio_vq", "train_latent_dit"])
def test_files_of_their_own_are_not_streamed(run, image_vq, tmp_path, audio_codecs, picture_folder, name):
    image_vq.save_pretrained(tmp_path / "image_vq")
    folder = audio_codecs.sound_folder(tmp_path / "sounds") if name == "train_audio_vq" else picture_folder
    more = f"--image_vq {tmp_path / 'image_vq'}" if name == "train_latent_dit" else ""
    with pytest.raises(ValueError, match="has files of its own, which are read from where they are: leave streaming"):
        run(name, f"--dataset_name {folder} --streaming {QUIET} {more} --output_dir {tmp_path / 'out'}")
