"""Pictures that are passed to a pipeline that was trained on several aspect ratios."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_vqdit import GalleryIndex, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.likelihood.retrieval import retrieve


GRIDS = [[4, 4], [6, 3], [3, 6]]
FACTOR = 4


def picture(height, width, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def mask(height, width):
    plane = np.zeros((height, width), np.uint8)
    plane[:, width // 2 :] = 255
    return PIL.Image.fromarray(plane)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def buckets(image_vq, text_vq, tokenizer, pipeline):
    """A pipeline with pictures, sketches of the same tokenizer and small pictures, on three grids."""
    grid = {"vocab_size": 32, "shape": [4, 4]}
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        segments={
            "text": {"vocab_size": 64, "shape": [12]},
            "image": grid,
            "sketch": {**grid, "shared_with": "image"},
            "image_lowres": {**grid, "shared_with": "image"},
        },
        tasks=["text->image", "image->text", "sketch->image", "image->sketch", "->image", "image_lowres->image"],
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    entries = {name: {"modality": "image", "buckets": GRIDS} for name in ("image", "sketch", "image_lowres")}
    entries["image_lowres"] |= {"lowres_of": "image", "factor": 2}
    parts = {**pipeline.components, "transformer": transformer.eval()}
    pipe = VQDiTPipeline(**parts, segments=entries)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def grids(buckets, monkeypatch):
    """The grids of the codes that the tokenizer makes."""
    found, encode = [], buckets.image_vq.encode_codes

    def seen(sample):
        codes = encode(sample)
        found.append(list(codes.shape[1:]))
        return codes

    monkeypatch.setattr(buckets.image_vq, "encode_codes", seen)
    return found


@pytest.mark.parametrize(("size", "grid"), [((20, 20), 0), ((100, 60), 1), ((9, 30), 2), ((17, 16), 0), ((7, 1), 1)])
def test_a_picture_is_seen_at_its_own_aspect_ratio(buckets, grids, size, grid):
    height, width = (FACTOR * side for side in GRIDS[grid])
    one = picture(*size)
    text = buckets(image=one, output="text", generator=generators(1)).texts
    # By its size too; and in a batch with another of the same bucket.
    assert buckets(image=one, output="text", height=height, width=width, generator=generators(1)).texts == text
    pair = buckets(image=[one, picture(*size, seed=1)], output="text", generator=generators(1, 2)).texts
    assert pair[0] == text[0]
    assert grids == [GRIDS[grid]] * 3
    # Another picture of it is made on the same grid.
    drawn = buckets(image=one, output="sketch", generator=generators(1)).segments["sketch"][0]
    assert drawn.size == (width, height)
    assert buckets(inputs={"sketch": one}, output="image", num_images_per_prompt=2).images[1].size == (width, height)
    array = np.asarray(one)[None].astype(np.float32) / 255
    assert (
        buckets(image=array, output="sketch", generator=generators(1), output_type="pil").images[0].size == drawn.size
    )


def test_without_a_picture_and_enlarged_it_is_the_first_grid(buckets):
    assert buckets("a red apple").images[0].size == (16, 16)
    assert buckets(image=picture(8, 20), output="image").images[0].size == (40, 16)  # in tiles
    assert buckets.encode_image(picture(8, 20)).shape == (1, 4, 4)
    nll = buckets.score("image->text", "a box", [picture(8, 20), picture(20, 8)], num_samples=2).nll
    assert nll.shape == (2,) and nll.isfinite().all()
    assert len(buckets.index(image=[picture(8, 20), picture(20, 8)], query="text")) == 2


def test_a_repainted_picture_keeps_its_size_and_what_is_known(buckets):
    one, shapes = picture(60, 30), []

    def seen(pipe, index, timestep, inputs):
        shapes.append(tuple(inputs["latents"].shape))

    options = {"output": "image", "callback_on_step_end": seen}
    found = buckets(image=one, mask_image=mask(60, 30), **options).images[0]
    assert set(shapes) == {(1, 6, 3)} and found.size == (30, 60)
    assert np.array_equal(np.asarray(found)[:, :15], np.asarray(one)[:, :15])
    assert buckets(image=one, strength=0.5, **options).images[0].size == (12, 24) and shapes[-1] == (1, 6, 3)
    assert buckets(image=one, mask_image=mask(60, 30), width=16, height=16, **options).images[0].size == (30, 60)
    assert shapes[-1] == (1, 4, 4)


def test_pictures_of_several_buckets_are_refused_whatever_is_made_of_them(buckets):
    several = [picture(20, 20), picture(40, 20)]
    message = r"pictures of 20 x 20 and 40 x 20 pixels .* call once for each aspect ratio, or give height and width"
    for options in ({"output": "text"}, {"output": "sketch"}, {"output": "image", "strength": 0.5}):
        with pytest.raises(ValueError, match="image has " + message):
            buckets(image=several, **options)
    with pytest.raises(ValueError, match=r"inputs\['sketch'\] has " + message):
        buckets(inputs={"sketch": several})
    texts = buckets(image=several, output="text", height=16, width=16, generator=generators(1, 2)).texts
    assert texts[1] == buckets(image=several[1], output="text", height=16, width=16, generator=generators(2)).texts[0]


def test_latents_say_the_grid_of_what_is_made(buckets):
    latents = torch.full((1, 5, 4), 32)
    assert buckets(inputs={"sketch": picture(40, 20)}, latents=latents).images[0].size == (16, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"modality": "image", "buckets": [[6, 3], [4, 4]]}}, r"must begin with \[4, 4\]"),
        ({"image": {"modality": "image", "buckets": [[4, 4], [8, 8]]}}, "which have one aspect ratio"),
        ({"image": {"modality": "image", "buckets": []}}, r"\['buckets'\]=\[\] must be"),
        ({"image": {"modality": "image", "buckets": 3}}, r"\['buckets'\]=3 must be"),
        ({"text": {"modality": "text", "buckets": [[4, 4]]}}, "the option='buckets' must be one of"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(buckets, change, message):
    with pytest.raises(ValueError, match=message):
        VQDiTPipeline(**buckets.components, segments=change)


def test_positions_of_patches_divide_the_grids(buckets):
    segments = {"image": {"vocab_size": 32, "shape": [4, 4], "patch": [2, 2]}}
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, segments=segments
    )
    parts = {**buckets.components, "transformer": transformer}
    with pytest.raises(ValueError, match=r"\['buckets'\]: \[6, 3\] must be a multiple of \[2, 2\].* such as"):
        VQDiTPipeline(**parts, segments={"image": {"modality": "image", "buckets": GRIDS}})
    VQDiTPipeline(**parts, segments={"image": {"modality": "image", "buckets": [[4, 4], [6, 2]]}})


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


SIZES = [(20, 20), (100, 60), (9, 30), (60, 36), (16, 17)]  # of the grids 0, 1, 2, 1 and 0


def codes_of(pipe, image, segment="image"):
    """A picture's codes on the grid of its own aspect ratio, by its size in pixels."""
    grid = GRIDS[min(range(3), key=lambda i: abs(np.log(image.height * GRIDS[i][1] / (image.width * GRIDS[i][0]))))]
    return pipe._segments_of({segment: tuple(grid)})[segment].encode([image])


