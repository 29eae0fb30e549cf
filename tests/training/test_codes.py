import copy
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusers_vqdit import Task
from diffusers_vqdit.pipelines.segment_base import SegmentColumn
from diffusers_vqdit.pipelines.text_segment import encode_texts
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.utils.decoding import decode_image
from diffusers_vqdit.utils.images import lower_resolution


MORE = {"text_columns": ["kind"], "image_augmentations": 2, "lowres_factor": 2}


@pytest.fixture
def encoded(picture_folder, image_vq, text_vq, tokenizer, tmp_path):
    def encode(folder="codes", change=lambda data: data, **options):
        dataset = change(load_training_dataset(train_data_dir=str(picture_folder), image_column="image"))
        arguments = {
            "resolution": 16,
            "image_vq": image_vq,
            "text_vq": text_vq,
            "tokenizer": tokenizer,
            "image_column": "image",
            "caption_column": "text",
            "label_column": "label",
            "batch_size": 3,
        }
        return dataset, encode_dataset(dataset, tmp_path / folder, **{**arguments, **options})

    return encode


def test_codes_on_disk_are_those_of_the_tokenizers(encoded, image_vq, text_vq, tokenizer):
    dataset, folder = encoded(shard_size=4, prompt_columns=["label"])
    assert len(list(folder.glob("codes-*.arrow"))) == 3
    codes = CodeDataset(folder)
    assert len(codes) == 10 and codes.labels == ["round", "square"]
    assert codes.segments == {
        "image": {"vocab_size": 32, "shape": [4, 4], "centered_positions": True},
        "text": {"vocab_size": 64, "shape": [12]},
        "label": {"vocab_size": 2, "shape": [1]},
    }
    assert codes.entries == {
        "image": {"modality": "image", "tokenizer": "image_vq"},
        "text": {"modality": "text", "tokenizer": "text_vq"},
        "label": {"modality": "label", "names": {"0": "round", "1": "square"}},
    }
    rows = torch.tensor([7, 2])
    given, generated = codes.batch(rows, Task.parse("label->image+text"))
    for index, row in enumerate(rows.tolist()):
        picture = decode_image(dataset[row]["image"], 16)
        picture = ((picture + 1) * 127.5).round() / 127.5 - 1
        assert torch.equal(generated["image"][index], image_vq.encode_codes(picture[None])[0])
        tokens = tokenizer(dataset[row]["text"], padding="max_length", max_length=12, return_tensors="pt")
        assert torch.equal(generated["text"][index], text_vq.encode_codes(tokens.input_ids)[0])
        assert codes.labels[given["label"][index, 0]] == dataset[row]["label"]
    # Given, the text is either wording; generated, always the caption.
    seen = {tuple(codes.batch(torch.tensor([0]), Task.parse("text->image"))[0]["text"][0].tolist()) for _ in range(40)}
    assert len(seen) == 2


def test_more_texts_moved_pictures_and_low_resolution_are_segments_and_variants(encoded, image_vq, text_vq, tokenizer):
    dataset, folder = encoded(change=lambda data: data.add_column("kind", data["label"]), **MORE)
    codes = CodeDataset(folder)
    assert codes.lowres_factor == 2
    assert codes.segments["kind"] == {"vocab_size": 64, "shape": [12], "shared_with": "text"}
    assert codes.entries["image_lowres"] == {
        **{"modality": "image", "tokenizer": "image_vq"},
        **{"lowres_of": "image", "factor": 2},
    }
    assert codes.segments["image_lowres"] == {
        "vocab_size": 32,
        "shape": [4, 4],
        "centered_positions": True,
        "shared_with": "image",
    }
    rows = torch.arange(10)
    given, generated = codes.batch(rows, Task.parse("image+image_lowres->kind"))
    assert torch.equal(generated["kind"], encode_texts(dataset["label"], text_vq, tokenizer))
    pictures = torch.stack([decode_image(value, 16) for value in dataset["image"]])
    pictures = ((pictures + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(given["image_lowres"], image_vq.encode_codes(lower_resolution(pictures, 2)))
    # The picture itself is one of the three that may be given; generated, it is always that one.
    assert codes.prompts["image"].shape == (10, 3, 4, 4)
    assert torch.equal(codes.prompts["image"][:, 0], codes.codes["image"])
    assert not torch.equal(codes.prompts["image"][:, 1], codes.codes["image"])
    assert torch.equal(codes.batch(rows, Task.parse("->image"))[1]["image"], image_vq.encode_codes(pictures))


def test_a_corrupt_picture_is_left_out_with_its_caption(encoded, picture_folder):
    (picture_folder / "4.png").write_bytes(b"")
    dataset, folder = encoded()
    broken = dataset["text"].index("a yellow dot") if isinstance(dataset["text"], list) else 4
    codes = CodeDataset(folder)
    assert len(codes) == 9
    whole = CodeDataset(encoded("texts", image_column=None, image_vq=None)[1])
    kept = [row for row in range(10) if row != broken]
    assert torch.equal(codes.codes["text"], whole.codes["text"][kept])
    assert torch.equal(codes.codes["label"], whole.codes["label"][kept])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": None, "caption_column": None}, "nothing to encode"),
        ({"image_vq": None}, "needs image_vq"),
        ({"tokenizer": None}, "needs text_vq and tokenizer"),
        ({"text_columns": ["label"]}, "'label' can't name a segment"),
        ({"caption_column": None, "text_columns": ["text"]}, "need caption_column"),
        ({"lowres_factor": 3}, "lowres_factor=3 needs image_column, and must divide 16"),
        ({"labels": ["round"]}, r"the labels \['square'\] are not among \['round'\]"),
    ],
)
def test_bad_arguments_are_named(encoded, options, message):
    with pytest.raises(ValueError, match=message):
        encoded(**options)


