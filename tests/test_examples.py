"""Examples that nothing else runs, with fewer steps than they need."""

import copy
import csv
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageSequence

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.masked_loss import masked_diffusion_loss
from diffusers_vqdit.utils.provenance import GENERATED, digital_source_type


@pytest.mark.slow
def test_your_own_voice(root, audio_codecs, tmp_path):
    """A folder of recordings in, a pipeline that speaks and listens out, with the codec finetuned first."""
    texts = ["red apple", "snowman", "green heart"]
    folder = audio_codecs.sound_folder(tmp_path / "recordings", count=len(texts))
    lines = ["file_name,text", *(f"{index}.flac,{text}" for index, text in enumerate(texts))]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    command = [sys.executable, root / "examples/your_own_voice.py", "--recordings", folder, "--codec_steps", "1"]
    command += ["--max_train_steps", "2", "--output_dir", tmp_path / "voice", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 WAV files" in done.stdout and "of 3 recordings exactly" in done.stdout
    assert done.stdout.count("heard: ") == 3 and "(snowman)" in done.stdout
    for index in range(3):
        path = tmp_path / "voice" / "spoken" / f"{index}.wav"
        assert soundfile.info(path).samplerate == 11025 and digital_source_type(path) == GENERATED
    assert (tmp_path / "voice" / "codec" / "preprocessor_config.json").is_file()


@pytest.fixture
def example(script):
    """Load an example as a module."""
    return lambda name: script(name, "examples")


@pytest.mark.parametrize(("text", "image"), [("text", "image"), ("words", "drawing")])
def test_sampling_is_animated_whatever_the_segments_are_called(
    example, image_vq, text_vq, tokenizer, tmp_path, capsys, text, image
):
    segments = {text: {"vocab_size": 64, "shape": [12]}, image: {"vocab_size": 32, "shape": [4, 4]}}
    tasks = [f"{image}->{text}", f"->{image}", f"{text}->{image}"]
    model = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "segments": segments, "tasks": tasks}
    pipe = VQDiTPipeline(
        VQDiTTransformer2DModel(**model),
        MaskedDiffusionScheduler(),
        image_vq,
        text_vq,
        tokenizer,
        segments={text: {"modality": "text"}, image: {"modality": "image"}},
    )
    pipe.save_pretrained(tmp_path / "pipe")
    animate, steps = example("animate_sampling"), 3
    arguments = ["--pretrained_model_name_or_path", tmp_path / "pipe", "--prompt", "a dot", "green", "--side", 20]
    arguments += ["--num_inference_steps", steps, "--output_file", tmp_path / "made" / "sampling.gif"]
    animate.main(animate.parse_args([str(one) for one in arguments]))
    assert f"{steps + 1} frames" in capsys.readouterr().out
    with Image.open(tmp_path / "made" / "sampling.gif") as animation:
        assert animation.size == (40, 20)
        frames = [frame.convert("RGB").copy() for frame in ImageSequence.Iterator(animation)]
    assert 1 < len(frames) <= steps + 1  # frames that are equal are one


def test_what_draws_nothing_is_not_animated(example, make_pipeline, tmp_path):
    pipe = make_pipeline(0)
    pipe.transformer.register_to_config(tasks=["image->text"])
    pipe.save_pretrained(tmp_path / "pipe")
    animate = example("animate_sampling")
    with pytest.raises(ValueError, match="draws no pictures of texts; it knows"):
        animate.main(animate.parse_args(["--pretrained_model_name_or_path", str(tmp_path / "pipe")]))


@pytest.fixture
def captured(example):
    return example("train_with_cuda_graphs")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_reads_captions_in_place_of_you(example, tmp_path):
    folder = example("your_own_voice").record(tmp_path / "recordings", 4)
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and len({row["text"] for row in rows}) == 4
    assert {path.name for path in folder.iterdir()} == {"metadata.csv", *(row["file_name"] for row in rows)}
    for row in rows:
        samples, rate = soundfile.read(folder / row["file_name"])
        assert rate == 22050 and samples.ndim == 1 and 0.3 < len(samples) / rate < 4
        assert 0.01 < np.sqrt(np.square(samples).mean()) and 1 <= len(row["text"].split()) <= 2


