import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_vqdit import VQDiTPipeline, VQDiTPipelineOutput


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_every_task_gives_what_it_names(pipeline):
    out = pipeline("a red apple")
    assert isinstance(out, VQDiTPipelineOutput) and isinstance(out.images[0], Image.Image)
    assert out.images[0].size == (16, 16) and out.texts is None and out.labels is None
    assert isinstance(pipeline(image=out.images).texts[0], str)
    assert pipeline(image=out.images, output="label").labels[0] in ("fruit", "box", "dot")
    assert len(pipeline(class_label=["box", 2]).images) == 2
    both = pipeline(output="image+text", num_images_per_prompt=2)
    assert len(both.images) == len(both.texts) == 2


def test_output_types(pipeline):
    seed = 5
    codes = pipeline("a red apple", generator=generators(seed), output_type="latent").images
    assert codes.shape == (1, 4, 4) and codes.dtype == torch.int64 and codes.max() < 32
    pt = pipeline("a red apple", generator=generators(seed), output_type="pt").images
    np_ = pipeline("a red apple", generator=generators(seed), output_type="np").images
    pil = pipeline("a red apple", generator=generators(seed)).images[0]
    assert pt.shape == (1, 3, 16, 16) and pt.min() >= 0 and pt.max() <= 1
    assert np_.shape == (1, 16, 16, 3)
    assert np.allclose(np_[0], pt[0].permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(pil), (np_[0] * 255).round().astype(np.uint8))
    expected = pipeline.image_vq.decode_codes(codes).sample
    torch.testing.assert_close(pt, (expected / 2 + 0.5).clamp(0, 1))


def test_return_dict_false_gives_a_tuple(pipeline):
    images, texts, labels = pipeline("a red apple", return_dict=False)
    assert len(images) == 1 and texts is None and labels is None


def test_generators_make_it_repeatable_and_rows_independent(pipeline):
    prompts = ["a red apple", "a blue box", "红苹果"]
    batch = pipeline(prompts, generator=generators(1, 2, 3), output_type="latent").images
    again = pipeline(prompts, generator=generators(1, 2, 3), output_type="latent").images
    assert torch.equal(batch, again)
    for index, prompt in enumerate(prompts):
        alone = pipeline(prompt, generator=generators(index + 1), output_type="latent").images
        assert torch.equal(alone[0], batch[index])
    one = pipeline(prompts, generator=torch.Generator().manual_seed(1), output_type="latent").images
    other = pipeline(prompts, generator=torch.Generator().manual_seed(2), output_type="latent").images
    assert not torch.equal(one, other)


def test_several_pictures_a_prompt_stand_next_to_one_another(pipeline):
    prompts = ["a red apple", "a blue box"]
    batch = pipeline(prompts, num_images_per_prompt=2, generator=generators(1, 2, 3, 4), output_type="latent").images
    alone = pipeline("a blue box", generator=generators(3), output_type="latent").images
    assert len(batch) == 4 and torch.equal(batch[2], alone[0])


def count_calls(pipeline, monkeypatch, name):
    calls = []
    original = getattr(pipeline.transformer, name)
    monkeypatch.setattr(pipeline.transformer, name, lambda *a, **k: calls.append(k) or original(*a, **k))
    return calls


def test_the_prefix_is_computed_once_and_guidance_one_is_one_call_a_step(pipeline, monkeypatch):
    forward = count_calls(pipeline, monkeypatch, "forward")
    prefix = count_calls(pipeline, monkeypatch, "encode_prefix")
    pipeline("a red apple", num_inference_steps=5, guidance_scale=1.0)
    assert (len(forward), len(prefix)) == (5, 1)
    pipeline("a red apple", num_inference_steps=5, guidance_scale=2.0)
    assert (len(forward), len(prefix)) == (15, 2)
    assert sum(call.get("prefix") is None for call in forward) == 5  # the unconditional halves


def test_guidance_follows_the_formula(pipeline):
    captured = []
    step = pipeline.scheduler.step

    def spy(logits, *args, **options):
        captured.append(logits)
        return step(logits, *args, **options)

    pipeline.scheduler.step = spy
    pipeline("a red apple", num_inference_steps=1, guidance_scale=3.0)
    masked = {"image": torch.full((1, 4, 4), 32)}
    with torch.no_grad():
        given = {"text": pipeline.encode_prompt(["a red apple"])}
        conditional = pipeline.transformer(masked, given=given).sample["image"]
        free = pipeline.transformer(masked).sample["image"]
    torch.testing.assert_close(captured[0], free + 3 * (conditional - free))


