import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTPipelineOutput


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_every_task_gives_what_it_names(pipeline):
    out = pipeline("a red apple")
    assert isinstance(out, VQDiTPipelineOutput) and isinstance(out.images[0], Image.Image)
    assert out.images[0].size == (16, 16) and out.texts is None and out.labels is None
    assert isinstance(pipeline(image=out.images).texts[0], str)
    assert pipeline(image=out.images, output="label").labels[0] in ("fruit", "box", "dot")
    assert len(pipeline(class_labels=["box", 2]).images) == 2
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
    assert (len(forward), len(prefix)) == (10, 2)
    assert sum(call["with_unconditional"] for call in forward) == 5  # both halves of guidance in one pass


def test_guidance_follows_the_formula(pipeline, monkeypatch):
    captured = []
    step = MaskedDiffusionScheduler.step

    def spy(self, logits, *args, **options):
        captured.append(logits)
        return step(self, logits, *args, **options)

    monkeypatch.setattr(MaskedDiffusionScheduler, "step", spy)
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
    left = pipeline("a red apple", num_inference_steps=8, callback_on_step_end=stop, output_type="latent").images
    assert (left == 32).any() and (left < 32).any()


def test_a_call_that_is_stopped_before_its_first_step_takes_that_one(pipeline, monkeypatch):
    encode = type(pipeline)._encode_inputs

    def stop(pipe, *args):
        found = encode(pipe, *args)
        pipe._interrupt = True
        return found

    monkeypatch.setattr(type(pipeline), "_encode_inputs", stop)
    left = pipeline("a red apple", num_inference_steps=8, output_type="latent").images
    assert (left == 32).any() and (left < 32).any()
    assert pipeline("a red apple", num_inference_steps=8).images


def test_a_device_without_float64_is_refused(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline), "_execution_device", torch.device("mps"))
    with pytest.raises(ValueError, match="'mps'"):
        pipeline("a red apple")


def test_a_stopped_sampling_shows_the_last_prediction(pipeline, monkeypatch):
    predictions = []
    step = MaskedDiffusionScheduler.step

    def spy(*args, **options):
        predictions.append(step(*args, **options))
        return predictions[-1]

    def stop(pipe, index, timestep, inputs):
        pipe._interrupt = True
        return inputs

    monkeypatch.setattr(MaskedDiffusionScheduler, "step", spy)
    images = pipeline("a red apple", callback_on_step_end=stop, output_type="pt").images
    assert len(predictions) == 1
    codes = predictions[0].pred_original_sample.view(1, 4, 4)
    expected = pipeline.image_vq.decode_codes(codes).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))
    picture = Image.new("RGB", (16, 16), "red")
    assert pipeline(image=picture, output="label", callback_on_step_end=stop).labels[0] in ("fruit", "box", "dot")


def test_no_call_is_spent_on_codes_that_are_all_known(pipeline, monkeypatch):
    forward = count_calls(pipeline, monkeypatch, "forward")
    pipeline(image=Image.new("RGB", (16, 16)), output="label", num_inference_steps=9)
    assert len(forward) == 1  # a label is one code
    steps = []
    latents = torch.randint(32, (1, 4, 4))
    codes = pipeline(
        "a red apple",
        latents=latents,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=lambda pipe, index, timestep, inputs: steps.append(index),
    ).images
    assert len(forward) == 1 and steps == [0, 1, 2] and torch.equal(codes, latents)


def test_the_arguments_are_not_changed(pipeline):
    latents = torch.full((1, 4, 4), 32)
    picture = torch.rand(1, 3, 16, 16)
    before = picture.clone()
    pipeline("a red apple", latents=latents)
    pipeline(image=picture)
    assert (latents == 32).all() and torch.equal(picture, before)


def test_longer_prompts_are_cut_with_a_warning(pipeline, caplog):
    logging.enable_propagation()
    longer = [f"{word} apple " * 9 for word in ("red", "blue", "green")]
    cut = pipeline.encode_prompt(["a red apple", *longer])
    told = f"3 of 4 texts of prompt have more than 12 tokens and are cut; the first is {longer[0][:59]!r}..."
    assert caplog.messages == [told.replace("'...", "...")]
    caplog.clear()
    assert torch.equal(cut[:1], pipeline.encode_prompt(["a red apple"])) and cut.shape == (4, 12)
    assert not caplog.records
    logging.disable_propagation()


def test_joint_tasks_are_the_same_in_a_batch_and_keep_known_codes(pipeline):
    options = {"output": "image+text", "output_type": "latent"}
    batch = pipeline(num_images_per_prompt=2, generator=generators(1, 2), **options)
    alone = pipeline(generator=generators(2), **options)
    assert torch.equal(batch.images[1], alone.images[0]) and torch.equal(batch.texts[1], alone.texts[0])
    known = pipeline.encode_prompt(["a red apple"])
    assert torch.equal(pipeline(latents={"text": known}, **options).texts, known)
    seen = []
    pipeline(callback_on_step_end=lambda pipe, index, timestep, inputs: seen.append(inputs["latents"]), **options)
    assert len(seen) == pipeline.num_timesteps and all(set(codes) == {"image", "text"} for codes in seen)


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