@pytest.mark.parametrize("task", ["text->image", "image->text"])
def test_each_picture_is_scored_on_its_own_grid_whatever_else_is_scored(buckets, task):
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    options = {"num_samples": 4}
    found = buckets.score(task, "a red apple", pictures, generator=torch.Generator().manual_seed(3), **options)
    for row, one in enumerate(pictures):
        alone = buckets.score(task, "a red apple", one, generator=torch.Generator().manual_seed(3), **options)
        ready = buckets.score(
            task, "a red apple", codes_of(buckets, one), generator=torch.Generator().manual_seed(3), **options
        )
        assert torch.equal(alone.nll, ready.nll)
        torch.testing.assert_close(found.nll[row], alone.nll[0])
        counts = torch.as_tensor(found.num_codes).expand(len(pictures))
        assert int(counts[row]) == int(torch.as_tensor(alone.num_codes).flatten()[0])
    assert torch.equal(found.bits_per_code, found.nll / (torch.as_tensor(found.num_codes) * np.log(2)))


def test_each_picture_is_classified_on_its_own_grid(buckets, grids):
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    labels, options = ["a red apple", "a sailboat", "sun"], {"num_samples": 4}
    found = buckets.classify(image=pictures, labels=labels, generator=torch.Generator().manual_seed(3), **options)
    assert sorted(grids) == sorted(GRIDS)  # once each, several pictures together
    for row, one in enumerate(pictures):
        alone = buckets.classify(image=one, labels=labels, generator=torch.Generator().manual_seed(3), **options)
        torch.testing.assert_close(found.probabilities[row], alone.probabilities[0])


