"""Pictures of several aspect ratios in training: sorted into buckets, encoded, and in batches of one bucket."""

import argparse
import io
import json
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusers_vqdit import Task, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.segment_base import SegmentColumn
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.finetuning import extend_entries, extend_transformer
from diffusers_vqdit.training.row_order import bucket_batches, shuffled_batches
from diffusers_vqdit.training.segment_columns import bucket_sizes
from diffusers_vqdit.training.setup import run_batches
from diffusers_vqdit.utils.fitting import resize_image
from diffusers_vqdit.utils.images import lower_resolution


BUCKETS = [[16, 16], [24, 12], [12, 24]]
SIZES = [(20, 20), (40, 21), (18, 40), (30, 16), (17, 18), (11, 40), (90, 10), (20, 20)]  # height, width
EXPECTED = [0, 1, 2, 1, 0, 2, 1, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The flag


def test_the_flag_has_the_format_of_dreambooth():
    assert bucket_sizes("32,32;24,40;40,24") == bucket_sizes(" 32, 32; 24,40;40,24;") == [[32, 32], [24, 40], [40, 24]]


@pytest.mark.parametrize("text", ["", ";", "32", "32,32;24", "32x32", "-8,8", "8,8.0", "8,8,8", "0,8", "8,8;16,16"])
def test_another_format_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="value"):
        bucket_sizes(text)


# ---------------------------------------------------------------------------------------------------------------------
# Codes


@pytest.fixture
def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


@pytest.fixture
def encode(pictures, image_vq, text_vq, tokenizer, tmp_path):
    def encode(folder="codes", rows=range(8), **options):
        data = {"image": [pictures[row] for row in rows], "text": [f"a {SIZES[row][0]} box" for row in rows]}
        data["other"] = [pictures[(row + 1) % len(SIZES)] for row in rows]  # of another size than the first
        features = {"image": datasets.Image(), "other": datasets.Image(), "text": datasets.Value("string")}
        dataset = datasets.Dataset.from_dict(data, features=datasets.Features(features))
        for column in ("image", "other"):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        given = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer, "image_column": "image"}
        given |= {"caption_column": "text", "aspect_ratio_buckets": BUCKETS, "batch_size": 2}
        return encode_dataset(dataset, tmp_path / folder, **{**given, **options})

    return encode


def codes_of(vq, pictures, size, resize_mode="crop", change=lambda x: x):
    pixels = [np.array(resize_image(one, tuple(size), resize_mode)) for one in pictures]
    return vq.encode_codes(change(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1))


@pytest.mark.parametrize("resize_mode", ["crop", "pad"])
def test_each_picture_is_encoded_in_its_bucket(encode, pictures, image_vq, resize_mode):
    segments = {"sketch": SegmentColumn("image", "other", image_vq, options={})}
    options = {"resize_mode": resize_mode, "lowres_factor": 2, "image_augmentations": 2, "shard_size": 5}
    folder = encode(segments=segments, **options)
    codes, index = CodeDataset(folder), json.loads((folder / "segments.json").read_text())
    assert len(codes) == 8 and codes.segments["image"]["shape"] == [4, 4]
    assert codes.segments["sketch"]["shared_with"] == "image"
    for name in ("image", "image_lowres", "sketch"):
        assert codes.entries[name]["buckets"] == [[4, 4], [6, 3], [3, 6]]
    assert codes.settings == {"resize_mode": resize_mode, "image_augmentations": 2, "aspect_ratio_buckets": BUCKETS}
    # Each chunk of five rows has a shard a bucket.
    order = [
        row for chunk in (range(5), range(5, 8)) for bucket in range(3) for row in chunk if EXPECTED[row] == bucket
    ]
    assert [shard["bucket"] for shard in index["shards"]] == [0, 1, 2, 0, 1, 2]
    assert codes.buckets.tolist() == [EXPECTED[row] for row in order]
    task = Task.parse("image_lowres->image+sketch+text")
    for bucket, size in enumerate(BUCKETS):
        rows = (codes.buckets == bucket).nonzero().flatten()
        own = [pictures[order[row]] for row in rows]
        other = [pictures[(order[row] + 1) % len(SIZES)] for row in rows]
        known, made = codes.batch(rows, task)
        assert torch.equal(made["image"], codes_of(image_vq, own, size, resize_mode))
        assert torch.equal(made["sketch"], codes_of(image_vq, other, size, resize_mode))
        lowered = codes_of(image_vq, own, size, resize_mode, lambda x: lower_resolution(x, 2))
        assert torch.equal(known["image_lowres"], lowered) and made["text"].shape == (len(rows), 12)
        seen = {codes.batch(rows[:1], Task.parse("image->text"))[0]["image"].numpy().tobytes() for _ in range(40)}
        assert made["image"][:1].numpy().tobytes() in seen and 1 < len(seen) <= 3
    with pytest.raises(ValueError, match=r"rows=\[0, 2\] are of the buckets \[0, 1\]: a batch has rows of one"):
        codes.batch(torch.tensor([0, 2]), task)