def test_save_and_load_give_the_same_pictures(pipeline, tmp_path, caplog, monkeypatch):
    expected = pipeline("a red apple", generator=generators(0), output_type="latent").images
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "VQDiTPipeline"
    assert index["image_vq"] == ["diffusers", "ImageVQModel"] and index["id2label"] == {
        "0": "fruit",
        "1": "box",
        "2": "dot",
    }
    # DiffusionPipeline.download takes every list for a part of the pipeline.
    assert {name for name, value in index.items() if isinstance(value, list)} == {
        name for name, part in pipeline.components.items() if part is not None
    }
    monkeypatch.setattr(logging.get_logger("diffusers"), "propagate", True)
    for loaded in (VQDiTPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
        assert "Expected types" not in caplog.text  # what is saved is of the signature's types
        assert type(loaded) is VQDiTPipeline and list(loaded.config.labels) == ["fruit", "box", "dot"]
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded("a red apple", generator=generators(0), output_type="latent").images, expected)
        loaded.save_pretrained(tmp_path / "again")
    again = VQDiTPipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.float16)
    assert again.transformer.dtype == torch.float16


def test_components_that_were_exchanged_are_saved_as_diffusers(pipeline, tmp_path):
    pipeline.scheduler = MaskedDiffusionScheduler.from_config(pipeline.scheduler.config, sampler="ancestral")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    libraries = {name: value[0] for name, value in index.items() if isinstance(value, list)}
    assert libraries.pop("tokenizer") == "transformers" and set(libraries.values()) == {"diffusers"}
    assert DiffusionPipeline.from_pretrained(tmp_path).scheduler.config.sampler == "ancestral"


