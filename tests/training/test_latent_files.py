import pytest
import torch
from safetensors.torch import save_file

from diffusers_vqdit.training.latent_files import latents_identity, load_latents, save_latents


@pytest.fixture
def kept(image_vq, tmp_path):
    pictures = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    identity = latents_identity(image_vq, pictures, True)
    latents = torch.randn(4, 2, 4, 4, 4)
    save_latents(tmp_path / "new" / "latents.safetensors", latents, identity)
    return tmp_path / "new" / "latents.safetensors", latents, identity, pictures


def test_latents_come_back(kept):
    path, latents, identity, _ = kept
    assert torch.equal(load_latents(path, identity), latents)
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_latents_of_something_else_are_refused_by_name(kept, image_vq):
    path, _, identity, pictures = kept
    other = pictures.clone()
    other[2, 0, 3, 3] += 1
    cases = [
        (latents_identity(image_vq, other, True), "other pictures;"),
        (latents_identity(image_vq, pictures[:3], True), "other pictures;"),
        (latents_identity(image_vq, pictures.flip(0), True), "other pictures;"),
        (latents_identity(image_vq, pictures, False), "other random_flip;"),
        (latents_identity(image_vq, pictures[..., :8, :8], True), "other resolution;"),
    ]
    with torch.no_grad():
        image_vq.encoder.conv_in.bias[0] += 1e-3
    cases.append((latents_identity(image_vq, pictures, True), "other vae;"))
    cases.append((latents_identity(image_vq, other, False), "other pictures and random_flip and vae;"))
    for changed, message in cases:
        with pytest.raises(ValueError, match=f"latents_file=.* was made with {message} delete it"):
            load_latents(path, changed)
    assert load_latents(path, identity) is not None


def damages():
    def cut(share):
        return lambda data: data[: int(len(data) * share)]

    def flip(place):
        def change(data):
            data = bytearray(data)
            data[int(len(data) * place) if place < 1 else place] ^= 0x40
            return bytes(data)

        return change

    for share in (0, 0.001, 0.05, 0.2, 0.5, 0.9, 0.999):
        yield cut(share)
    for place in (0, 3, 7, 9, 30, 0.6, 0.7, 0.8, 0.9, 0.999):
        yield flip(place)
    yield lambda data: data + b"\0"
    yield lambda data: b"\0" * len(data)
    yield lambda data: b"{}"
    yield lambda data: data.replace(b"latents", b"latentz")


@pytest.mark.parametrize("number", range(len(list(damages()))))
def test_damaged_files_are_refused_by_name(kept, number):
    path, latents, identity, _ = kept
    path.write_bytes(list(damages())[number](path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"latents_file='.*latents\.safetensors' (is|was) .*delete it or name another"
    ):
        load_latents(path, identity)


def test_files_of_older_versions_and_folders_are_refused(kept, tmp_path):
    _, latents, identity, _ = kept
    save_file({"latents": latents}, tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="is from an older version"):
        load_latents(tmp_path / "old.safetensors", identity)
    with pytest.raises(ValueError, match="is damaged, or no file of latents"):
        load_latents(tmp_path, identity)
