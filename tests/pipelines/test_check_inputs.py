"""What is passed is checked before any work: each kind of a bad value, at each argument of each method."""

import numpy as np
import pytest
import torch
from diffusers import AmusedScheduler, DDIMScheduler, RePaintScheduler, ScoreSdeVeScheduler
from PIL import Image

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline


PICTURE = Image.new("RGB", (16, 16), "red")
LONE = "a \ud83d dog"
NOT_INTEGERS = [0, -1, 1.5, 2.0, "3", True, None, float("nan"), [2], np.float64(2), 10**9]
NOT_NUMBERS = ["3", float("nan"), float("inf"), -float("inf"), [1.0], True, 10**400, 1j, np.array([1.0, 2.0])]
NOT_FLAGS = [1, 0, "True", None, np.bool_(True), []]
NOT_TEXTS = ["", "  ", 3, [], ["a dog", ""], ["a dog", None], LONE, ["a", "\udc00"], b"a dog", ("a", 1), {"a": 1}]
NOT_LABELS = [-1, 3, 1.0, True, "car", "", [], [0, "car"], LONE, [None], (0, 5), np.array([[0, 1]]), np.array([0.5])]
NOT_GENERATORS = [0, 1, "cpu", True, np.random.default_rng(0), [], [0], [torch.Generator(), None]]
NOT_IMAGES = [
    "cat.png",
    [],
    3,
    [PICTURE, "cat.png"],
    [None],
    Image.new("RGB", (0, 4)),
    torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
    torch.zeros(1, 4, 16, 16),
    torch.full((1, 3, 16, 16), -0.5),
    torch.full((1, 3, 16, 16), float("nan")).half(),
    torch.zeros(3, 0, 16),
    np.zeros((16, 16)),
    np.zeros((16, 16, 3), np.uint8),
    np.full((16, 16, 3), 255.0),
    np.full((1, 16, 16, 3), np.inf, np.float16),
    np.zeros((16, 16, 3), dtype=object),
]
NOT_MASKS = [
    "mask.png",
    [],
    Image.new("L", (0, 0)),
    Image.new("L", (16, 8)),
    Image.new("RGBA", (16, 16)),
    np.zeros((16, 16), np.uint8),
    np.full((16, 16), np.nan),
    torch.full((1, 1, 16, 16), 255.0),
    torch.zeros(3, 16, 16),
    torch.zeros(1, 3, 16, 16),
]
NOT_CALLBACKS = [3, "print", [print]]
NOT_TENSOR_INPUTS = ["latents", ["prompt"], ("latents",), [3], {"latents": 1}]
NOT_OUTPUT_TYPES = ["jpg", "PIL", None, 3, ["pil"]]

BOTH = {
    "num_inference_steps": [value for value in NOT_INTEGERS if value is not None],
    "num_images_per_prompt": NOT_INTEGERS,
    "guidance_scale": NOT_NUMBERS,
    "generator": NOT_GENERATORS,
    "output_type": NOT_OUTPUT_TYPES,
    "return_dict": NOT_FLAGS,
    "callback_on_step_end": NOT_CALLBACKS,
    "callback_on_step_end_tensor_inputs": NOT_TENSOR_INPUTS,
}
CALL = BOTH | {
    "prompt": NOT_TEXTS,
    "class_labels": NOT_LABELS,
    "image": NOT_IMAGES,
    "temperature": [*NOT_NUMBERS, -1, 1e-45, 1e-7, 1e7, 1e300],
    "strength": [*NOT_NUMBERS, 0, -0.1, 1.1],
    "mask_image": NOT_MASKS,
    "output": ["", "sound", "image+image", "image+", 3, ["image"], "label->image", "text "],
    "inputs": [["a"], "a", {"sound": "a"}, {"text": "a"}, {3: "a"}],
    "latents": [
        3,
        [1],
        "codes",
        torch.zeros(1, 4, 4),
        torch.full((1, 4, 4), 33),
        torch.zeros(2, 4, 4).long(),
        {"a": 1},
    ],
}
LATENT_CALL = BOTH | {
    "num_inference_steps": NOT_INTEGERS,
    "guidance_scale": [*NOT_NUMBERS, None],
    "prompt": NOT_TEXTS,
    "class_labels": NOT_LABELS,
    "image": NOT_IMAGES,
    "strength": [*NOT_NUMBERS, 0, -0.1, 1.1],
    "mask_image": NOT_MASKS,
    "eta": [*NOT_NUMBERS, -0.1, 1.1, None],
    "height": [0, -4, 18, 16.0, "16", True, 10**9],
    "width": [0, -4, 18, 16.0, "16", True, 10**9],
    "force_not_quantize": NOT_FLAGS,
    "latents": [
        3,
        [1.0],
        torch.zeros(1, 4, 5, 4),
        torch.zeros(1, 4, 4, 4).long(),
        torch.full((1, 4, 4, 4), float("nan")),
    ],
}
LIKELIHOOD = {
    "num_samples": [*NOT_INTEGERS, 3, 5],
    "batch_size": [value for value in NOT_INTEGERS if value != 10**9],
    "generator": [*NOT_GENERATORS, [torch.Generator()]],
}
SCORE = LIKELIHOOD | {
    "task": [3, None, "image", "->", "->sound", "text->image->text", "text->label", ["text->image"]],
    "prompt": NOT_TEXTS,
    "image": NOT_IMAGES,
}
CLASSIFY = LIKELIHOOD | {
    "image": NOT_IMAGES,
    "labels": [*NOT_TEXTS, ["a dog"], ["a dog", "a dog"], "a dog", [["a"], ["b"]]],
}
RETRIEVE = {
    "query": [*NOT_TEXTS, PICTURE, None],
    "gallery": [None, "gallery.safetensors", 3, {}],
    "top_k": [value for value in NOT_INTEGERS if value is not None],
    "shortlist": [value for value in NOT_INTEGERS if value not in (None, 10**9)],
    "batch_size": LIKELIHOOD["batch_size"],
}
INDEX = {"prompt": NOT_TEXTS, "batch_size": LIKELIHOOD["batch_size"]}


