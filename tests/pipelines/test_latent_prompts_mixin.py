"""Prompts of the pipeline over latents: ready states, negative prompts, lengths; with encoders of real classes."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils import logging

from diffusers_vqdit import VQDiTLatentPipeline, VQDiTTransformer2DModel


LONG, SHORT = "a blue box and a yellow dot", "green"
WORDS = ["a red apple", "a blue box", "green", "a yellow dot", "pink box", "white", "and"]


def make(encoder, tokenizer, image_vq, channels):
    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "norm_eps": 1e-6}
    transformer = VQDiTTransformer2DModel(
        **sizes, sample_size=4, patch_size=1, num_embeds_ada_norm=3, caption_channels=channels
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipe = VQDiTLatentPipeline(transformer.eval(), image_vq, DDIMScheduler(clip_sample=False), encoder, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["t5", "clip", "text_vq"])
def pipe(request, encoders, image_vq, text_vq, tokenizer):
    if request.param == "text_vq":
        return make(text_vq, tokenizer, image_vq, 4)
    return make(encoders.text_encoder(request.param), encoders.text_tokenizer(WORDS * 3), image_vq, 16)


def draw(pipe, *args, count=1, **kwargs):
    options = {"num_inference_steps": 3, "output_type": "latent", **kwargs}
    generator = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipe(*args, generator=generator, **options).images


def test_embeds_are_as_good_as_the_prompt_and_a_text_is_as_alone(pipe):
    states, mask = pipe.encode_prompt([SHORT, LONG])
    expected = draw(pipe, [SHORT, LONG], count=2)
    embeds = {"prompt_embeds": states, "prompt_attention_mask": mask}
    assert torch.equal(draw(pipe, **embeds, count=2), expected)
    torch.testing.assert_close(draw(pipe, SHORT), expected[:1], atol=1e-4, rtol=1e-4)
    parts = {**pipe.components, "text_encoder": None, "tokenizer": None}
    without = VQDiTLatentPipeline(**parts)
    without.set_progress_bar_config(disable=True)
    assert torch.equal(draw(without, **embeds, count=2), expected)


def test_longer_prompts_are_cut_with_one_warning(pipe, caplog):
    logging.enable_propagation()
    pipe.encode_prompt([SHORT, LONG * 3, LONG * 4], max_sequence_length=12)
    (told,) = caplog.messages
    assert told.startswith(f"2 of 3 texts of prompt have more than 12 tokens and are cut; the first is '{LONG}")
    caplog.clear()
    pipe.encode_prompt([SHORT], max_sequence_length=12)
    assert not caplog.messages
    logging.disable_propagation()


@pytest.mark.parametrize("label", [None, 1])
def test_a_negative_prompt_that_is_the_prompt_guides_nowhere(pipe, label):
    expected = draw(pipe, LONG, class_labels=label, guidance_scale=1.0)
    for scale in (0.0, 4.0):
        same = draw(pipe, LONG, class_labels=label, negative_prompt=LONG, guidance_scale=scale)
        assert torch.equal(same, expected)
    away = draw(pipe, LONG, class_labels=label, negative_prompt=SHORT)
    assert not torch.equal(away, draw(pipe, LONG, class_labels=label))
    states, mask = pipe.encode_prompt([SHORT])
    embeds = {"negative_prompt_embeds": states, "negative_prompt_attention_mask": mask}
    assert torch.equal(draw(pipe, LONG, class_labels=label, **embeds), away)
    torch.testing.assert_close(
        draw(pipe, LONG, class_labels=label, negative_prompt=SHORT, guidance_scale=0.0),
        draw(pipe, SHORT, class_labels=label, guidance_scale=1.0),
        atol=1e-5,
        rtol=1e-5,
    )


def test_an_empty_negative_prompt_and_another_length(encoders, image_vq):
    pipe = make(encoders.text_encoder("clip"), encoders.text_tokenizer(WORDS * 3), image_vq, 16)
    empty = draw(pipe, LONG, negative_prompt="")
    states, mask = pipe.encode_prompt([""])
    ready = {"negative_prompt_embeds": states, "negative_prompt_attention_mask": mask}
    assert torch.equal(draw(pipe, LONG, **ready), empty) and empty.isfinite().all()
    some = draw(pipe, [LONG, SHORT], negative_prompt=["", "white"], count=2)  # beside another
    torch.testing.assert_close(some[:1], draw(pipe, LONG, negative_prompt=[""]), atol=1e-4, rtol=1e-4)
    short = draw(pipe, LONG, max_sequence_length=4)
    ids = pipe.tokenizer(LONG, truncation=True, max_length=4, return_tensors="pt").input_ids
    states = pipe.text_encoder(input_ids=ids).last_hidden_state
    assert torch.equal(short, draw(pipe, prompt_embeds=states))
    with pytest.raises(ValueError, match=r"max_sequence_length=15 must be an integer in \[1, 14\]"):
        draw(pipe, LONG, max_sequence_length=15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "x", "prompt_embeds": torch.zeros(1, 2, 4)}, "give prompt or prompt_embeds, not both"),
        ({"prompt_embeds": torch.zeros(1, 2, 5)}, r"prompt_embeds must be states \(B, n, 4\)"),
        ({"prompt": "x", "prompt_attention_mask": torch.ones(1, 2)}, "prompt_attention_mask needs prompt_embeds"),
        ({"negative_prompt": "x"}, "negative_prompt needs a prompt"),
        ({"prompt": "x", "negative_prompt": ["x", "y"]}, "negative_prompt has 2 texts, but prompt 1"),
        ({"prompt": "x", "negative_prompt": ""}, "negative_prompt must be a non-empty string"),
        ({"prompt": "x", "max_sequence_length": 5}, "max_sequence_length=5 must be its TextVQModel's, 12"),
        ({"class_labels": 1, "max_sequence_length": 12}, "max_sequence_length=12 is for texts; none was passed"),
        (
            {"prompt": "x", "negative_prompt": "x", "negative_prompt_embeds": torch.zeros(1, 2, 4)},
            "give negative_prompt or negative_prompt_embeds, not both",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 2, 4), "prompt_attention_mask": torch.full((1, 2), 2)},
            "prompt_attention_mask must be 0 at padding and else 1",
        ),
    ],
)
def test_what_does_not_fit_is_named(text_vq, tokenizer, image_vq, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(make(text_vq, tokenizer, image_vq, 4), **arguments)