def test_known_codes_stay(pipeline):
    latents = torch.randint(32, (1, 4, 4))
    latents[0, 1:3] = 32
    codes = pipeline("a red apple", latents=latents, output_type="latent").images
    assert torch.equal(codes[latents < 32], latents[latents < 32])
    assert codes.max() < 32


def test_callbacks_see_and_change_codes_and_can_stop(pipeline):
    steps = []

    def watch(pipe, index, timestep, inputs):
        steps.append((index, float(timestep), int((inputs["latents"] == 32).sum())))
        return {"latents": torch.zeros_like(inputs["latents"])} if index == 3 else inputs

    codes = pipeline("a red apple", num_inference_steps=4, callback_on_step_end=watch, output_type="latent").images
    assert [step[:2] for step in steps] == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]
    assert [step[2] for step in steps] == sorted((step[2] for step in steps), reverse=True) and steps[-1][2] == 0
    assert (codes == 0).all()

    def stop(pipe, index, timestep, inputs):
        pipe._interrupt = index == 1
        steps.append(index)
        return inputs

    steps.clear()
    pipeline("a red apple", num_inference_steps=8, callback_on_step_end=stop)
    assert steps == [0, 1]


def test_images_may_come_in_any_form_and_size(pipeline):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    array = np.asarray(picture, dtype=np.float32)[None] / 255
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    codes = [pipeline.encode_image(image) for image in (picture, [picture], array, tensor)]
    for other in codes[1:]:
        assert torch.equal(other, codes[0])
    assert pipeline.encode_image(picture.resize((50, 70))).shape == (1, 4, 4)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert torch.equal(pipeline.encode_image(clear), pipeline.encode_image(Image.new("RGB", (16, 16), "white")))


def test_save_and_load_give_the_same_pictures(pipeline, tmp_path):
    expected = pipeline("a red apple", generator=generators(0), output_type="latent").images
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "VQDiTPipeline"
    assert index["image_vq"] == ["diffusers", "ImageVQModel"] and index["labels"] == ["fruit", "box", "dot"]
    for loaded in (VQDiTPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
        assert type(loaded) is VQDiTPipeline
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded("a red apple", generator=generators(0), output_type="latent").images, expected)
        loaded.save_pretrained(tmp_path / "again")
    again = VQDiTPipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.float16)
    assert again.transformer.dtype == torch.float16


def test_a_checkpoint_without_texts_needs_no_text_components(pipeline, tmp_path):
    small = VQDiTPipeline(pipeline.transformer, pipeline.scheduler, pipeline.image_vq, labels=["a", "b", "c"])
    small.set_progress_bar_config(disable=True)
    assert len(small(class_label="b").images) == 1
    small.save_pretrained(tmp_path)
    assert VQDiTPipeline.from_pretrained(tmp_path).text_vq is None
    with pytest.raises(ValueError, match="needs the component text_vq"):
        small("a red apple")


def test_sequential_parts_run_where_the_hooks_put_them(pipeline):
    assert set(pipeline.model_cpu_offload_seq.split("->")) == {"text_vq", "transformer", "image_vq"}
    for model, method in (("text_vq", "encode_codes"), ("image_vq", "decode_codes"), ("transformer", "encode_prefix")):
        moved = []

        class Hook:
            def pre_forward(self, module, *args, moved=moved):
                moved.append(module)

        component = getattr(pipeline, model)
        component._hf_hook = Hook()
        pipeline("a red apple", num_inference_steps=1)
        assert moved, f"{model}.{method} would run on weights that offloading left on the CPU"
        del component._hf_hook


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "x", "output": "text"}, "given or generated"),
        ({"prompt": "x", "output": "label"}, "not trained for the task 'text->label'; it knows text->image"),
        ({"prompt": 3}, "prompt must be .* got 3"),
        ({"prompt": ["x", " "]}, "non-empty"),
        ({"class_label": "pear"}, "'pear' must be .*fruit"),
        ({"class_label": 3}, r"class_label=3 must be a number in \[0, 3\)"),
        ({"image": "cat.png"}, "got str"),
        ({"image": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "uint8"),
        ({"image": torch.full((1, 3, 16, 16), 2.0)}, "from 2.0 to 2.0"),
        ({"prompt": "x", "output_type": "jpg"}, "output_type='jpg'"),
        ({"prompt": "x", "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"prompt": ["x", "y"], "generator": generators(1)}, "list of 1, but 2 samples"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs a given segment"),
        ({"prompt": "x", "latents": torch.zeros(1, 16, dtype=torch.int64)}, "int64 codes of shape"),
        ({"prompt": "x", "latents": torch.zeros(1, 4, 4)}, "float32"),
        ({"prompt": "x", "callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
    ],
)
def test_bad_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)
