"""Codes wherever a value is: given, partly known, scored, indexed; and segments that have nothing but codes."""

import numpy as np
import pytest
import torch

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.codes_segment import CodesReader


def seed(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture
def values(pipeline):
    """A value of each argument, and its codes."""
    picture = torch.rand(2, 3, 16, 16)
    texts, labels = ["a red apple", "a blue box"], [0, 1]
    return {
        "prompt": (texts, pipeline.encode_prompt(texts)),
        "image": (picture, pipeline.encode_image(picture)),
        "class_labels": (labels, pipeline.encode_label(labels)),
    }


@pytest.mark.parametrize("argument, output", [("prompt", "image"), ("class_labels", "image"), ("image", "text")])
@pytest.mark.parametrize("guidance_scale", [None, 1.0])
def test_codes_give_what_their_value_gives(pipeline, values, argument, output, guidance_scale):
    value, codes = values[argument]
    options = {"output": output, "output_type": "latent", "num_inference_steps": 4, "guidance_scale": guidance_scale}
    options |= {"num_images_per_prompt": 2} if output == "image" else {"guidance_scale": None}
    drawn = [pipeline(**{argument: one}, generator=seed(), **options).segments[output] for one in (value, codes)]
    assert torch.equal(*drawn)
    rows = pipeline(**{argument: list(codes)}, generator=seed(), **options).segments[output]
    assert torch.equal(rows, drawn[0])


def test_texts_that_are_known_whole_have_nothing_to_fill_in(pipeline, values):
    picture, blank = values["image"][0], ["a red apple", "a <mask> apple"]
    calls = {
        "prompt": lambda: pipeline.score("image->text", blank, picture, num_samples=2),
        "prompt ": lambda: pipeline.index(blank),
        "labels": lambda: pipeline.classify(image=picture, labels=blank, num_samples=2),
        "query": lambda: pipeline.retrieve(blank, pipeline.index(image=picture)),
        "negative_prompt": lambda: pipeline("a red apple", negative_prompt=blank[1], output="image"),
    }
    for argument, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{argument.strip()}=.* has <mask>, which is for what is to be filled"):
            call()


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.int8, np.int64, np.uint16])
@pytest.mark.parametrize("rows", [False, True])
def test_codes_of_another_type_are_named(pipeline, values, kind, rows):
    picture, codes = values["image"][0], {name: codes for name, (_, codes) in values.items()}
    codes = {n: v.to(kind) if isinstance(kind, torch.dtype) else v.numpy().astype(kind) for n, v in codes.items()}
    codes = {name: list(value) if rows else value for name, value in codes.items()}
    gallery = pipeline.index(image=picture)
    calls = {
        "image": lambda: pipeline(image=codes["image"], output="text"),
        "image ": lambda: pipeline(image=codes["image"], output="image"),
        " image": lambda: pipeline.index(image=codes["image"]),
        "prompt": lambda: pipeline(codes["prompt"]),
        "prompt ": lambda: pipeline.score("text->image", codes["prompt"], picture),
        "class_labels": lambda: pipeline(class_labels=codes["class_labels"], output="image"),
        "query": lambda: pipeline.retrieve(codes["prompt"], gallery),
        "negative_prompt": lambda: pipeline("a", negative_prompt=codes["prompt"], output="image"),
    }
    name = str(kind).removeprefix("torch.") if isinstance(kind, torch.dtype) else np.dtype(kind).name
    for argument, call in calls.items():
        with pytest.raises(
            ValueError, match=rf"^{argument.strip()} is {name} of .*: codes must be int64 tensors of shape"
        ):
            call()
    with pytest.raises(ValueError, match="codes must be int64 .*; pixels are floats"):
        pipeline(image=np.zeros((16, 16, 3), int), output="text")
    assert pipeline(class_labels=np.array([0, 1], np.int32), output="image", num_inference_steps=1).images


def test_codes_are_scored_classified_and_searched_as_their_values(pipeline, values):
    (texts, text_codes), (pictures, image_codes), _ = values.values()
    scores = [
        pipeline.score("text->image", a, b, num_samples=2, generator=seed()).nll
        for a, b in ((texts, pictures), (text_codes, image_codes))
    ]
    assert torch.equal(*scores)
    labels = [pipeline.classify(image=one).probabilities for one in (pictures, image_codes)]
    assert torch.equal(*labels)
    galleries = [pipeline.index(image=one) for one in (pictures, image_codes)]
    found = [
        pipeline.retrieve(query, gallery, 2).scores
        for query, gallery in zip((texts, text_codes), galleries, strict=True)
    ]
    assert torch.equal(*found)
    for call in (
        lambda codes: pipeline.score("text->image", texts, codes, num_samples=2),
        lambda codes: pipeline.classify(image=codes),
        lambda codes: pipeline.index(image=codes),
    ):
        with pytest.raises(ValueError, match="32"):
            call(torch.full((2, 4, 4), 32))


