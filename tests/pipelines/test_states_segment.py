"""Frozen encoders as given segments of the pipeline: laws of prompts, embeds, negatives and padding."""

import copy

import numpy as np
import pytest
import torch
from diffusers.utils import logging
from PIL import Image

from diffusers_vqdit import MaskedDiffusionScheduler, MultiTokenizerModel, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.padded_states import PaddedStates


LONG, SHORT = "a blue box and a yellow dot", "green"
WORDS = ["a red apple", "a blue box", "green", "a yellow dot", "pink box", "white", "and"]
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 20, 3), dtype=np.uint8), "RGB") for i in range(3)
]
SEGMENTS = {
    "image": {"vocab_size": 32, "shape": [4, 4]},
    "label": {"vocab_size": 3, "shape": [1]},
    "prompt": {"channels": 16, "shape": [14]},
    "reference": {"channels": 16, "shape": [5]},
}
TASKS = ["prompt->image", "prompt->label", "prompt+label->image", "reference->image", "prompt+reference->image"]
ENTRIES = {
    "prompt": {"modality": "states"},
    "reference": {"modality": "image_states"},
    "label": {"modality": "label", "names": ["fruit", "box", "dot"]},
}


def make_transformer(segments=SEGMENTS, tasks=TASKS, **config):
    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    model = VQDiTTransformer2DModel(**sizes, segments=segments, tasks=tasks, **config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def make(encoders, image_vq, kind="t5", vision="clip", tasks=TASKS, **options):
    parts = {
        "transformer": make_transformer(tasks=tasks),
        "scheduler": MaskedDiffusionScheduler(),
        "image_vq": image_vq,
        "text_encoder": encoders.text_encoder(kind),
        "tokenizer_2": encoders.text_tokenizer(WORDS * 3, "left" if kind == "gpt2" else "right"),
        "image_encoder": encoders.image_encoder(vision),
        "feature_extractor": encoders.feature_extractor(),
    }
    pipe = VQDiTPipeline(**parts, segments=ENTRIES, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(encoders, image_vq):
    return make(encoders, image_vq)


def codes(pipe, *args, seed=0, **kwargs):
    options = {"num_inference_steps": 6, "output_type": "latent", "output": "image", **kwargs}
    count = options.pop("count", 1)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return pipe(*args, generator=generator, **options).segments["image"]


def test_a_segment_of_states_beside_codes_is_encoded_by_its_name(encoders, image_vq, text_vq, tokenizer):
    segments = {**SEGMENTS, "text": {"vocab_size": 64, "shape": [12]}}
    parts = {**make(encoders, image_vq).components, "text_vq": text_vq, "tokenizer": tokenizer}
    parts["transformer"] = make_transformer(segments, [*TASKS, "image->text"])
    pipe = VQDiTPipeline(**parts, segments=ENTRIES)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pipe.encode_prompt([SHORT]), pipe._segment("text").encode([SHORT]))
    states, mask = pipe.encode_prompt([SHORT, LONG], segment="prompt")
    assert states.is_floating_point() and mask.shape == states.shape[:2] and states.shape[2] == 16
    given = {"prompt_embeds": states, "prompt_attention_mask": mask}
    assert torch.equal(codes(pipe, count=2, **given), codes(pipe, count=2, inputs={"prompt": [SHORT, LONG]}))


@pytest.mark.parametrize("kind", ["t5", "clip", "bert", "gpt2"])
def test_a_text_does_not_depend_on_the_others_in_its_batch(encoders, image_vq, kind):
    """Nor on its padding: the states of any encoder, and what is drawn and scored from them."""
    pipe = make(encoders, image_vq, kind)
    states, mask = pipe.encode_prompt([SHORT, LONG])
    assert mask[1].all() and not mask[0].all() and states.shape[1] <= 14
    for row, text in enumerate((SHORT, LONG)):
        alone, own = pipe.encode_prompt([text])
        assert own.all()
        torch.testing.assert_close(states[row][mask[row]], alone[0], atol=1e-5, rtol=1e-4)
    both = codes(pipe, [SHORT, LONG], count=2)
    assert torch.equal(both[:1], codes(pipe, SHORT)) and torch.equal(both[1:], codes(pipe, LONG, seed=1))
    options = {"image": PICTURES[:2], "num_samples": 4}
    scores = [
        pipe.score("prompt->image", text, **options, generator=torch.Generator().manual_seed(0)).nll
        for text in ([SHORT, LONG], SHORT, LONG)
    ]
    torch.testing.assert_close(scores[0], torch.stack([scores[1][0], scores[2][1]]), atol=1e-4, rtol=1e-5)
    assert (scores[1] - scores[2]).abs().min() > 1e-3  # the text is seen


def test_embeds_are_as_good_as_the_prompt(pipe):
    states, mask = pipe.encode_prompt([SHORT, LONG])
    expected = codes(pipe, [SHORT, LONG], count=2)
    embeds = {"prompt_embeds": states, "prompt_attention_mask": mask}
    without = make_like(pipe, text_encoder=None, tokenizer_2=None)
    for one in (pipe, without):
        assert torch.equal(codes(one, **embeds, count=2), expected)
        assert torch.equal(codes(one, inputs={"prompt": PaddedStates(states, mask)}, count=2), expected)
    assert not torch.equal(codes(pipe, prompt_embeds=states.flip(1), count=2), expected)
    with pytest.raises(ValueError, match="needs the component text_encoder"):
        codes(without, SHORT)
    assert torch.equal(codes(pipe, inputs={"prompt": LONG}), codes(pipe, LONG))


def test_a_negative_prompt_is_checked_as_the_prompt_is(pipe):
    states, mask = pipe.encode_prompt([LONG])
    ready = {"prompt_embeds": states, "prompt_attention_mask": mask, "output": "image", "guidance_scale": 2.0}
    with pytest.raises(ValueError, match="negative_prompt=.green. needs the component text_encoder, which is None"):
        make_like(pipe, text_encoder=None, tokenizer_2=None)(**ready, negative_prompt=SHORT)
    scales = {"prompt": 3.0, "reference": 1.0}  # the first of which is no step
    with pytest.raises(ValueError, match="negative_prompt with guidance_scale=.*needs one scale"):
        pipe(
            LONG,
            inputs={"reference": PICTURES[0]},
            output="image",
            negative_prompt=SHORT,
            guidance_scale=scales,
        )


def make_like(pipe, **parts):
    other = VQDiTPipeline(**{**pipe.components, **parts}, segments=pipe.config.segments)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("given", [{}, {"class_labels": 1}, {"inputs": {"reference": PICTURES[0]}}])
def test_a_negative_prompt_that_is_the_prompt_guides_nowhere(pipe, given):
    """Bit for bit, whatever else is given; and no unconditional task is needed."""
    assert "->image" not in pipe.transformer.config.tasks
    expected = codes(pipe, LONG, **given, guidance_scale=1.0)
    for scale in (0.0, 2.5, 7.0):
        same = codes(pipe, LONG, **given, negative_prompt=LONG, guidance_scale=scale)
        assert torch.equal(same, expected)
    away = codes(pipe, LONG, **given, negative_prompt=SHORT, guidance_scale=7.0)
    assert not torch.equal(away, expected)
    assert torch.equal(codes(pipe, LONG, **given, negative_prompt=SHORT, guidance_scale=1.0), expected)
    # At 0 it is the negative itself that is drawn from.
    assert torch.equal(
        codes(pipe, LONG, **given, negative_prompt=SHORT, guidance_scale=0.0),
        codes(pipe, SHORT, **given, guidance_scale=1.0),
    )
    assert pipe(LONG, **given, output="image", negative_prompt="", num_inference_steps=2).images
    states, mask = pipe.encode_prompt([""])
    ready = {"negative_prompt_embeds": states, "negative_prompt_attention_mask": mask}
    assert torch.equal(codes(pipe, LONG, **given, **ready), codes(pipe, LONG, **given, negative_prompt=""))
    assert pipe.guidance_scale == 3.0  # as where the unconditional task is known


def test_negative_prompts_are_one_or_as_many_and_may_be_embeds(pipe):
    options = {"guidance_scale": 4.0, "count": 4, "num_images_per_prompt": 2}
    expected = codes(pipe, [SHORT, LONG], negative_prompt=["white", "pink box"], **options)
    states, mask = pipe.encode_prompt(["white", "pink box"])
    embeds = {"negative_prompt_embeds": states, "negative_prompt_attention_mask": mask}
    assert torch.equal(codes(pipe, [SHORT, LONG], **embeds, **options), expected)
    one = codes(pipe, SHORT, negative_prompt="white", **{**options, "count": 2})
    assert torch.equal(one, expected[:2])  # and each sample as alone
    both = codes(pipe, [SHORT, LONG], negative_prompt="white", **options)
    assert torch.equal(both[:2], expected[:2]) and not torch.equal(both[2:], expected[2:])
    some = codes(pipe, [SHORT, LONG], negative_prompt=["white", ""], **options)  # an empty one beside another
    assert torch.equal(some[:2], expected[:2])
    assert torch.equal(some[2:], codes(pipe, [SHORT, LONG], negative_prompt="", **options)[2:])


def test_the_negative_of_a_text_of_codes(pipeline):
    """Its codes take the place of the unconditional half."""
    expected = codes(pipeline, "a red apple", guidance_scale=1.0)
    same = codes(pipeline, "a red apple", negative_prompt="a red apple", guidance_scale=5.0)
    assert torch.equal(same, expected)
    away = codes(pipeline, "a red apple", negative_prompt="green", guidance_scale=5.0)
    assert not torch.equal(away, codes(pipeline, "a red apple", guidance_scale=5.0))
    codes_of = pipeline.encode_prompt(["a red apple"])
    logits = [
        pipeline.transformer({"image": torch.full((1, 4, 4), 32)}, given={"text": text}).sample["image"]
        for text in (codes_of, pipeline.encode_prompt(["green"]))
    ]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        step = MaskedDiffusionScheduler.step
        patch.setattr(MaskedDiffusionScheduler, "step", lambda self, *a, **k: seen.append(a[0]) or step(self, *a, **k))
        codes(pipeline, "a red apple", negative_prompt="green", guidance_scale=5.0)
    torch.testing.assert_close(seen[0], logits[1] + 5.0 * (logits[0] - logits[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vision", ["clip", "dinov2"])
def test_states_of_pictures(encoders, image_vq, vision):
    pipe = make(encoders, image_vq, vision=vision)
    drawn = [codes(pipe, inputs={"reference": one}) for one in PICTURES]
    assert not torch.equal(drawn[0], drawn[1])
    together = codes(pipe, inputs={"reference": PICTURES}, count=3)
    assert torch.equal(together[:1], drawn[0])
    # As the feature extractor sees it, after it was cropped.
    square = PICTURES[0].crop((2, 0, 18, 16))
    pixels = pipe.feature_extractor(square, return_tensors="pt").pixel_values
    states = pipe.image_encoder(pixels).last_hidden_state
    torch.testing.assert_close(pipe.encode_image(PICTURES[0], "reference"), states, atol=1e-4, rtol=1e-4)
    assert torch.equal(codes(pipe, inputs={"reference": PaddedStates(states)}), drawn[0])
    padded = make_like(pipe)
    padded.register_to_config(resize_mode="pad")
    assert not torch.equal(padded.encode_image(PICTURES[0], "reference"), states)


def test_what_states_are_given_for_is_compared(pipe, encoders, image_vq):
    """score, classify, index and retrieve with states on the given side."""
    probabilities = pipe.classify([SHORT, LONG]).probabilities
    torch.testing.assert_close(probabilities[:1], pipe.classify(SHORT).probabilities, atol=1e-5, rtol=1e-5)
    pipe = make(encoders, image_vq, tasks=[*TASKS, "->image"])
    with pytest.raises(ValueError, match=r"searched, one of \['prompt', 'reference'\]"):
        pipe.index(image=PICTURES)
    gallery = pipe.index(image=PICTURES, query="prompt")
    found = pipe.retrieve([SHORT, LONG], gallery, top_k=3)
    for row, text in enumerate((SHORT, LONG)):
        alone = pipe.retrieve(text, gallery, top_k=3)
        assert torch.equal(alone.indices[0], found.indices[row])
        torch.testing.assert_close(alone.scores[0], found.scores[row], atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="'prompt' has states of an encoder; a gallery holds codes"):
        pipe.index([SHORT], query="image")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "x", "prompt_embeds": torch.zeros(1, 2, 16)}, "give prompt or prompt_embeds, not both"),
        ({"prompt_embeds": torch.zeros(1, 2, 15)}, r"prompt_embeds must be states \(B, n, 16\)"),
        ({"prompt_embeds": torch.zeros(2, 16)}, "prompt_embeds must be states"),
        ({"prompt_embeds": torch.zeros(1, 2, 16).long()}, "prompt_embeds must be states .* got torch.int64"),
        ({"prompt_embeds": [[1.0]]}, "prompt_embeds must be states"),
        ({"prompt_embeds": torch.full((1, 2, 16), torch.nan)}, "prompt_embeds has states that are not finite"),
        (
            {"prompt_embeds": torch.zeros(1, 2, 16), "prompt_attention_mask": torch.ones(1, 3)},
            r"prompt_attention_mask must be a tensor of shape \(1, 2\)",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 2, 16), "prompt_attention_mask": torch.full((1, 2), -1e9)},
            "prompt_attention_mask must be 0 at padding and else 1",
        ),
        ({"prompt": "x", "prompt_attention_mask": torch.ones(1, 2)}, "prompt_attention_mask needs prompt_embeds"),
        ({"negative_prompt": "x", "output": "image"}, "negative_prompt needs a prompt"),
        ({"negative_prompt": "x", "class_labels": 1}, "negative_prompt needs a prompt"),
        ({"prompt": "x", "negative_prompt": ["x", "y"]}, "negative_prompt has 2 texts, but prompt 1"),
        ({"prompt": "x", "negative_prompt": 3}, "negative_prompt=3: .* got 3"),
        (
            {"class_labels": 1, "negative_prompt_embeds": torch.zeros(1, 2, 16)},
            "negative_prompt_embeds needs a prompt",
        ),
        (
            {"prompt": "x", "negative_prompt_embeds": torch.zeros(2, 2, 16)},
            "^negative_prompt_embeds has 2 texts, but prompt 1",
        ),
        (
            {
                "prompt": "x",
                "inputs": {"reference": PICTURES[0]},
                "negative_prompt_embeds": torch.zeros(1, 2, 16),
                "guidance_scale": {"prompt": 2.0, "reference": 1.0},
            },
            "(?s)^negative_prompt_embeds with guidance_scale=",
        ),
        (
            {"prompt": "x", "negative_prompt": "x", "negative_prompt_embeds": torch.zeros(1, 2, 16)},
            "give negative_prompt or negative_prompt_embeds, not both",
        ),
        ({"prompt": "x", "guidance_scale": 2.0}, "needs the task '->image', .* or a negative_prompt; use 1"),
        ({"prompt": "x", "max_sequence_length": 15}, r"max_sequence_length=15 must be an integer in \[1, 14\]"),
        ({"prompt": "x", "max_sequence_length": 0}, "max_sequence_length=0 must be"),
        ({"inputs": {"reference": PICTURES[0]}, "max_sequence_length": 3}, "none was passed"),
        ({"prompt": "x", "inputs": {"prompt": "y"}}, "inputs has 'prompt', which prompt says too"),
        ({"prompt": "x", "output": "prompt"}, "never generated"),
        ({"inputs": {"reference": "x"}}, r"inputs\['reference'\]: image must be"),
        ({"prompt": " "}, "prompt must be a non-empty string"),
    ],
)
def test_what_does_not_fit_is_named(encoders, image_vq, arguments, message):
    pipe = make(encoders, image_vq, "clip")
    with pytest.raises(ValueError, match=message):
        pipe(**{"output": "image", **arguments})