def test_one_bucket_is_a_grid_that_is_not_square(encode, pictures, image_vq):
    codes = CodeDataset(encode(aspect_ratio_buckets=[(24, 12)]))
    assert codes.segments["image"]["shape"] == [6, 3] and codes.buckets is None
    made = codes.batch(torch.arange(8), Task.parse("->image"))[1]["image"]
    assert torch.equal(made, codes_of(image_vq, pictures, (24, 12)))


def test_residual_codes_have_buckets_too(encode, image_vq, pictures):
    own = {name: image_vq.config[name] for name in ("block_out_channels", "norm_num_groups", "latent_channels")}
    kinds = {name: image_vq.config[name] for name in ("down_block_types", "up_block_types", "num_vq_embeddings")}
    residual = type(image_vq)(**own, **kinds, quantizer_type="rvq", num_quantizers=2, sample_size=16).eval()
    codes = CodeDataset(encode(image_vq=residual))
    assert codes.segments["image"]["shape"] == [4, 4, 2] and codes.entries["image"]["buckets"][1] == [6, 3]
    rows = (codes.buckets == 1).nonzero().flatten()
    own = [pictures[row] for row in range(8) if EXPECTED[row] == 1]
    assert torch.equal(codes.batch(rows, Task.parse("->image"))[1]["image"], codes_of(residual, own, BUCKETS[1]))


def test_without_the_flag_nothing_says_so(encode):
    folder = encode(aspect_ratio_buckets=None, resolution=16)
    assert "bucket" not in (folder / "segments.json").read_text() and CodeDataset(folder).buckets is None


def test_a_broken_picture_and_an_empty_bucket(encode, image_vq, tmp_path, caplog):
    codes = CodeDataset(encode(rows=[0, 1, 3, 4]))
    assert codes.buckets.tolist() == [0, 0, 1, 1] and "bucket [12, 24]: 0 rows" in caplog.text
    broken = datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}, {"bytes": png(9, 3), "path": None}]})
    broken = broken.cast_column("image", datasets.Image(decode=False))
    options = {"image_vq": image_vq, "image_column": "image", "aspect_ratio_buckets": BUCKETS}
    codes = CodeDataset(encode_dataset(broken, tmp_path / "broken", **options))
    assert codes.buckets.tolist() == [1] and "skipped 1 of 2 pictures" in caplog.text