@pytest.mark.parametrize("sampler", ["ancestral", "confidence", "halton"])
@pytest.mark.parametrize("argument, name, size", [("image", "image", 32), ("prompt", "text", 64)])
def test_known_codes_stay_and_the_mask_is_filled_in(pipeline, values, argument, name, size, sampler):
    pipeline.scheduler = MaskedDiffusionScheduler(sampler=sampler)
    codes = values[argument][1].clone()
    unknown = torch.rand(codes.shape) < 0.5
    codes[unknown] = size
    options = {"output": "image" if name == "image" else "image+text", "output_type": "latent", "generator": seed()}
    drawn = pipeline(**{argument: codes}, **options).segments[name]
    assert torch.equal(drawn[~unknown], codes[~unknown]) and drawn.max() < size
    if name == "image":
        options = {"num_inference_steps": 3, "output_type": "latent"}
        by_value = pipeline(image=codes[:1], generator=seed(), **options).images  # the only task that fits
        assert torch.equal(pipeline(latents=codes[:1], generator=seed(), **options).images, by_value)
        whole = values[argument][1]
        assert torch.equal(pipeline(image=whole, output="image", **options).images, whole)
        repaired = pipeline(image=whole, output="image", strength=0.25, **options).images
        assert (repaired != whole).sum() <= 8


def test_codes_need_no_tokenizer(pipeline, values):
    codes = values["prompt"][1]
    expected = pipeline(codes, output_type="latent", generator=seed(), num_inference_steps=2).images
    pipeline.text_vq = None
    assert torch.equal(pipeline(codes, output_type="latent", generator=seed(), num_inference_steps=2).images, expected)
    with pytest.raises(ValueError, match="needs the component text_vq, which is None"):
        pipeline("a red apple")