def test_a_longer_text_is_cut_where_it_is_asked_for(pipe):
    short = codes(pipe, LONG, max_sequence_length=4)
    assert not torch.equal(short, codes(pipe, LONG))
    tokenizer = pipe.tokenizer_2
    ids = tokenizer(LONG, truncation=True, max_length=4, return_tensors="pt").input_ids
    states = pipe.text_encoder(input_ids=ids).last_hidden_state
    assert torch.equal(short, codes(pipe, prompt_embeds=states))
    embeds, mask = pipe.encode_prompt([LONG])
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "guidance_scale": 0.0}
    away = codes(pipe, **given, negative_prompt=LONG, max_sequence_length=4)
    assert torch.equal(away, codes(pipe, prompt_embeds=states, guidance_scale=1.0))  # of the negative text alone
    with pytest.raises(ValueError, match="max_sequence_length=4 is for texts that a text encoder reads; none"):
        codes(pipe, **given, negative_prompt_embeds=states, max_sequence_length=4)
    with pytest.raises(ValueError, match="negative_prompt='green' needs the component text_encoder, which is None"):
        codes(make_like(pipe, text_encoder=None), **given, negative_prompt="green")


def test_longer_texts_are_cut_with_one_warning(pipe, caplog):
    logging.enable_propagation()
    pipe.encode_prompt([SHORT, LONG * 3, LONG * 4])
    (told,) = caplog.messages
    assert told.startswith(f"2 of 3 texts of prompt have more than 14 tokens and are cut; the first is '{LONG}")
    logging.disable_propagation()