def refused(method, given, bad, names=None):
    """How many bad values there are; each is refused by a ValueError that names its argument."""
    count = 0
    for argument, values in bad.items():
        for value in values:
            count += 1
            arguments = {**given(argument), argument: value}
            try:
                method(**arguments)
            except ValueError as error:
                text = str(error)
                text.encode()  # what can't be shown is escaped
                named = (names or {}).get(argument, (argument,))
                assert any(name in text for name in named), f"{argument}={value!r}: {text}"
                continue
            pytest.fail(f"{argument}={value!r} was taken")
    return count


def refuse_work(monkeypatch, pipe):
    """Whatever a model would compute fails."""

    def work(*args, **options):
        raise AssertionError("a model ran before the arguments were checked")

    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            monkeypatch.setattr(component, "forward", work)
            for name in ("encode_codes", "encode_prefix", "encode_caption", "encode", "encode_states"):
                if hasattr(component, name):
                    monkeypatch.setattr(component, name, work)


def test_every_bad_argument_is_named_before_any_work(pipeline, latent_pipeline, monkeypatch):
    gallery = pipeline.index(image=torch.rand(3, 3, 16, 16))
    refuse_work(monkeypatch, pipeline)
    refuse_work(monkeypatch, latent_pipeline)

    def given(argument):
        if argument in ("mask_image", "strength"):
            return {"prompt": "a red apple", "image": PICTURE}
        return {} if argument in ("class_labels", "image") else {"prompt": "a red apple"}

    counts = {
        "__call__": refused(pipeline, given, CALL, {"inputs": ("inputs",), "output": ("output",)}),
        "latent __call__": refused(latent_pipeline, given, LATENT_CALL),
        "score": refused(
            pipeline.score, lambda argument: {"task": "text->image", "prompt": "a dog", "image": PICTURE}, SCORE
        ),
        "classify": refused(
            pipeline.classify, lambda argument: {"image": PICTURE, "labels": ["a dog", "a cat"]}, CLASSIFY
        ),
        "retrieve": refused(
            pipeline.retrieve, lambda argument: {"query": "a dog", "gallery": gallery, "top_k": 1}, RETRIEVE
        ),
        "index": refused(pipeline.index, lambda argument: {"prompt": ["a dog"]}, INDEX),
    }
    print(f"{sum(counts.values())} bad arguments: {counts}")
    assert sum(counts.values()) > 400


def test_what_does_not_go_together_is_named(pipeline, latent_pipeline):
    for pipe in (pipeline, latent_pipeline):
        with pytest.raises(ValueError, match="num_images_per_prompt=60000 .* makes 120000 samples"):
            pipe(["a dog", "a cat"], num_images_per_prompt=60_000)
        with pytest.raises(ValueError, match="list of 3, but 2 samples"):
            pipe("a dog", num_images_per_prompt=2, generator=[torch.Generator()] * 3)
        with pytest.raises(ValueError, match="one batch size"):
            pipe(["a dog", "a cat"], image=[PICTURE] * 3, strength=0.5)


def test_numbers_may_be_numpys(pipeline, latent_pipeline):
    def seed():
        return torch.Generator().manual_seed(0)

    for pipe, label in ((pipeline, "class_labels"), (latent_pipeline, "class_labels")):
        pictures = []
        for integer, number in ((int, float), (np.int64, np.float32), (np.uint8, np.float64)):
            pictures.append(
                pipe(
                    **{label: integer(1)},
                    num_inference_steps=integer(3),
                    num_images_per_prompt=integer(2),
                    guidance_scale=number(2.0),
                    generator=seed(),
                    output_type="pt",
                ).images
            )
        assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
    gallery = pipeline.index(["a dog", "a cat", "a box"], batch_size=np.int64(2))
    found = pipeline.retrieve(PICTURE, gallery, top_k=np.int32(2), shortlist=np.int64(3)).indices
    assert found.shape == (1, 2)
    assert pipeline.score("->image", image=PICTURE, num_samples=np.int64(2), batch_size=np.int64(1)).nll.shape == (1,)
    labels = pipeline.classify(image=PICTURE, labels=["a dog", "a cat"], num_samples=np.int16(2))
    assert labels.probabilities.shape == (1, 2)


