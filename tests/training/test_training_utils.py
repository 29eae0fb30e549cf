import argparse
import io
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_vqdit import VQDiTTransformer2DModel
from diffusers_vqdit.training.arguments import tracker_config
from diffusers_vqdit.training.data import decode_images, load_training_dataset, shuffled_batches
from diffusers_vqdit.training.metrics import code_usage, psnr, ssim
from diffusers_vqdit.training.optimization import parameter_groups, set_dropout
from diffusers_vqdit.utils.decoding import decode_image
from diffusers_vqdit.utils.texts import check_captions


def test_an_image_folder_loads_with_captions_and_labels(picture_folder):
    dataset = load_training_dataset(
        train_data_dir=str(picture_folder), columns=["text", "label"], image_column="image"
    )
    assert len(dataset) == 10 and "a red apple" in dataset["text"]
    pictures, rows = decode_images(dataset, "image", 16)
    assert pictures.shape == (10, 3, 16, 16) and pictures.dtype == torch.uint8 and rows == list(range(10))


def test_a_corrupt_file_is_skipped_with_its_name(picture_folder, caplog):
    (picture_folder / "3.png").write_bytes(b"no picture at all")
    (picture_folder / "5.png").write_bytes((picture_folder / "5.png").read_bytes()[:60])
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image")
    pictures, rows = decode_images(dataset, "image", 16)
    assert len(pictures) == len(rows) == 8
    assert "3.png" in caplog.text and "5.png" in caplog.text and "skipped 2 of 10" in caplog.text


@pytest.mark.parametrize(
    "error",
    [OSError("x"), ValueError("x"), SyntaxError("x"), AttributeError("x"), MemoryError("x"), struct.error("x")]
    + [Image.DecompressionBombError("x"), RecursionError("x"), OverflowError("x"), ZeroDivisionError("x")],
)
def test_whatever_a_picture_raises_it_is_skipped(picture_folder, caplog, monkeypatch, error):
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image")
    read = decode_image

    def broken(value, *args, **options):
        if Path(value["path"]).stem in "24":
            raise error
        return read(value, *args, **options)

    monkeypatch.setattr("diffusers_vqdit.training.data.decode_image", broken)
    assert decode_images(dataset, "image", 16)[1] == [0, 1, 3, 5, 6, 7, 8, 9]
    assert "2.png" in caplog.text and type(error).__name__ in caplog.text and "skipped 2 of 10" in caplog.text


def test_many_broken_pictures_are_named_up_to_twenty(caplog):
    import pyarrow as pa
    from datasets import Dataset
    from datasets import Image as ImageFeature

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    values = [{"bytes": buffer.getvalue(), "path": None}, None, {"bytes": None, "path": None}]
    values += [{"bytes": b"broken", "path": f"{index}.png"} for index in range(40)]
    column = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    dataset = Dataset(pa.table({"image": column})).cast_column("image", ImageFeature(decode=False))
    pictures, rows = decode_images(dataset, "image", 4)
    assert rows == [0] and pictures.shape == (1, 3, 4, 4)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 21 and messages[-1] == "skipped 42 of 43 pictures that could not be read"
    assert "in row 1: " in messages[0] and "in row 2: " in messages[1] and "0.png: " in messages[2]
    with pytest.raises(ValueError, match="column 'image': none of the 42 pictures could be read"):
        decode_images(dataset.select(range(1, 43)), "image", 4)


def test_the_split_column_selects_rows(root):
    path = str(root / "training/data/emoji.parquet")
    train = load_training_dataset(dataset_name=path, columns=["text"])
    test = load_training_dataset(dataset_name=path, split="test", max_samples=7)
    assert len(train) == 3479 and len(test) == 7 and set(test["split"]) == {"test"}
    with pytest.raises(ValueError, match=r"split='dev' is not .*\['test', 'train'\]"):
        load_training_dataset(dataset_name=path, split="dev")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either dataset_name or train_data_dir"),
        ({"train_data_dir": "no/such/folder"}, "'no/such/folder' is not a folder"),
        ({"dataset_name": "none.parquet"}, "'none.parquet': there is no such file"),
    ],
)
def test_bad_sources_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        load_training_dataset(**options)


def test_a_missing_column_is_named_with_those_there(picture_folder):
    with pytest.raises(ValueError, match="column 'caption' is not in the data: it has .*'text'"):
        load_training_dataset(train_data_dir=str(picture_folder), columns=["caption"])


def test_missing_captions_are_counted_and_placed():
    with pytest.raises(ValueError, match=r"'text': 2 rows have no caption, the first are rows \[1, 3\]"):
        check_captions(["a", None, "b", "  "], "text")


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    picture = decode_image({"bytes": None, "path": str(tmp_path / "clear.png")}, 4)
    assert torch.equal(picture, torch.ones(3, 4, 4))


def test_batches_cover_each_epoch_and_resume_where_they_were():
    batches = shuffled_batches(10, 4, seed=1)
    seen = torch.cat([next(batches) for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    resumed = shuffled_batches(10, 4, seed=1, start=3)
    assert torch.equal(next(resumed), seen[12:16])
    ranks = [next(shuffled_batches(10, 2, seed=1, rank=rank, world_size=2)) for rank in range(2)]
    assert torch.equal(torch.cat(ranks), seen[:4])


def test_trackers_get_what_they_take():
    args = argparse.Namespace(
        steps=3, rate=0.5, name="x", prompts=["a", "b"], folder=Path("out"), hub_token=None, on=True
    )
    expected = {"steps": 3, "rate": 0.5, "name": "x", "prompts": "['a', 'b']", "folder": "out"}
    assert tracker_config(args) == {**expected, "on": True}


def test_decay_is_for_matrices_only(transformer):
    decayed, plain = parameter_groups(transformer, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    names = {id(p): name for name, p in transformer.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "embedding" not in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_psnr_and_ssim():
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    shifted = picture.clone() * 0.9
    error = (shifted - picture).square().mean((1, 2, 3))
    torch.testing.assert_close(psnr(shifted, picture), 10 * torch.log10(4 / error))
    torch.testing.assert_close(ssim(picture, picture), torch.ones(2))
    noise = (picture + 0.5 * torch.randn_like(picture)).clamp(-1, 1)
    assert (ssim(noise, picture) < ssim(shifted, picture)).all() and (ssim(noise, picture) < 0.95).all()
    # Two constant pictures: only the first factor of the formula is left.
    one, other = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.1)
    c1 = (0.01 * 2) ** 2
    assert ssim(one, other).item() == pytest.approx((2 * 0.5 * 0.1 + c1) / (0.5**2 + 0.1**2 + c1), rel=1e-4)


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


def test_code_usage():
    usage, perplexity = code_usage(torch.tensor([0, 0, 1, 1]), 4)
    assert usage == 0.5 and perplexity == pytest.approx(2.0)


def test_the_emoji_dataset_is_what_its_readme_says(root):
    from datasets import load_dataset

    data = load_dataset("parquet", data_files=str(root / "training/data/emoji.parquet"), split="train")
    rows = data.remove_columns("image").to_pandas()
    assert rows.held_out.value_counts().to_dict() == {"": 3479, "composition": 236, "picture": 71}
    assert len(set(rows.label)) == 10
    train, held = rows[rows.split == "train"], rows[rows.held_out == "composition"]
    assert set(held.emoji) <= set(train.emoji)  # every role is known,
    assert set(held.skin_tone.str.split("+").explode()) <= set(train.skin_tone.str.split("+").explode())  # every tone,
    for column in ("text", "text_zh", "phrase"):  # and never the two together
        assert not set(held[column]) & set(train[column])
