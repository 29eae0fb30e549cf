"""Pictures that are decoded when they are asked for: the same ones whoever reads them, and wherever a run goes on."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training import image_dataset
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.image_dataset import ImageDataset, first_batches, load_batches
from diffusers_vqdit.training.row_order import shuffled_batches


COUNT, BROKEN = 12, (3, 4, 11)


@pytest.fixture
def dataset(tmp_path):
    """Pictures of several sizes, three of them broken."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = rng.integers(0, 255, (*rng.integers(17, 40, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index:02d}.png")
    for index in BROKEN:
        (tmp_path / "pictures" / f"{index:02d}.png").write_bytes(b"broken")
    return load_training_dataset(train_data_dir=str(tmp_path / "pictures"), image_column="image")


@pytest.fixture
def uncached(monkeypatch):
    monkeypatch.setattr(image_dataset, "CACHED_BYTES", 0)


def batches(images, start=0, count=9, rank=0, world_size=1, workers=0, size=4):
    rows = shuffled_batches(len(images), size, seed=5, start=start, rank=rank, world_size=world_size)
    stride = size * world_size
    options = {"first": start * stride + rank * size, "stride": stride, "num_workers": workers}
    return torch.stack(list(itertools.islice(load_batches(images, rows, **options), count)))


AUGMENTED = {"random_crop": True, "random_flip": True, "seed": 3}


def test_few_pictures_are_kept_and_many_are_not(dataset, monkeypatch):
    kept = ImageDataset(dataset, "image", 16)
    assert kept.pictures is not None and len(kept) == COUNT - len(BROKEN)
    assert torch.equal(next(load_batches(kept, first_batches(9, 9))), kept.pictures)
    monkeypatch.setattr(image_dataset, "CACHED_BYTES", 3 * 16 * 16 * COUNT - 1)
    assert ImageDataset(dataset, "image", 16).pictures is None
    assert kept.identity().keys() == {"training data"} != ImageDataset(dataset, "image", 16).identity().keys()


def test_the_next_picture_stands_in_for_a_broken_one(dataset, uncached, caplog):
    images = ImageDataset(dataset, "image", 16)
    found = next(load_batches(images, first_batches(COUNT, COUNT)))
    whole, rows = decode_images(dataset, "image", 16)
    expected = [next(other % COUNT for other in range(row, 99) if other % COUNT in rows) for row in range(COUNT)]
    assert torch.equal(found, whole[[rows.index(row) for row in expected]])
    caplog.clear()
    list(load_batches(images, itertools.chain(first_batches(COUNT, 5), first_batches(COUNT, 4))))
    named = [record.message for record in caplog.records]
    assert len(named) == 3 and all(f"{index:02d}.png" in text for index, text in zip(BROKEN, named, strict=True))


@pytest.mark.parametrize("options", [{}, AUGMENTED, {"random_flip": True}])
def test_workers_processes_and_a_resume_change_nothing(dataset, uncached, options):
    images = ImageDataset(dataset, "image", 16, **options)
    whole = batches(images)
    state = torch.get_rng_state()
    assert torch.equal(batches(images, workers=2), whole)
    assert torch.equal(torch.get_rng_state(), state)  # models are made of the same numbers
    assert torch.equal(batches(images, start=5, count=4, workers=1), whole[5:])
    halves = [batches(images, rank=rank, world_size=2, size=2) for rank in range(2)]
    assert torch.equal(torch.cat(halves, dim=1), whole)


def test_crops_and_flips_are_others_each_time_and_never_of_broken_order(dataset, uncached):
    images = ImageDataset(dataset, "image", 16, **AUGMENTED)
    times = torch.stack([images[0, position][0] for position in range(40)])
    assert len(times.flatten(1).unique(dim=0)) > 20
    flipped = ImageDataset(dataset, "image", 16, random_flip=True, seed=3)
    plain, both = ImageDataset(dataset, "image", 16)[0, 0][0], [flipped[0, position][0] for position in range(60)]
    share = sum(torch.equal(one, plain.flip(-1)) for one in both) / 60
    assert all(torch.equal(one, plain) or torch.equal(one, plain.flip(-1)) for one in both) and 0.25 < share < 0.75


def test_a_dataset_without_a_picture_is_refused(dataset, uncached, tmp_path):
    for path in (tmp_path / "pictures").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="column 'image': none of 12 pictures from row 0 on could be read"):
        ImageDataset(dataset, "image", 16)


def test_changed_files_are_other_data(dataset, uncached, tmp_path):
    before = ImageDataset(dataset, "image", 16).identity()
    assert ImageDataset(dataset, "image", 16).identity() == before
    assert ImageDataset(dataset, "image", 16, resize_mode="pad").identity() != before
    assert ImageDataset(dataset.select(range(11)), "image", 16).identity() != before
    path = tmp_path / "pictures" / "05.png"
    path.write_bytes(path.read_bytes() + b"\0")
    assert ImageDataset(dataset, "image", 16).identity() != before


def test_the_image_tokenizer_resumes_to_the_same_weights(run, dataset, uncached, tmp_path):
    tiny = "--resolution 16 --block_out_channels 8 8 --norm_num_groups 4 --latent_channels 8 --num_vq_embeddings 16"
    arguments = (
        f"--train_data_dir {tmp_path / 'pictures'} {tiny} --report_to none --train_batch_size 4 --max_train_steps 5 "
        "--checkpointing_steps 3 --validation_split none --random_crop --random_flip"
    )
    run("train_image_vq", f"{arguments} --output_dir {tmp_path / 'whole'}")
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "broken" / "checkpoint-3")
    resumed = f"--output_dir {tmp_path / 'broken'} --resume_from_checkpoint latest --dataloader_num_workers 2"
    run("train_image_vq", f"{arguments} {resumed}")
    whole, resumed = (ImageVQModel.from_pretrained(tmp_path / name) for name in ("whole", "broken"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(ValueError, match="random_flip=True, which is now False"):
        other = arguments.replace("--random_flip", "")
        run("train_image_vq", f"{other} --output_dir {tmp_path / 'whole'} --resume_from_checkpoint latest")


@pytest.mark.parametrize("mode", ["crop", "auto", "pad"])
@pytest.mark.parametrize("sides", [(40, 20), (20, 40), (20, 20), (100, 97)])
def test_what_a_crop_takes_off_is_said(tmp_path, caplog, mode, sides):
    for index in range(3):
        Image.new("RGB", sides if index else (20, 20)).save(tmp_path / f"{index}.png")
    pictures = load_training_dataset(train_data_dir=str(tmp_path), image_column="image")
    ImageDataset(pictures, "image", 16, resize_mode=mode)
    told = "resize_mode='crop' takes more than 5% of the area off 2 of 3 pictures" in caplog.text
    assert told == (mode == "crop" and min(sides) < 0.95 * max(sides))
    caplog.clear()
    ImageDataset(pictures, "image", 16, random_crop=True)
    assert "resize_mode" not in caplog.text


def test_channels_that_no_picture_has_are_refused(dataset):
    with pytest.raises(ValueError, match="channels=4 of the image tokenizer: pictures are read as grey"):
        ImageDataset(dataset, "image", 16, channels=4)
    assert ImageDataset(dataset, "image", 16, channels=1).pictures.shape[1] == 1