def test_a_captured_steps_loss_and_gradients_are_the_training_scripts(captured, transformer):
    """Where all is masked there is nothing to draw, and both see the same."""
    task, ones = Task.parse("text->image"), torch.ones(6)
    codes = {"text": torch.randint(0, 64, (6, 12)), "image": torch.randint(0, 32, (6, 4, 4))}
    plain = copy.deepcopy(transformer)
    loss = masked_diffusion_loss(
        plain, MaskedDiffusionScheduler(), {"text": codes["text"]}, {"image": codes["image"]}, timesteps=ones
    )
    loss.backward()
    model, gradients = transformer, {}

    def update() -> None:
        gradients.update({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})

    step = captured.TrainingStep(task, model, MaskedDiffusionScheduler(), update, 6)
    found = step({"text": codes["text"]}, {"image": codes["image"]}, ones)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: one.grad for name, one in plain.named_parameters() if one.grad is not None}
    assert gradients.keys() == expected.keys() and not any("label" in name for name in gradients)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_captured_update_is_muons_and_adamws_and_leaves_alone_what_has_no_gradient(captured, transformer):
    weights, plain = transformer, copy.deepcopy(transformer)
    model, rate = copy.deepcopy(transformer).to(torch.bfloat16), torch.tensor(1e-2)
    update, averages = captured.make_update(model, weights, rate, ema_decay=0.9)
    before = [parameter.detach().clone() for parameter in weights.parameters()]
    matrices = [
        one for name, one in plain.transformer_blocks.named_parameters() if one.ndim == 2 and "adaln" not in name
    ]
    rest = [one for one in plain.transformer_blocks.parameters() if not any(one is other for other in matrices)]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    decayed, free = [one for one in rest if one.ndim == 2], [one for one in rest if one.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": free, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98))
    for _ in range(2):
        for one, other in zip(
            model.transformer_blocks.parameters(), plain.transformer_blocks.parameters(), strict=True
        ):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.float()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in (*adamw.param_groups, *muon.param_groups):
            group["lr"] = rate.item()
        adamw.step()
        muon.step()
        update()
        rate.mul_(0.5)
    of_muon = {id(one) for one in matrices}
    touched = {name for name, _ in plain.named_parameters() if name.startswith("transformer_blocks")}
    for (name, now), then, other, average, working in zip(
        weights.named_parameters(), before, plain.parameters(), averages, model.parameters(), strict=True
    ):
        # PyTorch's Muon rounds to bfloat16 on CPUs too
        torch.testing.assert_close(now, other, rtol=0, atol=5e-3 if id(other) in of_muon else 1e-6, msg=name)
        assert torch.equal(now, then) != (name in touched), name
        assert torch.equal(working, now.to(torch.bfloat16))
        if name not in touched:
            assert torch.equal(average, then)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 32), (2, 32, 8)])
def test_orthogonalized_matrices_keep_their_directions(captured, shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, before, v = torch.linalg.svd(matrices, full_matrices=False)
    now = u.mT @ captured.orthogonalize(matrices) @ v.mT
    values = now.diagonal(dim1=1, dim2=2)
    assert torch.allclose(now, torch.diag_embed(values), atol=1e-3)
    far = before > 0.05 * before.amax(dim=1, keepdim=True)
    assert values[far].min() > 0.6 and values.max() < 1.3


def test_rows_are_drawn_as_often_as_a_file_says(captured, tmp_path):
    np.save(tmp_path / "repeats.npy", np.array([2, 0, 1]))
    assert captured.drawn_rows(tmp_path / "repeats.npy", 3, 3).tolist() == [0, 0, 2]
    assert captured.drawn_rows(None, 3, 3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="--train_batch_size 4 is more than the 3 rows"):
        captured.drawn_rows(tmp_path / "repeats.npy", 3, 4)


@pytest.mark.parametrize("wrong", [np.ones(4, np.int64), np.ones(3), np.array([1, -1, 1]), np.ones((3, 1), np.int64)])
def test_repeats_of_other_rows_are_refused(captured, tmp_path, wrong):
    np.save(tmp_path / "repeats.npy", wrong)
    with pytest.raises(ValueError, match="must have a whole number from 0 up for each of the 3 rows"):
        captured.drawn_rows(tmp_path / "repeats.npy", 3, 1)


@pytest.mark.parametrize("kind", [np.uint8, np.uint64, np.int16])
def test_repeats_may_be_of_any_whole_numbers(captured, tmp_path, kind):
    np.save(tmp_path / "repeats.npy", np.array([2, 0, 200], kind))
    assert captured.drawn_rows(tmp_path / "repeats.npy", 3, 3).bincount().tolist() == [2, 0, 200]


@pytest.mark.parametrize("kind", ["gone", "a folder", "empty", "a text", "cut off", "several arrays", "objects"])
def test_repeats_that_cant_be_read_are_refused(captured, tmp_path, kind):
    path = tmp_path / "repeats.npy"
    if kind == "a folder":
        path.mkdir()
    elif kind in ("empty", "a text"):
        path.write_text("" if kind == "empty" else "1\n1\n1\n")
    elif kind in ("cut off", "objects"):
        np.save(path, np.ones(3, np.int64 if kind == "cut off" else object))
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "several arrays":
        with open(path, "wb") as file:
            np.savez(file, np.ones(3, np.int64))
    with pytest.raises(ValueError, match=f"--row_repeats {re.escape(str(path))} is no array that numpy.save wrote"):
        captured.drawn_rows(path, 3, 1)


@pytest.fixture
def start(pipeline, picture_folder, image_vq, text_vq, tokenizer, tmp_path):
    """The arguments that train a pipeline by captured steps, without those of the training."""
    pipeline.transformer.register_to_config(tasks=["text->image", "label->text"])
    pipeline.save_pretrained(tmp_path / "start")
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image")
    parts = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer, "caption_column": "text"}
    encode_dataset(dataset, tmp_path / "codes", resolution=16, batch_size=3, image_column="image", **parts)
    arguments = ["--pretrained_model_name_or_path", tmp_path / "start", "--codes_dir", tmp_path / "codes"]
    return [*map(str, arguments), "--output_dir", str(tmp_path / "transformer"), "--train_batch_size", "2"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--tasks", "image->text"], "not trained for the task 'image->text'; it knows text->image"),
        (["--tasks", "text->image,label->text"], r"has no segments \['label'\], but \['image', 'text'\]"),
        (["--tasks", "text->image", "--minutes", "1e-6"], "--minutes 1e-06 were over before the first step"),
        (["--tasks", "text->image", "--output_dir", __file__], "output_dir=.* can't be written"),
    ],
)
def test_what_cant_be_trained_by_captured_steps_is_told_before_the_first(captured, start, monkeypatch, given, told):
    monkeypatch.setattr(captured.TrainingStep, "__call__", lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match=told):
        captured.main(captured.parse_args([*start, "--minutes", "1", *given]))