def test_a_gallery_of_pictures_of_several_aspect_ratios(buckets, grids, tmp_path):
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    gallery = buckets.index(image=pictures)
    assert sorted(grids) == sorted(GRIDS) and len(gallery) == len(pictures) and len(gallery.parts) == 3
    found = buckets.retrieve(["a red apple", "sun"], gallery, top_k=5)
    assert [sorted(row) for row in found.indices.tolist()] == [[0, 1, 2, 3, 4]] * 2
    assert (found.scores.diff(dim=1) <= 0).all()
    # Each has the PMI that it has alone, on its grid.
    for row, one in enumerate(pictures):
        alone = buckets.retrieve(["a red apple", "sun"], buckets.index(image=[one]), top_k=1)
        own = found.scores[found.indices == row]
        torch.testing.assert_close(own, alone.scores[:, 0])
    # A file of it is the same.
    gallery.save(tmp_path / "gallery.safetensors")
    again = GalleryIndex.load(tmp_path / "gallery.safetensors")
    assert len(again) == len(gallery) and len(again.parts) == 3
    other = buckets.retrieve(["a red apple", "sun"], again, top_k=5)
    assert torch.equal(other.indices, found.indices) and torch.equal(other.scores, found.scores)
    # Ready codes of one grid are a gallery, too.
    ready = buckets.index(image=torch.cat([codes_of(buckets, pictures[row]) for row in (1, 3)]))
    best = buckets.retrieve("sun", ready, top_k=2)
    order = [row for row in found.indices[1].tolist() if row in (1, 3)]
    assert [[1, 3][place] for place in best.indices[0].tolist()] == order


def test_pictures_of_several_aspect_ratios_ask_one_gallery(buckets, grids, tmp_path):
    pictures, texts = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)], ["a red apple", "sun", "moon"]
    gallery = buckets.index(texts)
    gallery.save(tmp_path / "gallery.safetensors")
    found = buckets.retrieve(pictures, GalleryIndex.load(tmp_path / "gallery.safetensors"), top_k=3)
    assert sorted(grids) == sorted(GRIDS)
    for row, one in enumerate(pictures):
        alone = buckets.retrieve(codes_of(buckets, one), gallery, top_k=3)
        assert torch.equal(found.indices[row], alone.indices[0])
        torch.testing.assert_close(found.scores[row], alone.scores[0])
    # And of sketches by pictures, each on a grid of its own.
    sketches = buckets.index(inputs={"sketch": pictures[:3]}, query="image")
    assert len(sketches) == 3 and len(sketches.parts) == 9
    best = buckets.retrieve(pictures, sketches, top_k=3)
    assert all(sorted(row) == [0, 1, 2] for row in best.indices.tolist())
    sketches.save(tmp_path / "sketches.safetensors")
    again = buckets.retrieve(pictures, GalleryIndex.load(tmp_path / "sketches.safetensors"), top_k=3)
    assert torch.equal(again.indices, best.indices) and torch.equal(again.scores, best.scores)
    # The function without a pipeline takes the whole gallery, too.
    codes = codes_of(buckets, pictures[1])
    alone = retrieve(buckets.transformer, codes, sketches, top_k=3, shortlist=20)
    assert torch.equal(alone.indices[0], best.indices[1])


def test_a_gallery_for_queries_of_other_grids_is_refused(buckets):
    gallery = buckets.index(["a red apple", "sun"])
    gallery.others = []
    gallery.query_shape = (2, 8)
    with pytest.raises(ValueError, match=r"queries of the grids \['\(2, 8\)'\], and not for the \[6, 3\]"):
        buckets.retrieve(picture(100, 60), gallery, top_k=1)


def test_a_gallery_of_before_is_asked_on_the_first_grid(buckets, grids):
    gallery = buckets.index(["a red apple", "sun"])
    old = dataclasses.replace(gallery, query_shape=None, others=[])
    buckets.retrieve(picture(100, 60), old, top_k=1)
    assert grids == [GRIDS[0]]