def test_likelihoods_of_codes_need_no_tokenizer(pipeline, values):
    (texts, text_codes), (pictures, image_codes), _ = values.values()

    def found():
        score = pipeline.score("text->image", text_codes, image_codes, num_samples=2, generator=seed()).nll
        gallery = pipeline.index(image=image_codes)
        return (
            score,
            pipeline.classify(image=image_codes).probabilities,
            pipeline.retrieve(text_codes, gallery, 2).scores,
        )

    expected, gallery = found(), pipeline.index(image=pictures)
    pipeline.image_vq = pipeline.text_vq = None
    assert all(torch.equal(*pair) for pair in zip(found(), expected, strict=True))
    assert torch.equal(pipeline.retrieve(text_codes, gallery, 2).scores, expected[2])
    for call in (
        lambda: pipeline.score("text->image", texts, image_codes),
        lambda: pipeline.index(image=pictures),
        lambda: pipeline.classify(image=image_codes, labels=texts),
    ):
        with pytest.raises(ValueError, match="needs the component .*_vq, which is None"):
            call()


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
def test_a_negative_prompt_of_codes_is_that_of_their_text(pipeline, values, guidance_scale):
    texts, codes = values["prompt"]
    options = {"guidance_scale": guidance_scale, "output_type": "latent", "num_inference_steps": 3}
    by_text, by_codes = (
        pipeline(texts, negative_prompt=one, generator=seed(), **options).images for one in ("green", codes[:1])
    )
    expected = pipeline(texts, negative_prompt=texts[0], generator=seed(), **options).images
    assert torch.equal(by_codes, expected) and not torch.equal(by_text, by_codes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt": torch.zeros(2, 11).long()}, r"prompt must be int64 codes of shape \('B', 12\), got \(2, 11\)"),
        (
            {"prompt": torch.full((2, 12), 64), "output": "image"},
            r"has the code 64, the mask, .*: ask for output='text'",
        ),
        ({"prompt": torch.full((1, 12), 65), "output": "image"}, r"codes in \[0, 64\), .* got values from 65 to 65"),
        ({"prompt": torch.full((1, 12), -1)}, "got values from -1 to -1"),
        ({"image": torch.zeros(2, 4).long(), "output": "text"}, r"image must be int64 codes of shape \('B', 4, 4\)"),
        ({"image": torch.zeros(0, 4, 4).long(), "output": "text"}, r"image must be int64 codes of shape"),
        ({"image": [torch.zeros(4, 4).long(), "x"], "output": "text"}, r"image must be int64 codes of shape"),
        (
            {"image": torch.arange(17, 33).view(1, 4, 4), "output": "image", "strength": 0.5},
            r"strength=0.5 redraws what is known; \['image'\] has codes that are the mask",
        ),
        ({"class_labels": torch.full((1, 1), 9)}, "class_labels must be codes in"),
        (
            {"image": torch.zeros(1, 4, 4).long(), "mask_image": torch.ones(1, 1, 16, 16), "output": "image"},
            r"mask_image is for pictures; \['image'\] are codes",
        ),
    ],
)
def test_codes_that_cannot_be(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


GEOMETRY = {
    "video": {"vocab_size": 20, "shape": [2, 4, 4], "patch": [1, 2, 2]},
    "motion": {"vocab_size": 7, "shape": [5]},
    "plan": {"vocab_size": 9, "shape": [2, 3]},
}


@pytest.mark.parametrize("said", [True, False])
def test_segments_of_nothing_but_codes(said, tmp_path):
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        segments=GEOMETRY if said else {"video": GEOMETRY["video"]},
        tasks=["->video", "motion+plan->video", "video->motion", "->motion+plan"] if said else ["->video"],
    )
    entries = {name: {"modality": "codes"} for name in GEOMETRY} if said else None
    VQDiTPipeline(transformer.eval(), MaskedDiffusionScheduler(), segments=entries).save_pretrained(tmp_path)
    pipe = VQDiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    codes = torch.randint(20, (2, 2, 4, 4))
    codes[:, :, 2:] = 20
    drawn = pipe(inputs={"video": codes}, output="video").segments["video"]
    assert drawn.shape == codes.shape and drawn.max() < 20 and torch.equal(drawn[:, :, :2], codes[:, :, :2])
    *others, segments, audios, rate = pipe(output="video", return_dict=False, num_images_per_prompt=3)
    assert {*others, audios, rate} == {None} and len(others) == 3
    assert segments["video"].shape == (3, 2, 4, 4) and len(segments) == 1
    if said:
        out = pipe(inputs={"motion": torch.zeros(2, 5).long(), "plan": torch.zeros(2, 2, 3).long()})
        assert out.segments["video"].shape == (2, 2, 4, 4)
        both = pipe(output="motion+plan").segments
        assert both["motion"].shape == (1, 5) and both["plan"].shape == (1, 2, 3)
        with pytest.raises(ValueError, match=r"inputs\['video'\]=\[1, 2\] must be an int64 tensor of codes of shape"):
            pipe(inputs={"video": [1, 2]}, output="motion")


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([[1, 2], [3, 4]], {}, None),
        ([[[1, 2]], [[3, 4]]], {}, None),
        ([[1, 2, 3, 4]] * 2, {"grid": (2, 2), "num_codes": 5}, None),
        ([[[[1, 2], [3, 4]]]] * 2, {"grid": (1, 2, 2)}, None),
        (
            [[1, 2], [3]],
            {},
            r"'c', row 1: must be lists of whole codes of shape \[2\], got int64 of shape \[1\]",
        ),
        ([[1, 2, 3]] * 2, {"grid": (2, 2)}, r"row 0: .* of shape \[2, 2\], got int64 of shape \[3\]"),
        ([[1.5, 2.0]], {}, "row 0: .* got float"),
        (
            [[1, 2], [1, 5], [5, 0]],
            {"num_codes": 5},
            r"'c', row 1: the code 5 must be in \[0, 5\): give a larger num_codes \(SIZE of --code_columns\), or",
        ),
        ([[0, 1], [-1, 5], [-1, 0]], {}, r"'c', row 1: the code -1 must be in \[0, 6\): number the codes anew"),
        *(
            ([[0, 1], [2, code]], {}, rf"'c', row 1: the code {code} must be in \[0, 16777216\): number the codes")
            for code in (2**24, 2**31, 2**40)
        ),
        ([[0, 1]], {"num_codes": 2**24 + 1}, "'c': num_codes=16777217 must be at most 16777216"),
        ([[[[[1]]]]], {}, "of 1 to 3 axes"),
        ([1, 2], {}, "of 1 to 3 axes"),
        ([["a"]], {}, "row 0: must be lists of whole codes"),
    ],
)
def test_columns_of_codes(rows, options, message):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"c": rows})
    if message is not None:
        with pytest.raises(ValueError, match=message):
            CodesReader(data, "c", **options)
        return
    reader = CodesReader(data, "c", **options)
    codes = torch.cat(reader.encode([reader.read(row) for row in range(len(rows))], 1))
    assert (
        codes.shape == (len(rows), *reader.shape) and codes.flatten().tolist() == torch.tensor(rows).flatten().tolist()
    )
    assert reader.vocab_size == options.get("num_codes", int(codes.max()) + 1)


def test_ready_states_without_a_segment_of_them_are_named(pipeline):
    with pytest.raises(ValueError, match="prompt_embeds is for a segment of .*; this checkpoint has none"):
        pipeline(prompt_embeds=torch.zeros(1, 2, 3), output="image")