def test_a_scheduler_of_another_kind_is_named(pipeline, latent_pipeline):
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler, but this pipeline needs a MaskedDiffusionScheduler"):
        pipeline("a red apple")
    with pytest.raises(ValueError, match="MaskedDiffusionScheduler"):
        pipeline.score("->image", image=PICTURE)
    for scheduler in (
        MaskedDiffusionScheduler(),
        AmusedScheduler(mask_token_id=8),
        ScoreSdeVeScheduler(),
        RePaintScheduler(),
    ):
        latent_pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=f"scheduler is {type(scheduler).__name__}; this pipeline needs one of"):
            latent_pipeline("a red apple")


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite


def test_logits_that_are_not_finite_are_told_and_nothing_is_decoded(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.image_vq, "decode_codes", None)
    with pytest.raises(ValueError, match="guidance_scale=1e[+]308 is too large: .* logits are not finite"):
        pipeline("a red apple", guidance_scale=1e308)
    monkeypatch.undo()
    pipeline("a red apple", guidance_scale=1e3, num_inference_steps=2)
    for parameter in pipeline.transformer.parameters():
        parameter.data.fill_(float("nan"))
    for call in (
        lambda: pipeline("a red apple", output_type="latent"),
        lambda: pipeline("a red apple", guidance_scale=1.0),
        lambda: pipeline("a red apple", callback_on_step_end=lambda *arguments: {}),
        lambda: pipeline(output="image+text"),
        lambda: pipeline(image=PICTURE, strength=0.5),
        lambda: pipeline.score("text->image", "a dog", PICTURE),
        lambda: pipeline.classify(image=PICTURE),
        lambda: pipeline.classify(image=PICTURE, labels=["a dog", "a cat"]),
    ):
        with pytest.raises(ValueError, match="the transformer's logits are not finite"):
            call()


def test_one_step_that_is_not_finite_is_enough(pipeline, latent_pipeline, monkeypatch):
    for pipe, what in ((pipeline, "logits are"), (latent_pipeline, "prediction is")):
        forward, count = pipe.transformer.forward, []

        def once(*arguments, forward=forward, count=count, **options):
            output = forward(*arguments, **options)
            count.append(output)
            if len(count) == 2:
                for value in output.sample.values() if isinstance(output.sample, dict) else [output.sample]:
                    value[0] = float("nan")
            return output

        monkeypatch.setattr(pipe.transformer, "forward", once)
        with pytest.raises(ValueError, match=f"the transformer's {what} not finite"):
            pipe("a red apple", num_inference_steps=4)
        assert len(count) >= 4


def test_predictions_that_are_not_finite_are_told(latent_pipeline):
    with pytest.raises(ValueError, match="guidance_scale=1e[+]308 is too large: .* prediction is not finite"):
        latent_pipeline("a red apple", guidance_scale=1e308)
    for parameter in latent_pipeline.transformer.parameters():
        parameter.data.fill_(float("nan"))
    for arguments in ({}, {"class_labels": 1}, {"prompt": "a dog"}, {"prompt": "a dog", "guidance_scale": 1.0}):
        with pytest.raises(ValueError, match="the transformer's prediction is not finite"):
            latent_pipeline(**arguments)


def test_arguments_of_older_names(pipeline, latent_pipeline):
    """`class_label` and `labels` of the one pipeline, and labels before pictures in the other, with a deprecation."""

    def draw(pipe, *args, **kwargs):
        options = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
        return pipe(*args, **kwargs, **options).images

    expected = draw(pipeline, class_labels=1)
    with pytest.warns(FutureWarning, match="class_labels"):
        assert (draw(pipeline, class_label=1) == expected).all()
    assert (draw(pipeline, None, None, 1) == expected).all()
    with pytest.raises(ValueError, match="give class_labels or class_label"):
        draw(pipeline, class_labels=1, class_label=1)
    names = dict(enumerate(pipeline.config.labels))
    for given in (names, {str(code): name for code, name in names.items()}):
        assert list(VQDiTPipeline(**pipeline.components, id2label=given).config.labels) == list(names.values())
    with pytest.warns(FutureWarning, match="id2label"):
        VQDiTPipeline(**pipeline.components, labels=list(names.values()))
    with pytest.raises(ValueError, match="id2label=.* are not those of labels"):
        VQDiTPipeline(**pipeline.components, id2label=names, labels=["x", "y", "z"])
    expected = draw(latent_pipeline, class_labels=[1, 2])
    for labels in ([1, 2], ["box", "dot"], (1, "dot")):
        with pytest.warns(FutureWarning, match="second argument"):
            assert (draw(latent_pipeline, None, labels) == expected).all()
    assert (draw(latent_pipeline, None, None, [1, 2]) == expected).all()