def png(height, width):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"aspect_ratio_buckets": [[16, 16], [24, 14]]},
            r"aspect_ratio_buckets: \[24, 14\] must be a multiple of \[4, 4",
        ),
        ({"aspect_ratio_buckets": [[16, 16], [20, 12]], "lowres_factor": 8}, r"\[20, 12\] must be .* lowres_factor=8"),
        ({"aspect_ratio_buckets": []}, r"aspect_ratio_buckets=\[\] must be"),
        ({"resolution": 16}, "resolution=16 and aspect_ratio_buckets both say a size"),
        ({"image_column": None}, "aspect_ratio_buckets needs a column of pictures"),
    ],
)
def test_what_does_not_fit_is_named(encode, options, message):
    with pytest.raises(ValueError, match=message):
        encode(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["shards"][0].pop("bucket"), r"shards=.* must be with a bucket in \[0, 3\)"),
        (lambda index: index["shards"][0].update(bucket=3), r"shards=.* must be with a bucket in \[0, 3\)"),
        (lambda index: index["shards"][0].update(bucket=1), r"segment 'image' has 16 codes in row 0, not 18"),
        (lambda index: index["segments"]["image"].update(buckets=[[6, 3], [4, 4]]), r"must begin with \[4, 4\]"),
        (lambda index: index["segments"]["image"].update(buckets=[[4, 4], [2]]), r"buckets'\]\[1\]=\[2\] must be"),
        (lambda index: index["segments"]["image"].update(buckets=[[4, 4]]), r"bucket in \[0, 1\)"),
        (
            lambda index: index["segments"]["text"].update(buckets=[[4, 4]]),
            r"segments\['text'\]: the option='buckets'",
        ),
        (lambda index: index["segments"]["image"].update(patch=[2, 1]), r"\[3, 6\] must be a multiple of \[2, 1\]"),
    ],
)
def test_a_damaged_index_is_refused(encode, change, message):
    folder = encode()
    index = json.loads((folder / "segments.json").read_text())
    change(index)
    (folder / "segments.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        CodeDataset(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Batches

batched = given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99)
)