def test_half_precision_runs(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        half = VQDiTPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
        half.set_progress_bar_config(disable=True)
        images = half("a red apple", output_type="np", num_inference_steps=2).images
        assert np.isfinite(images).all()
        assert isinstance(half(image=images, num_inference_steps=2).texts[0], str)


def test_a_checkpoint_without_texts_needs_no_text_components(pipeline, tmp_path):
    small = VQDiTPipeline(pipeline.transformer, pipeline.scheduler, pipeline.image_vq, labels=["a", "b", "c"])
    small.set_progress_bar_config(disable=True)
    assert len(small(class_labels="b").images) == 1
    small.save_pretrained(tmp_path)
    assert VQDiTPipeline.from_pretrained(tmp_path).text_vq is None
    with pytest.raises(ValueError, match="needs the component text_vq"):
        small("a red apple")


def test_codes_come_out_without_a_tokenizer(pipeline):
    bare = VQDiTPipeline(pipeline.transformer, pipeline.scheduler)
    bare.set_progress_bar_config(disable=True)
    codes = bare(output="image", output_type="latent").images
    assert codes.shape == (1, 4, 4) and codes.max() < 32
    with pytest.raises(ValueError, match="needs the component image_vq"):
        bare(output="image")
    with pytest.raises(ValueError, match="needs the component text_vq"):
        bare("a red apple", output_type="latent")


def test_scores_are_bounds_of_the_side_that_is_generated(pipeline):
    prompts = ["a red apple", "a blue box", "红苹果"]
    image = torch.rand(1, 3, 16, 16)

    def seed():
        return torch.Generator().manual_seed(7)

    together = pipeline.score("image->text", prompts, image, num_samples=4, generator=seed(), batch_size=2)
    assert together.nll.shape == (3,) and together.num_codes == 12 and (together.nll > 0).all()
    for index, prompt in enumerate(prompts):  # the masks are the same for every candidate
        alone = pipeline.score("image->text", prompt, image, num_samples=4, generator=seed())
        torch.testing.assert_close(alone.nll[0], together.nll[index], rtol=1e-5, atol=1e-4)
    drawn = pipeline.score("text->image", prompts, image, num_samples=4, generator=seed())
    assert drawn.nll.shape == (3,) and drawn.num_codes == 16
    assert pipeline.score("->image", image=image, num_samples=2).nll.shape == (1,)
    joint = pipeline.score("->image+text", prompts, image.expand(3, -1, -1, -1), num_samples=2)
    assert joint.num_codes == 28


def test_the_score_of_a_label_is_its_log_probability(pipeline):
    image = torch.rand(1, 3, 16, 16)
    output = pipeline.score("image->label", image=image, class_labels=[0, 1, 2])
    assert output.standard_error.tolist() == [0, 0, 0]
    with torch.no_grad():
        given = {"image": pipeline.encode_image(image)}
        logits = pipeline.transformer({"label": torch.tensor([[3]])}, given=given).sample["label"]
    torch.testing.assert_close(-output.nll, logits[0, 0].log_softmax(-1).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("text->label", {"prompt": "x", "class_labels": 0}, "not trained for the task 'text->label'"),
        ("text->image", {"prompt": "x"}, r"has the segments \['image', 'text'\], but \['text'\] were passed"),
        ("->image", {"prompt": "x", "image": torch.rand(1, 3, 16, 16)}, r"but \['image', 'text'\] were passed"),
        ("text->image", {"prompt": ["x", "y"], "image": torch.rand(3, 3, 16, 16)}, "one that stands for all"),
        ("->image", {"image": torch.rand(1, 3, 16, 16), "num_samples": 3}, "num_samples=3"),
        ("->image", {"image": torch.rand(1, 3, 16, 16), "batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments_of_a_score_are_named(pipeline, task, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.score(task, **arguments)


def test_sequential_parts_run_where_the_hooks_put_them(pipeline):
    assert set(pipeline.model_cpu_offload_seq.split("->")) == {
        *("text_encoder", "image_encoder", "text_vq", "transformer", "image_vq")
    }
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
        ({"class_labels": "pear"}, "'pear' must be .*fruit"),
        ({"class_labels": 3}, r"class_labels=3 must be a number in \[0, 3\)"),
        ({"class_labels": True}, "class_labels=True"),
        ({"prompt": []}, r"prompt=\[\]"),
        ({"image": []}, r"image=\[\]"),
        ({"class_labels": ["box", 1], "guidance_scale": 1.0, "latents": torch.zeros(1, 4, 4).long()}, r"\(2, 4, 4\)"),
        ({"prompt": ["x", "y"], "class_labels": "box"}, "not trained for the task 'label[+]text->image'"),
        ({"image": "cat.png"}, "got str"),
        ({"image": [Image.new("RGB", (9, 9)), torch.zeros(3, 9, 9)]}, "all of one kind, got Image, Tensor"),
        ({"image": torch.zeros(1, 1, 16, 16)}, r"shape \(B, 3, H, W\), got \(1, 1, 16, 16\)"),
        ({"image": np.zeros((1, 3, 16, 16))}, r"shape \(B, H, W, 3\), got \(1, 3, 16, 16\)"),
        ({"image": torch.zeros(0, 3, 16, 16)}, r"got \(0, 3, 16, 16\)"),
        ({"image": torch.zeros(1, 3, 16, 16, dtype=torch.int64)}, "int64"),
        ({"image": torch.full((1, 3, 16, 16), float("nan"))}, "from nan"),
        ({"image": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "uint8"),
        ({"image": torch.full((1, 3, 16, 16), 2.0)}, "from 2.0 to 2.0"),
        ({"prompt": "x", "output_type": "jpg"}, "output_type='jpg'"),
        ({"prompt": "x", "num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"prompt": ["x", "y"], "generator": generators(1)}, "list of 1, but 2 samples"),
        ({"prompt": "x", "generator": 3}, "generator=3 must be a torch.Generator"),
        ({"prompt": "x", "output": ["image"]}, r"output=\['image'\] must be a string"),
        ({"prompt": "x", "num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5"),
        ({"prompt": "x", "num_inference_steps": "8"}, "num_inference_steps='8'"),
        ({"prompt": "x", "guidance_scale": "3"}, "guidance_scale='3'"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs a given segment"),
        ({"image": torch.zeros(1, 3, 16, 16), "guidance_scale": 2.0}, "needs the task '->text'"),
        ({"prompt": "x", "latents": torch.full((1, 4, 4), 33)}, r"in \[0, 32\], .* from 33 to 33"),
        ({"prompt": "x", "latents": [1]}, "latents must be a tensor of codes or a dict of them, got list"),
        ({"prompt": "x", "latents": {"text": torch.zeros(1, 12).long()}}, "'text', but the task 'text->image'"),
        ({"output": "image+text", "latents": torch.zeros(1, 4, 4).long()}, "must be a dict with the segments"),
        ({"prompt": "x", "latents": torch.zeros(1, 16, dtype=torch.int64)}, "int64 codes of shape"),
        ({"prompt": "x", "latents": torch.zeros(1, 4, 4)}, "float32"),
        (
            {"image": torch.zeros(1, 3, 16, 16), "latents": torch.zeros(1, 7).long()},
            r"latents of 'text' .* shape \(1, \d+\)",
        ),
        (
            {"prompt": "x", "image": torch.full((1, 4, 4), 32), "output": "image", "height": 24, "width": 16},
            r"image has codes of shape \(4, 4\), but height=24 and width=16 ask for \(6, 4\)",
        ),
        ({"prompt": "x", "callback_on_step_end_tensor_inputs": ["noise"]}, "'noise'"),
        ({"prompt": "x", "callback_on_step_end_tensor_inputs": "latents"}, "must be a list from"),
    ],
)
def test_bad_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)
