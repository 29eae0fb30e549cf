"""Segments of residual codes, (h, w, q) and (L, q): all that takes codes takes them, from data to pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vqdit import ImageVQModel, MaskedDiffusionScheduler, TextVQModel, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.text_segment import encode_texts
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset


RESIDUAL = {"quantizer_type": "rvq", "num_quantizers": 2}
GEOMETRY = {
    "image": {"vocab_size": 32, "shape": [4, 4, 2], "patch": [1, 1, 2], "separate_codebooks": True},
    "image_lowres": {"vocab_size": 32, "shape": [4, 4, 2], "shared_with": "image"},
    "text": {"vocab_size": 64, "shape": [6, 2], "patch": [1, 2], "separate_codebooks": True},
    "kind": {"vocab_size": 64, "shape": [6, 2], "shared_with": "text"},
    "label": {"vocab_size": 2, "shape": [1]},
}
TASKS = ["text->image", "image->text", "label->image", "->image", "->text", "image->label", "->image+text"]
TASKS += ["image_lowres->image", "text->kind"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))


@pytest.fixture
def tokenizers(tokenizer):
    image_vq = ImageVQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=32,
        sample_size=16,
        **RESIDUAL,
    )
    text_vq = TextVQModel(
        vocab_size=len(tokenizer),
        max_length=12,
        downsample_factor=2,
        num_codes=64,
        hidden_size=16,
        code_dim=4,
        codebook_norm="none",
        **RESIDUAL,
    )
    for quantizer in (image_vq.quantize, text_vq.quantizers):
        for index, level in enumerate(quantizer):
            level.embedding.weight.data = 2.0**-index * torch.randn_like(level.embedding.weight)
    return image_vq.eval(), text_vq.eval(), tokenizer


@pytest.fixture
def pipe(tokenizers):
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, segments=GEOMETRY, tasks=TASKS
    )
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipe = VQDiTPipeline(transformer.eval(), MaskedDiffusionScheduler(), *tokenizers, labels=["round", "square"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seed(number=0):
    return torch.Generator().manual_seed(number)


def test_a_dataset_of_them_is_what_a_transformer_is_built_of(tokenizers, picture_folder, tmp_path):
    image_vq, text_vq, tokenizer = tokenizers
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image")
    dataset = dataset.add_column("kind", dataset["label"])
    folder = encode_dataset(
        dataset,
        tmp_path / "codes",
        resolution=16,
        image_vq=image_vq,
        text_vq=text_vq,
        tokenizer=tokenizer,
        image_column="image",
        caption_column="text",
        prompt_columns=["label"],
        text_columns=["kind"],
        label_column="label",
        image_augmentations=1,
        lowres_factor=2,
        shard_size=4,
    )
    codes = CodeDataset(folder)
    pictures = {name: {**GEOMETRY[name], "centered_positions": True} for name in ("image", "image_lowres")}
    assert codes.segments == {**GEOMETRY, **pictures}
    assert {name: entry["modality"] for name, entry in codes.entries.items()} == {
        **dict.fromkeys(["image", "image_lowres"], "image"),
        **dict.fromkeys(["text", "kind"], "text"),
        "label": "label",
    }
    given, generated = codes.batch(torch.arange(10), Task.parse("image->text+kind"), generator=seed())
    assert torch.equal(generated["text"], encode_texts(dataset["text"], text_vq, tokenizer))
    assert torch.equal(generated["kind"], encode_texts(dataset["label"], text_vq, tokenizer))
    assert given["image"].shape == (10, 4, 4, 2) and codes.prompts["text"].shape == (10, 2, 6, 2)
    model = VQDiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, segments=codes.segments)
    assert model({"text": generated["text"]}).sample["text"].shape == (10, 12, 64)


def test_every_task_draws_them(pipe):
    assert pipe("a dot", output_type="latent", generator=seed()).images.shape == (1, 4, 4, 2)
    assert pipe("a dot", num_inference_steps=2, generator=seed()).images[0].size == (16, 16)
    both = pipe(output="image+text", num_inference_steps=2, generator=seed())
    assert both.images[0].size == (16, 16) and isinstance(both.texts[0], str)
    assert isinstance(pipe(image=PICTURE, generator=seed()).texts[0], str)
    assert pipe.num_timesteps == 12  # as many as there are codes
    assert pipe(image=PICTURE, output="label", generator=seed()).labels[0] in ("round", "square")
    small = PICTURE.resize((12, 8))
    assert pipe(image=small, output="image", num_inference_steps=1).images[0].size == (24, 16)
    assert isinstance(pipe("a dot", output="kind", generator=seed()).segments["kind"][0], str)


def test_repainting_forgets_all_codes_of_a_position_that_the_mask_touches(pipe):
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 5, 16))
    partial = pipe._segments["image"].encode_partial([PICTURE], mask).codes[0]
    unknown = partial == 32
    assert torch.equal(unknown[..., 0], unknown[..., 1])
    assert unknown[:, :2].all() and not unknown.all()  # 5 pixels touch two columns of codes
    out = pipe(image=PICTURE, output="image", mask_image=mask, num_inference_steps=3, generator=seed()).images[0]
    assert np.array_equal(np.asarray(out)[:, 5:], np.asarray(PICTURE)[:, 5:])


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_repair_forgets_all_codes_of_a_position(pipe, strength):
    codes = pipe.encode_image(PICTURE)
    unknown = pipe._forget(codes, strength, None, "image") == 32
    assert torch.equal(unknown[..., 0], unknown[..., 1]) and unknown.sum() == 2 * round(16 * strength)
    out = pipe(image=PICTURE, strength=strength, output_type="latent", generator=seed()).images
    assert torch.equal(out[~unknown], codes[~unknown])


@pytest.mark.parametrize("text", ["a <mask> apple", "<mask> <mask>", "green"])
def test_infilling_forgets_all_codes_of_a_position_with_a_blank(pipe, text):
    codes, tokens, known = pipe._segments["text"].infill([text])
    unknown = (codes == 64)[0]
    assert torch.equal(unknown, ~known[0].view(6, 2).all(1, keepdim=True).expand(6, 2))  # a window of one position
    whole = pipe.text_vq.encode_codes(torch.where(known, tokens, 5))[0]
    assert torch.equal(codes[0][~unknown], whole[~unknown])
    if text == "a <mask> apple":
        assert pipe(text, output="text", generator=seed()).texts[0].startswith("a")


def test_likelihoods_and_retrieval_take_them(pipe):
    score = pipe.score("text->image", ["a dot", "green"], PICTURE, num_samples=2, generator=seed())
    assert score.num_codes == 32 and score.nll.isfinite().all() and score.nll.shape == (2,)
    gallery = pipe.index(image=[PICTURE, PICTURE.rotate(90), PICTURE.rotate(180)])
    assert pipe.retrieve("a dot", gallery, top_k=2).indices.shape == (1, 2)
    assert pipe.classify(image=PICTURE, labels=["a dot", "green"], num_samples=2).labels[0] in ("a dot", "green")


def test_what_was_saved_and_loaded_gives_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = VQDiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for arguments in ({"prompt": "a dot"}, {"image": PICTURE}, {"image": PICTURE, "strength": 0.3}):
        options = {"output_type": "latent", "generator": seed()}
        expected, found = pipe(**arguments, **options), loaded(**arguments, **{**options, "generator": seed()})
        for name, codes in expected.segments.items():
            assert torch.equal(torch.as_tensor(found.segments[name]), torch.as_tensor(codes))