def test_an_unfinished_folder_is_refused(encoded):
    _, folder = encoded()
    (folder / "segments.json").unlink()
    with pytest.raises(ValueError, match=r"no segments\.json"):
        CodeDataset(folder)


def test_codes_out_of_range_and_unknown_segments_are_named(encoded):
    _, folder = encoded()
    with pytest.raises(ValueError, match="no segment 'sound'"):
        CodeDataset(folder).batch(torch.tensor([0]), Task.parse("sound->image"))
    index = folder / "segments.json"
    index.write_text(index.read_text().replace('"vocab_size": 64', '"vocab_size": 2'))
    with pytest.raises(ValueError, match=r"segment 'text' has codes .* must be in \[0, 2\)"):
        CodeDataset(folder)


def test_codes_know_their_tokenizers_and_data(encoded, image_vq, text_vq, tokenizer):
    _, folder = encoded()
    codes = CodeDataset(folder)
    codes.check_tokenizers(image_vq, text_vq, tokenizer)
    assert codes.settings == {"resolution": 16, "resize_mode": "crop", "image_augmentations": 0}
    assert set(codes.fingerprints) == {"data", "image_vq", "text_vq", "tokenizer"}
    assert CodeDataset(encoded("again")[1]).fingerprints == codes.fingerprints
    other = CodeDataset(encoded("other", change=lambda data: data.select(range(9, -1, -1)))[1])
    assert other.fingerprints["data"] != codes.fingerprints["data"] and other.fingerprint != codes.fingerprint
    with torch.no_grad():
        image_vq.encoder.conv_in.bias[0] += 1e-3
    with pytest.raises(ValueError, match="were made by another image_vq than the one given"):
        codes.check_tokenizers(image_vq, None, tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["apple"])
    with pytest.raises(ValueError, match="were made by another image_vq and tokenizer than"):
        codes.check_tokenizers(image_vq, None, tokenizer)


def test_one_of_several_captions_is_drawn_on_either_side(encoded, text_vq, tokenizer):
    several = [["a dot", "a spot", "a point"], ["green"]] * 5

    def change(data):
        return data.remove_columns("text").add_column("text", several).add_column("more", ["one"] * 10)

    _, folder = encoded(change=change, prompt_columns=["more"], shard_size=4)
    codes = CodeDataset(folder)
    rows = torch.tensor([0, 1] * 300)
    given, generated = (
        codes.batch(rows, Task.parse(task), generator=torch.Generator().manual_seed(0))[side]["text"]
        for side, task in enumerate(["text->image", "image->text"])
    )
    expected = {
        text: encode_texts([text], text_vq, tokenizer)[0] for text in ["a dot", "a spot", "a point", "green", "one"]
    }

    def shares(drawn):
        return {text: float((drawn == code).all(1).float().mean()) for text, code in expected.items()}

    for text, share in shares(given[::2]).items():
        assert share == pytest.approx(0.0 if text == "green" else 0.25, abs=0.13), text
    for text, share in shares(generated[::2]).items():
        assert share == pytest.approx(1 / 3 if text in several[0] else 0.0, abs=0.14), text
    assert shares(generated[1::2])["green"] == 1.0 and shares(given[1::2])["one"] == pytest.approx(0.5, abs=0.15)


def test_a_shard_without_a_readable_picture_is_left_out(encoded, picture_folder, caplog):
    for index in (4, 5, 6, 7):
        (picture_folder / f"{index}.png").write_bytes(b"broken")
    _, folder = encoded(shard_size=2)
    assert len(CodeDataset(folder)) == 6 and len(list(folder.glob("codes-*.arrow"))) == 3
    assert "skipped 4 of 10 pictures" in caplog.text and "5.png" in caplog.text
    for index in range(10):
        (picture_folder / f"{index}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of the 10 pictures could be read"):
        encoded()