def test_captured_steps_read_labels_by_name(
    captured, start, pipeline, picture_folder, image_vq, tmp_path, monkeypatch
):
    """The folder has two of the pipeline's three labels, in another order, which are its own codes 0 and 1."""
    names = ["square", "oval", "round"]
    pipeline.register_to_config(id2label=dict(enumerate(names)))
    pipeline.transformer.register_to_config(tasks=["label->image"])
    pipeline.save_pretrained(tmp_path / "start")
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image")
    columns = {"image_column": "image", "label_column": "label"}
    encode_dataset(dataset, tmp_path / "labelled", resolution=16, batch_size=3, image_vq=image_vq, **columns)
    own, seen = CodeDataset(tmp_path / "labelled"), []

    def look(self, given, generated, timesteps):
        seen.append((given["label"], generated["image"]))
        raise RuntimeError("seen")

    monkeypatch.setattr(captured.TrainingStep, "__call__", look)
    arguments = [str(tmp_path / "labelled") if one == str(tmp_path / "codes") else one for one in start]
    with pytest.raises(RuntimeError, match="seen"):
        captured.main(captured.parse_args([*arguments, "--minutes", "1", "--tasks", "label->image"]))
    [(labels, pictures)] = seen
    for label, picture in zip(labels, pictures, strict=True):
        row = next(row for row in range(len(own)) if torch.equal(own.codes["image"][row].view_as(picture), picture))
        assert names[label.item()] == own.labels[own.codes["label"][row].item()]


@pytest.mark.parametrize("change", ["another grid", "states", "blocks", "buckets"])
def test_codes_that_have_no_captured_steps_are_refused(captured, start, transformer, tmp_path, change):
    codes, told = CodeDataset(tmp_path / "codes"), "states or of several shapes"
    if change == "another grid":
        codes.segments["image"]["shape"], told = [2, 8], "segment 'image' is .* in the data but"
    elif change == "buckets":
        codes.buckets = torch.zeros(len(codes))
    else:
        name, value = {"states": ("channels", 12), "blocks": ("block_length", 4)}[change]
        for segments in (codes.segments, transformer.config.segments):
            segments["text"] = {**segments["text"], name: value}
    with pytest.raises(ValueError, match=told):
        captured.check_tasks([Task.parse("text->image")], transformer, codes)


@pytest.mark.slow
def test_a_transformer_is_trained_by_captured_steps(root, run, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "start")
    data = f"--dataset_name {root / 'training/data/emoji.parquet'} --max_samples 8 --resolution 16"
    parts = f"--image_vq {tmp_path / 'start'} --text_vq {tmp_path / 'start'}"
    run("encode_dataset", f"{data} {parts} --output_dir {tmp_path / 'codes'}")
    command = [sys.executable, root / "examples" / "train_with_cuda_graphs.py", "--codes_dir", tmp_path / "codes"]
    command += ["--pretrained_model_name_or_path", tmp_path / "start", "--tasks", "text->image:2,image->text,->image"]
    command += ["--minutes", "0.1", "--train_batch_size", "2", "--output_dir", tmp_path / "transformer"]
    command += ["--learning_rate", "1e-7"]  # as many steps as this machine makes in the time
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps of 2" in done.stdout
    trained = VQDiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    start, moved = pipeline.transformer.state_dict(), trained.state_dict()
    assert all(torch.allclose(moved[name], then, atol=1e-3) for name, then in start.items())  # it went on from there
    assert not all(torch.equal(moved[name], then) for name, then in start.items())
    images = VQDiTPipeline.from_pretrained(tmp_path / "start", transformer=trained)("a red apple").images
    assert images[0].size == (16, 16)