def test_nothing_of_the_encoders_is_changed(pipe):
    before = {name: copy.deepcopy(pipe.components[name].state_dict()) for name in ("text_encoder", "image_encoder")}
    codes(pipe, LONG, inputs={"reference": PICTURES[0]}, negative_prompt=SHORT)
    for name, weights in before.items():
        after = pipe.components[name].state_dict()
        assert all(torch.equal(value, after[key]) for key, value in weights.items())
        assert all(parameter.grad is None for parameter in pipe.components[name].parameters())


def test_saved_and_loaded_with_encoders_and_a_second_one_in_the_container(pipe, encoders, tmp_path):
    several = MultiTokenizerModel(
        {"second": encoders.text_encoder("bert")}, {"second": encoders.text_tokenizer(WORDS * 3)}
    )
    segments = {**SEGMENTS, "more": {"channels": 16, "shape": [14]}}
    parts = {**pipe.components, "transformer": make_transformer(segments, [*TASKS, "prompt+more->image"])}
    entries = {**ENTRIES, "more": {"modality": "states", "tokenizer": "second"}}
    both = VQDiTPipeline(**{**parts, "segment_tokenizers": several}, segments=entries)
    both.save_pretrained(tmp_path)
    loaded = VQDiTPipeline.from_pretrained(tmp_path)
    for one in (both, loaded):
        one.set_progress_bar_config(disable=True)
    call = {"inputs": {"prompt": LONG, "more": SHORT}}
    assert torch.equal(codes(loaded, **call), codes(both, **call))
    with pytest.raises(ValueError, match="prompt_embeds is for a segment .* inputs=..... by name"):
        codes(loaded, prompt_embeds=torch.zeros(1, 2, 16))
    without = VQDiTPipeline.from_pretrained(tmp_path, text_encoder=None, image_encoder=None)
    assert without.text_encoder is None
    half = VQDiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.text_encoder.dtype == torch.bfloat16
    half.set_progress_bar_config(disable=True)
    assert codes(half, **call).shape == (1, 4, 4)


def test_modalities_fit_what_the_transformer_has(pipe):
    parts = {**pipe.components}
    for name, modality, message in (
        ("prompt", "text", r"segments\['prompt'\]\['modality'\]='text': the transformer has 'prompt' as states"),
        ("image", "states", r"the transformer has 'image' as codes"),
    ):
        with pytest.raises(ValueError, match=message):
            VQDiTPipeline(**parts, segments={**ENTRIES, name: {"modality": modality}})
    # Without an entry, states are those of a text encoder.
    entries = {name: entry for name, entry in ENTRIES.items() if name != "prompt"}
    assert torch.equal(codes(make_entries(parts, entries), LONG), codes(pipe, LONG))


def make_entries(parts, entries):
    pipe = VQDiTPipeline(**parts, segments=entries)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_segment_that_is_given_only_is_of_the_kind_of_its_values(encoders, image_vq):
    kinds = {name: one.kind for name, one in make(encoders, image_vq)._segments.items()}
    assert kinds == {"image": "images", "label": "labels", "prompt": "texts", "reference": "images"}
