"""Tensors of pictures in a file: each picture's, whole or not at all, and not made twice."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_vqdit.training import image_dataset, picture_tensors
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.image_dataset import ImageDataset
from diffusers_vqdit.training.picture_tensors import encode_pictures
from diffusers_vqdit.utils.fingerprints import tensor_sha256


@pytest.fixture
def images(tmp_path, monkeypatch):
    for name, value in (("PART_ROWS", 8), ("BATCH_SIZE", 3), ("CHUNK_ROWS", 4)):
        monkeypatch.setattr(picture_tensors, name, value)
    monkeypatch.setattr(image_dataset, "CACHED_BYTES", 0)
    (tmp_path / "pictures").mkdir()
    for row in range(30):
        pixels = np.random.default_rng(row).integers(0, 255, (12, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{row:02d}.png")
    for row in (5, *range(8, 16)):  # one, and a whole part
        (tmp_path / "pictures" / f"{row:02d}.png").write_bytes(b"broken")
    dataset = load_training_dataset(train_data_dir=str(tmp_path / "pictures"), image_column="image")
    return ImageDataset(dataset, "image", 8)


def halves(pictures):
    return torch.stack([pictures[..., :4], pictures[..., 4:]], dim=1).float()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_picture_has_its_tensor(images, tmp_path, workers, dtype):
    path = tmp_path / "x" / "halves.safetensors"
    made = encode_pictures(images, lambda x: halves(x).to(dtype), path, "halves", {"a": "1"}, num_workers=workers)
    pictures, rows = decode_images(images.column, "image", 8)
    assert torch.equal(made.tensor, halves(pictures).to(dtype)) and made.rows.tolist() == rows
    assert torch.equal(torch.cat(list(made.chunks())), made.tensor)
    assert torch.equal(load_file(path)["halves"], made.tensor)  # as safetensors reads it
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_it_is_made_once_and_goes_on_where_it_stopped(images, tmp_path):
    path, counted = tmp_path / "halves.safetensors", []

    def encode(pictures):
        counted.append(len(pictures))
        if len(counted) == 6:
            raise RuntimeError("killed")
        return halves(pictures)

    with pytest.raises(RuntimeError, match="killed"):
        encode_pictures(images, encode, path, "halves", {"a": "1"})
    assert not path.exists()
    made = encode_pictures(images, encode, path, "halves", {"a": "1"})
    assert sum(counted) < 2 * 21 and len(made.tensor) == 21
    before, digest = len(counted), tensor_sha256(made.tensor)
    assert tensor_sha256(encode_pictures(images, encode, path, "halves", {"a": "1"}).tensor) == digest
    assert len(counted) == before
    # What is the user's stays, what is the run's is made again.
    with pytest.raises(ValueError, match="halves_file=.* was made with other a; delete it or name another"):
        encode_pictures(images, encode, path, "halves", {"a": "2"}, argument="halves_file")
    data = bytearray(path.read_bytes())
    data[-300] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its halves' SHA-256 is not the one in it"):
        encode_pictures(images, encode, path, "halves", {"a": "1"}, argument="halves_file")
    assert len(encode_pictures(images, encode, path, "halves", {"a": "1"}).tensor) == 21 and len(counted) > before


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("again", [2, 1])
def test_a_killed_process_leaves_its_parts_to_the_next_run(images, in_processes, tmp_path, killed, again):
    """Parts of rows 0-7 (one broken), 8-15 (all broken), 16-23 and 24-29, three rows a batch."""
    path, counted = tmp_path / "two" / "halves.safetensors", tmp_path / "counted"
    encode_pictures(images, halves, tmp_path / "one" / "halves.safetensors", "halves", {"a": "1"})
    whole = (tmp_path / "one" / "halves.safetensors").read_bytes()

    def run(rank, batches=None):
        made = []

        def encode(pictures):
            if len(made) == batches and rank == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(len(pictures))
            with open(counted, "ab") as file:
                file.write(bytes(len(pictures)))
            return halves(pictures)

        encode_pictures(images, encode, path, "halves", {"a": "1"})

    # The first process ends in its second part, the other one in its second, too, of which it had nothing to encode
    # in the first.
    assert in_processes(lambda rank: run(rank, 4 if killed == 0 else 1))[killed] == -signal.SIGKILL
    assert not path.exists()
    counted.unlink()
    assert in_processes(run, again) == [0] * again
    assert path.read_bytes() == whole and [one.name for one in path.parent.iterdir()] == [path.name]
    assert counted.stat().st_size == (8 if killed == 0 else 6)  # pictures of the part that was not finished


def test_latent_training_reads_many_pictures_from_its_file(run, images, image_vq, tmp_path, monkeypatch):
    image_vq.save_pretrained(tmp_path / "image_vq")
    arguments = (
        f"--train_data_dir {tmp_path / 'pictures'} --image_vq {tmp_path / 'image_vq'} --num_layers 1 --report_to none "
        "--num_attention_heads 1 --attention_head_dim 8 --train_batch_size 4 --max_train_steps 3 --random_flip"
    )
    run("train_latent_dit", f"{arguments} --output_dir {tmp_path / 'many'}")
    monkeypatch.setattr(image_dataset, "CACHED_BYTES", 1 << 26)
    run("train_latent_dit", f"{arguments} --output_dir {tmp_path / 'few'}")
    many, few = (load_file(next((tmp_path / n / "transformer").glob("*.safetensors"))) for n in ("many", "few"))
    for name, value in few.items():
        torch.testing.assert_close(many[name], value, atol=1e-5, rtol=0, msg=name)  # of other batches
    assert len(load_file(tmp_path / "many" / "latents.safetensors")["latents"]) == 21
    assert not (tmp_path / "few" / "latents.safetensors").exists()
