"""How pipelines read pictures and masks: as the training did, never squeezed; and what is pasted back."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffusers_vqdit import VQDiTLatentPipeline, VQDiTPipeline
from diffusers_vqdit.utils.decoding import decode_image
from diffusers_vqdit.utils.fitting import fitted_box, resize_image


def picture(size=(16, 16), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def turned(image, orientation=6):
    """What a camera held sideways stores of a picture."""
    stored = image.transpose({6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[orientation])
    stored.getexif()[0x0112] = orientation
    return stored


def box_mask(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def like(pipeline, resize_mode):
    components = {name: part for name, part in pipeline.components.items() if part is not None}
    pipe = type(pipeline)(**components, resize_mode=resize_mode)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, image):
    """The latents that a picture begins with: at the last of many steps next to nothing is changed."""
    options = {"strength": 1e-3, "num_inference_steps": 1000, "output_type": "latent"}
    return pipe(image=image, generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize("resize_mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [(40, 24), (24, 40), (64, 64), (16, 90), (5, 3)])
def test_codes_are_those_of_the_picture_as_training_reads_it(pipeline, tmp_path, size, resize_mode):
    pipe = like(pipeline, resize_mode)
    image = picture(size)
    expected = pipe.encode_image(resize_image(image, (16, 16), resize_mode))
    image.save(tmp_path / "a.png")
    trained = decode_image({"path": str(tmp_path / "a.png")}, 16, resize_mode)
    assert torch.equal(pipe.image_vq.encode_codes(trained[None]), expected)
    array = np.asarray(image) / 255
    tensor = torch.tensor(array).permute(2, 0, 1)
    for other in (
        image,
        turned(image),
        turned(image, 3),
        array,
        array[None].astype(np.float32),
        tensor,
        [tensor.float()],
    ):
        assert torch.equal(pipe.encode_image(other), expected)


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (32, 32), (9, 31)])
def test_cut_outs_are_whole_beside_photographs(pipeline, latent_pipeline, size):
    """In one call, as training reads them: a cut-out that touches all sides, and its pixels without transparency."""
    ring = Image.new("L", size, 255)
    ring.paste(0, (size[0] // 3, size[1] // 3, size[0] - size[0] // 3, size[1] - size[1] // 3))
    image = picture(size)
    image.putalpha(ring)
    file = io.BytesIO()
    image.save(file, "PNG")
    plain = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
    codes, latents = (like(one, "auto") for one in (pipeline, latent_pipeline))
    found = codes.encode_image([image, plain, turned(image)])
    expected = [like(pipeline, mode).encode_image(plain)[0] for mode in ("pad", "crop", "pad")]
    assert torch.equal(found, torch.stack(expected))
    trained = decode_image({"bytes": file.getvalue()}, 16, "auto")
    assert torch.equal(pipeline.image_vq.encode_codes(trained[None])[0], expected[0])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    options = {"strength": 1e-3, "num_inference_steps": 1000, "output_type": "latent"}
    begun = latents(image=[image, plain], generator=generators, **options).images
    for one, mode in zip(begun, ("pad", "crop"), strict=True):
        torch.testing.assert_close(one, latents_of(like(latent_pipeline, mode), plain)[0])


def test_how_pictures_are_read_is_saved_and_old_configs_crop(pipeline, latent_pipeline, tmp_path):
    for number, pipe in enumerate((pipeline, latent_pipeline)):
        assert pipe.config.resize_mode == "crop"
        folder = tmp_path / str(number)
        like(pipe, "pad").save_pretrained(folder)
        assert type(pipe).from_pretrained(folder).config.resize_mode == "pad"
        index = (folder / "model_index.json").read_text()
        (folder / "model_index.json").write_text(index.replace('"resize_mode": "pad",', ""))
        assert type(pipe).from_pretrained(folder).config.resize_mode == "crop"
        for wrong in ("squeeze", None, 3):
            with pytest.raises(ValueError, match="resize_mode=.* must be one of .*'crop', 'pad'"):
                like(pipe, wrong)


def test_latents_begin_from_a_picture_that_is_not_squeezed(latent_pipeline):
    image = picture((32, 16))
    middle = image.crop((8, 0, 24, 16))
    assert torch.equal(latents_of(latent_pipeline, image), latents_of(latent_pipeline, middle))
    assert torch.equal(latents_of(latent_pipeline, turned(image)), latents_of(latent_pipeline, middle))
    padded = like(latent_pipeline, "pad")
    whole = ImageOps.pad(image, (32, 32), color="white")
    difference = latents_of(padded, image) - latents_of(padded, whole)
    assert difference.abs().mean() < 0.1 * latents_of(padded, whole).abs().mean()


@pytest.mark.parametrize("kind", ["codes", "latents"])
@pytest.mark.parametrize("size", [(40, 16), (17, 50), (16, 16), (9, 5), (3, 120)])
def test_a_picture_to_repaint_keeps_its_size_and_its_black_pixels(pipeline, latent_pipeline, kind, size):
    pipe = pipeline if kind == "codes" else latent_pipeline
    image = picture(size)
    mask = box_mask(size, (size[0] // 3, size[1] // 3, size[0] - size[0] // 3, size[1] - size[1] // 3))
    inside = np.asarray(mask) > 0
    for given in (image, turned(image)):
        out = pipe("a red apple", image=given, mask_image=mask, num_inference_steps=2).images[0]
        assert out.size == size
        assert np.array_equal(np.asarray(out)[~inside], np.asarray(image)[~inside])
        assert (np.asarray(out)[inside] != np.asarray(image)[inside]).any()
    tensor = torch.rand(1, 3, size[1], size[0])
    out = pipe("a red apple", image=tensor, mask_image=inside, num_inference_steps=2, output_type="pt").images
    assert torch.equal(out[..., ~torch.tensor(inside)], tensor[..., ~torch.tensor(inside)])


def test_a_wide_picture_is_fitted_whole_before_it_is_repainted(pipeline):
    image = picture((32, 16))
    segment = pipeline._segment("image")
    codes = segment.encode_partial(image, box_mask((32, 16), (0, 0, 8, 8))).codes
    top, _, height, _ = fitted_box((16, 32), (16, 16))
    assert (top, height) == (4, 8)
    unknown = codes[0] == 32
    # The encoder sees further than its patches, but what the mask itself touches is a part of the middle rows.
    assert unknown[1, 0] and not torch.equal(
        codes, segment.encode_partial(image.resize((16, 16)), Image.new("L", (16, 16))).codes
    )
    canvas = ImageOps.pad(image, (32, 32), color="white")
    padded = segment.encode_partial(canvas, box_mask((32, 32), (0, 8, 8, 16))).codes
    known = (codes < 32) & (padded < 32)
    assert known.sum() >= 4 and (codes[known] == padded[known]).float().mean() > 0.8


def test_what_is_repainted_does_not_shift(pipeline, monkeypatch):
    """With a tokenizer that loses nothing but detail, the middle of a repainted picture is where it was."""
    held = []
    monkeypatch.setattr(
        pipeline.image_vq, "encode_codes", lambda x: held.append(x) or torch.zeros(len(x), 4, 4, dtype=torch.int64)
    )
    monkeypatch.setattr(
        pipeline.image_vq, "decode_codes", lambda codes: type("Output", (), {"sample": held[0][: len(codes)]})
    )
    rows = np.linspace(0, 255, 48).astype(np.uint8)
    for size, ramp in (((48, 16), np.tile(rows, (16, 1))), ((16, 48), np.tile(rows[:, None], (1, 16)))):
        held.clear()
        image = Image.fromarray(ramp).convert("RGB")
        out = pipeline(image=image, mask_image=box_mask(size, (0, 0, 1, 1)), num_inference_steps=1)
        everything = pipeline._segment("image").paste(
            torch.zeros(1, 4, 4, dtype=torch.int64),
            torch.zeros(1, 3, *size[::-1]),
            torch.ones(1, 1, *size[::-1]),
            "np",
        )
        assert out.images[0].size == size
        assert np.abs(everything[0, ..., 0] * 255 - ramp).mean() < 4


# ---------------------------------------------------------------------------------------------------------------------
# One pipeline from another


def test_from_pipe_gives_a_pipeline_of_the_same_parts(pipeline, latent_pipeline):
    for pipe, call in ((pipeline, {"prompt": "a dog"}), (latent_pipeline, {"prompt": "a dog"})):
        other = type(pipe).from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        assert all(other.components[name] is part for name, part in pipe.components.items())
        assert {**other.config} == {**pipe.config} and other.config.resize_mode == "crop"
        drawn = [
            one(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
            for one in (pipe, other)
        ]
        assert torch.equal(*drawn)


def test_from_pipe_takes_diffusers_own_dit(latent_pipeline):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(4, 4), **blocks).eval()
    stock = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, patch_size=1
    ).eval()
    theirs = DiTPipeline(stock, vae, DDIMScheduler(), id2label={0: "cat"})
    ours = VQDiTLatentPipeline.from_pipe(theirs)
    ours.set_progress_bar_config(disable=True)
    assert ours.transformer is stock and ours.vae is vae
    again = VQDiTLatentPipeline.from_pipe(ours)
    assert again.transformer is stock
    assert ours(class_labels=3, num_inference_steps=2).images[0].size == (8, 8)


def test_a_pipeline_of_anothers_components_says_that_names_are_not_among_them(pipeline, caplog):
    from diffusers.utils import logging

    logging.enable_propagation()
    again = VQDiTPipeline(**pipeline.components, id2label=pipeline.config.id2label)
    assert list(again.config.labels) == ["fruit", "box", "dot"] and not caplog.records
    VQDiTPipeline(**pipeline.components)
    logging.disable_propagation()
    assert len(caplog.records) == 1 and "pass id2label=pipe.config.id2label" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


@pytest.fixture
def lora(pipeline):
    """A LoRA of the pipeline's transformer as it is saved, and what it draws."""
    peft = pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict

    adapted = VQDiTPipeline(**pipeline.components, labels=["a", "b", "c"])
    adapted.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(adapted.transformer).items()}
    adapted.transformer.delete_adapters("default")
    return state