def test_labels_keep_the_order_of_a_class_label_and_numbers_sort_as_numbers(encoded):
    from datasets import ClassLabel

    def classes(data):
        return (
            data.remove_columns("label")
            .add_column("label", [2, 0] * 5)
            .cast_column("label", ClassLabel(names=["z", "y", "a"]))
        )

    codes = CodeDataset(encoded(change=classes)[1])
    assert codes.labels == ["z", "y", "a"] and codes.codes["label"][:2, 0].tolist() == [2, 0]
    numbers = CodeDataset(encoded(change=lambda d: d.remove_columns("label").add_column("label", [10, 9] * 5))[1])
    assert numbers.labels == ["9", "10"] and numbers.codes["label"][:2, 0].tolist() == [1, 0]


@pytest.mark.parametrize(
    "names", [["square", "oval", "round"], ["a", "round", "b", "square"], ["round", "square", "c"]]
)
def test_labels_are_read_by_name_as_others_codes(encoded, names):
    folder, rows, task = encoded()[1], torch.tensor([7, 2, 7]), Task.parse("label->image")
    codes, before = CodeDataset(folder), CodeDataset(folder)
    codes.rename_labels("label", codes.labels, names)
    (read, pictures), (own, others) = (one.batch(rows, task) for one in (codes, before))
    assert [names[code] for code in read["label"][:, 0]] == [before.labels[code] for code in own["label"][:, 0]]
    assert codes.codes["label"].tolist() == [[names.index(before.labels[code])] for [code] in before.codes["label"]]
    assert torch.equal(pictures["image"], others["image"]) and codes.identity() == before.identity()
    assert codes.labels == names and codes.segments["label"] == {"vocab_size": len(names), "shape": [1]}
    assert codes.entries["label"]["names"] == {str(code): name for code, name in enumerate(names)}


def test_texts_that_are_cut_are_counted_once(encoded, caplog):
    folder = encoded(change=lambda d: d.remove_columns("text").add_column("text", ["long " * 30] * 10), shard_size=3)[
        1
    ]
    note = f"10 of 10 captions have more than max_length=12 tokens and are cut; the first is '{'long ' * 11}long..."
    assert [r.message for r in caplog.records if "are cut" in r.message] == [note]
    assert note in CodeDataset(folder).notes  # for those who train on them


@pytest.mark.parametrize(
    "options", [{}, {"resolution": 8}, {"max_audio_length": 3.0, "audio_codebooks": None}], ids=str
)
def test_a_column_of_several_segments_is_encoded_once(encoded, text_vq, monkeypatch, caplog, options):
    """Whatever options they have that are others' kinds of columns."""
    rows, real = [], text_vq.encode_codes

    def encode_codes(input_ids, attention_mask=None):
        rows.append(len(input_ids))
        return real(input_ids, attention_mask)

    monkeypatch.setattr(text_vq, "encode_codes", encode_codes)
    segments = {"document": SegmentColumn("text", "text", options=options)}
    codes = CodeDataset(
        encoded(change=lambda d: d.remove_columns("text").add_column("text", ["long " * 30] * 10), segments=segments)[
            1
        ]
    )
    assert sum(rows) == 10 and torch.equal(codes.codes["document"], codes.codes["text"])
    assert sum("are cut" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_are_cropped_are_counted_once(image_vq, tmp_path, caplog, workers, streaming):
    images = []
    for size in [(20, 20)] * 3 + [(20, 19), (40, 20), (20, 40), (24, 20)]:  # 5 % of the fourth is lost, and no more
        Image.new("RGB", size, (200, 10, 10)).save(file := io.BytesIO(), "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    images.append({"bytes": b"broken", "path": None})

    def warnings(rows, **options):
        caplog.clear()
        pq.write_table(pa.table({"image": images[rows]}), tmp_path / "x.parquet")
        source = {"dataset_name": f"{tmp_path}/x.parquet", "cache_dir": f"{tmp_path}/cache", "image_column": "image"}
        dataset = load_training_dataset(**source, streaming=streaming)
        options = {"image_vq": image_vq, "image_column": "image", "resolution": 16, "shard_size": 3, **options}
        encode_dataset(dataset, tmp_path / "codes", batch_size=2, dataloader_num_workers=workers, **options)
        return [record.message for record in caplog.records if "resize_mode" in record.message]

    (told,) = warnings(slice(None), resize_mode="crop")
    assert told.startswith("resize_mode='crop' takes more than 5% of the area off 3 of 8 pictures")
    assert "--resize_mode auto" in told
    assert not warnings(slice(4), resize_mode="crop") and not warnings(slice(None), resize_mode="auto")
    (told,) = warnings(slice(None), resize_mode="crop", resolution=0, aspect_ratio_buckets=[[16, 16], [16, 32]])
    assert "off 2 of 8 pictures" in told  # the one of 40 by 20 fits a bucket