@settings(max_examples=60, deadline=None)
@batched
def test_batches_are_of_one_bucket_and_use_every_row_once_a_pass(buckets, batch_size, world_size, seed):
    buckets, count = torch.tensor(buckets), batch_size * world_size
    epochs = 4
    sizes = Counter(buckets.tolist())
    steps = sum(epochs * size // count for size in sizes.values())
    batches = bucket_batches(buckets, count, seed=seed)
    seen = [next(batches) for _ in range(steps)]
    used, by_bucket = Counter(), Counter()
    for rows in seen:
        assert len(buckets[rows].unique()) == 1 and len(rows) == count
        used.update(rows.tolist())
        by_bucket[int(buckets[rows[0]])] += 1
    # After four epochs every bucket has given its share, what it lacks to a batch is carried into the next pass, and
    # its rows were used equally often, but for those.
    assert all(by_bucket[bucket] == epochs * size // count for bucket, size in sizes.items())
    for row, bucket in enumerate(buckets.tolist()):
        passes = by_bucket[bucket] * count / sizes[bucket]
        assert passes - 1 < used[row] < passes + 1
    # Resumed anywhere, the same; and processes have disjoint parts of the same global batches.
    start = seed % (steps + 1)
    resumed = bucket_batches(buckets, count, seed=seed, start=start)
    assert all(torch.equal(next(resumed), one) for one in seen[start:])
    options = {"seed": seed, "start": start, "world_size": world_size}
    parts = [bucket_batches(buckets, batch_size, rank=rank, **options) for rank in range(world_size)]
    for one in seen[start : start + 5]:
        assert torch.equal(torch.cat([next(part) for part in parts]), one)


def test_an_epoch_uses_each_row_at_most_once_where_batches_fit():
    buckets = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)[torch.randperm(24)]
    batches = bucket_batches(buckets, 4, seed=3)
    epochs = [[next(batches) for _ in range(6)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == list(range(24))
        assert Counter(int(buckets[rows[0]]) for rows in epoch) == {0: 3, 1: 2, 2: 1}
    first, second, third = ([rows.tolist() for rows in epoch] for epoch in epochs)
    assert first != second != third
    assert len({tuple(int(buckets[rows[0]]) for rows in epoch) for epoch in map(torch.stack, epochs)}) > 1
    other = bucket_batches(buckets, 4, seed=4)
    assert [next(other).tolist() for _ in range(6)] != first


def test_runs_have_batches_of_one_bucket_only_where_there_are_buckets():
    args = argparse.Namespace(train_batch_size=2, seed=5, gradient_accumulation_steps=2)
    buckets = torch.tensor([0, 1] * 6)
    plain, sorted_ = (run_batches(args, Accelerator(), 12, 3, *more) for more in ((), (buckets,)))
    expected = shuffled_batches(12, 2, seed=5, start=6), bucket_batches(buckets, 2, seed=5, start=6)
    for _ in range(8):
        assert torch.equal(next(plain), next(expected[0])) and torch.equal(next(sorted_), next(expected[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Positions


CENTERED = {"centered_positions": True}


def test_pictures_codes_ask_for_centered_positions(encode):
    segments = CodeDataset(encode()).segments
    assert segments["image"]["centered_positions"] and "centered_positions" not in segments["text"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("had", [False, True])
def test_a_transformer_of_one_grid_gets_them_with_its_newly_bucketed(lora, asked, first, had):
    segment = {"vocab_size": 9, "shape": [4, 4]}
    own = {"image": {**segment, **({"centered_positions": True} if had else {})}, "sketch": segment}
    model = VQDiTTransformer2DModel(2, 8, num_layers=1, segments=own, tasks=["->image"])
    for parameter in model.eval().parameters():  # those of a new one give zeros whatever the positions
        torch.nn.init.normal_(parameter, std=0.1)
    grids = [{"image": torch.randint(10, (1, *shape))} for shape in ((4, 4), (6, 2))]
    before = [model(codes).sample["image"] for codes in grids]
    data = {"image": {**segment, **({"centered_positions": True} if asked else {})}}
    buckets = {"image"} if first else set()
    tuned = extend_transformer(model, data, {}, ["->image"], lora=lora, newly_bucketed=buckets)
    expected = had or (asked and first and not lora)
    assert tuned.config.segments["image"].get("centered_positions", False) == expected
    assert tuned.config.segments["sketch"] == segment
    own, other = (torch.equal(tuned(codes).sample["image"], one) for codes, one in zip(grids, before, strict=True))
    assert own and other == (expected == had)


@pytest.mark.parametrize("said", [{"centered_positions": False}, {}])
def test_codes_that_ask_for_none_are_taken_at_their_word(said):
    segment = {"vocab_size": 9, "shape": [4, 4]}
    model = VQDiTTransformer2DModel(2, 8, num_layers=1, segments={"image": segment}, tasks=["->image"])
    tuned = extend_transformer(model, {"image": segment | said}, {}, ["->image"], newly_bucketed={"image"})
    assert tuned.config.segments["image"] == segment


@pytest.mark.parametrize("first", [set(), {"sketch"}, {"image", "sketch"}])
@pytest.mark.parametrize("asked", [{}, CENTERED])
@pytest.mark.parametrize("had", [{}, CENTERED])
def test_a_new_segment_has_the_positions_of_the_one_that_it_begins_as(had, asked, first):
    segment = {"vocab_size": 9, "shape": [4, 4]}
    model = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, segments={"image": segment | had}, tasks=["->image"]
    )
    data = {"image": segment | asked, "sketch": {**segment, **asked, "shared_with": "image"}, "other": segment | asked}
    own = extend_transformer(model, data, {}, ["->sketch"], newly_bucketed=first).config.segments
    centered = {name: one.get("centered_positions", False) for name, one in own.items()}
    of_both = bool(had) or bool(asked) and "image" in first
    assert centered == {"image": of_both, "sketch": of_both, "other": bool(asked)}


GRIDS_READ = [None, [[4, 4]], [[4, 4], [6, 3]], [[4, 4], [3, 6], [6, 3]]]


@pytest.mark.parametrize("modality", ["image", "codes"])
@pytest.mark.parametrize("found", GRIDS_READ)
@pytest.mark.parametrize("known", GRIDS_READ)
def test_a_pipeline_of_several_grids_keeps_them_where_the_data_have_one(known, found, modality):
    def entry(modality, grids):
        return {"modality": modality, **({} if grids is None else {"buckets": grids})}

    if modality == "codes" and found is not None:
        return  # which have none
    before = {"image": entry("image", known), "text": {"modality": "text"}}
    read = {"image": entry(modality, found), "sketch": entry("image", found)}
    entries, first = extend_entries(before, read)
    several = [grids is not None and len(grids) > 1 for grids in (known, found)]
    kept = several[0] and not several[1] and modality == "image"
    assert entries == {**before, **read, **({"image": before["image"]} if kept else {})}
    assert first == ({"sketch"} | ({"image"} if not several[0] else set()) if several[1] else set())