def test_a_lora_of_the_model_loads_from_a_dict_and_a_folder(pipeline, lora, tmp_path):
    def draw():
        return pipeline("a dog", generator=torch.Generator().manual_seed(0), output_type="latent").images

    plain = draw()
    pipeline.load_lora_weights(lora, adapter_name="one")
    changed = draw()
    assert not torch.equal(plain, changed)
    pipeline.load_lora_weights({name: 2 * value for name, value in lora.items()}, adapter_name="two")  # on top of it
    pipeline.unload_lora_weights()
    assert torch.equal(draw(), plain)
    pipeline.save_lora_weights(tmp_path, {name.removeprefix("transformer."): value for name, value in lora.items()})
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(draw(), changed)


@pytest.mark.parametrize("kind", ["other layers", "more layers", "inputs", "outputs", "nan", "inf", "prefix", "empty"])
def test_a_lora_of_another_model_is_named_and_changes_nothing(pipeline, lora, kind, tmp_path):
    first = next(name for name in lora if "lora_A" in name)
    second = first.replace("lora_A", "lora_B")
    wrong, message = {
        "other layers": ({n.replace("to_q", "to_w"): v for n, v in lora.items()}, "to_w"),
        "more layers": (lora | {n.replace("blocks.0", "blocks.7"): v for n, v in lora.items()}, "blocks.7"),
        "inputs": (lora | {first: torch.zeros(2, 5)}, r"shape \(2, 5\)"),
        "outputs": (lora | {second: torch.zeros(5, 2)}, r"shape \(5, 2\)"),
        "nan": (lora | {first: lora[first] * float("nan")}, "not finite"),
        "inf": (lora | {second: lora[second] + float("inf")}, "not finite"),
        "prefix": ({n.replace("transformer.", "unet."): v for n, v in lora.items()}, "must have tensors of"),
        "empty": ({}, "must have tensors of"),
    }[kind]
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=f"the LoRA.*{message}"):
        pipeline.load_lora_weights(wrong)
    after = pipeline.transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
