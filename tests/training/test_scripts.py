"""The training scripts as a user runs them: from pictures to a pipeline, killed and resumed, finetuned."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import ResNetConfig, ResNetModel

from diffusers_vqdit import ImageVQModel, MaskedDiffusionScheduler, TextVQModel, VQDiTPipeline
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.metrics import psnr
from diffusers_vqdit.training.tokenizer_metrics import measure_image_tokenizer
from diffusers_vqdit.utils.decoding import to_pixels


@pytest.fixture(scope="session")
def tokenizers(run, root, tmp_path_factory):
    """Both tokenizers, trained to give ten pictures and their captions back, and the codes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    data = f"--dataset_name {root / 'training/data/emoji.parquet'}"
    common = f"{data} --max_train_samples 10 --validation_split none --report_to none --use_ema"
    run(
        "train_image_vq",
        f"{common} --output_dir {folder / 'image_vq'} --resolution 16 --block_out_channels 32 64 --latent_channels 16 "
        "--num_vq_embeddings 512 --train_batch_size 10 --max_train_steps 600 --ema_decay 0.98 --validation_steps 600",
    )
    run(
        "train_text_vq",
        f"{common} --output_dir {folder / 'text_vq'} --caption_columns text text_zh --tokenizer_vocab_size 400 "
        "--num_codes 512 --max_length 16 --train_batch_size 20 --max_train_steps 200 --ema_decay 0.9",
    )
    run(
        "encode_dataset",
        f"{data} --max_samples 10 --image_vq {folder / 'image_vq'} --text_vq {folder / 'text_vq'} "
        f"--prompt_columns text_zh --label_column label --output_dir {folder / 'codes'}",
    )
    return folder


TUNE = "--lr_warmup_steps 20 --report_to none"
TINY = f"--num_layers 3 --num_attention_heads 4 --attention_head_dim 32 {TUNE}"


@pytest.mark.slow
def test_ten_pictures_are_reproduced_exactly(run, tokenizers, root, tmp_path):
    dataset = load_training_dataset(
        dataset_name=str(root / "training/data/emoji.parquet"), image_column="image", max_samples=10
    )
    pictures = to_pixels(decode_images(dataset, "image", 16)[0])
    image_vq = ImageVQModel.from_pretrained(tokenizers / "image_vq")
    codes = image_vq.encode_codes(pictures)
    with torch.no_grad():
        assert psnr(image_vq.decode_codes(codes).sample, pictures).min() > 30

    run(
        "train_vqdit",
        f"--codes_dir {tokenizers / 'codes'} --image_vq {tokenizers / 'image_vq'} --text_vq {tokenizers / 'text_vq'} "
        f"--output_dir {tmp_path} {TINY} --tasks text->image:2,image->text:1,->image:1 --train_batch_size 20 "
        "--max_train_steps 600 --use_ema --ema_decay 0.98 --checkpointing_steps 1000",
    )
    pipe = VQDiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    # The likeliest codes: of 640 drawn ones, some would differ with the last percent of probability.
    pipe.scheduler = MaskedDiffusionScheduler(temperature=0.0, choice_temperature=0.0)
    generators = [torch.Generator().manual_seed(i) for i in range(10)]
    for column in ("text", "text_zh"):
        drawn = pipe(list(dataset[column]), generator=generators, guidance_scale=1.0, output_type="latent").images
        assert torch.equal(drawn, codes), column
    assert pipe(image=pictures / 2 + 0.5, generator=generators).texts == list(dataset["text"])


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(run, tokenizers, tmp_path):
    arguments = (
        f"--codes_dir {tokenizers / 'codes'} --image_vq {tokenizers / 'image_vq'} {TINY} --tasks label->image,->image "
        "--train_batch_size 4 --max_train_steps 12 --checkpointing_steps 5 --gradient_accumulation_steps 2 --use_ema"
    )
    run("train_vqdit", f"{arguments} --output_dir {tmp_path / 'whole'}")
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", tmp_path / "broken" / "checkpoint-10")
    run("train_vqdit", f"{arguments} --output_dir {tmp_path / 'broken'} --resume_from_checkpoint latest")
    whole, resumed = (VQDiTPipeline.from_pretrained(tmp_path / name).transformer for name in ("whole", "broken"))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_the_same_weights(run, tokenizers, tmp_path):
    arguments = f"--codes_dir {tokenizers / 'codes'} --image_vq {tokenizers / 'image_vq'} {TINY} --max_train_steps 3"
    for name, flag in (("plain", ""), ("compiled", "--compile")):
        run("train_vqdit", f"{arguments} --tasks label->image --output_dir {tmp_path / name} {flag}")
    plain, compiled = (VQDiTPipeline.from_pretrained(tmp_path / n).transformer for n in ("plain", "compiled"))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image_vq", "text_vq"])
def test_tokenizer_training_resumes_to_the_same_weights(run, root, tmp_path, name):
    small = "--block_out_channels 8 8 --norm_num_groups 4 --latent_channels 8" if name == "image_vq" else ""
    arguments = (
        f"--dataset_name {root / 'training/data/emoji.parquet'} --max_train_samples 8 --validation_split none {small} "
        "--report_to none --train_batch_size 4 --max_train_steps 6 --checkpointing_steps 4 --use_ema"
    )
    script_name = f"train_{name}"
    run(script_name, f"{arguments} --output_dir {tmp_path / 'whole'}")
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    run(script_name, f"{arguments} --output_dir {tmp_path / 'broken'} --resume_from_checkpoint latest")
    model = ImageVQModel if name == "image_vq" else TextVQModel
    whole, resumed = (model.from_pretrained(tmp_path / folder) for folder in ("whole", "broken"))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, msg=key)


@pytest.mark.slow
def test_the_adaptive_weight_of_a_compiled_decoder_may_come_after_steps_without(run, root, tmp_path, monkeypatch):
    """A compiled backward would give away what the weight's gradients need."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="aot_eager"))
    run(
        "train_image_vq",
        f"--dataset_name {root / 'training/data/emoji.parquet'} --max_train_samples 8 --validation_split none "
        "--block_out_channels 8 8 --norm_num_groups 4 --latent_channels 8 --train_batch_size 4 --max_train_steps 4 "
        "--adversarial_weight 0.5 --adversarial_start 2 --adaptive_weight --discriminator_channels 8 "
        f"--discriminator_layers 2 --compile --report_to none --output_dir {tmp_path / 'out'}",
    )
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("adversarial_loss", ["hinge", "non_saturating"])
def test_adversarial_training_resumes_to_the_same_weights(run, root, tmp_path, adversarial_loss):
    torch.manual_seed(0)
    backbone = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    backbone.save_pretrained(tmp_path / "backbone")
    arguments = (
        f"--dataset_name {root / 'training/data/emoji.parquet'} --max_train_samples 8 --validation_split none "
        "--block_out_channels 8 8 --norm_num_groups 4 --latent_channels 8 --quantizer_type ibq --entropy_weight 0.1 "
        f"--perceptual_backbone {tmp_path / 'backbone'} --perceptual_weight 0.5 --reconstruction_loss l1 "
        f"--adversarial_weight 0.5 --adversarial_loss {adversarial_loss} --adversarial_start 3 "
        "--discriminator_warmup 2 --adaptive_weight --lecam_weight 0.01 --discriminator_channels 8 "
        "--discriminator_layers 2 --report_to tensorboard --train_batch_size 4 --max_train_steps 6 "
        "--checkpointing_steps 4 --gradient_accumulation_steps 2"
    )
    run("train_image_vq", f"{arguments} --output_dir {tmp_path / 'whole'}")
    folders = [path.parent for path in (tmp_path / "whole").rglob("events.*")]
    logged = next(log for log in (EventAccumulator(str(f)).Reload() for f in folders) if log.Tags()["scalars"])
    assert [event.step for event in logged.Scalars("discriminator")] == [2, 3, 4, 5, 6]
    assert [event.step for event in logged.Scalars("generator")] == [4, 5, 6]
    scalars = set(logged.Tags()["scalars"])
    assert {"perceptual", "entropy", "commitment", "lecam", "adaptive_weight", "usage", "perplexity"} < scalars
    assert {"gradient_norm", "discriminator_gradient_norm"} < scalars
    assert logged.Tags()["images"] == ["validation/reconstructions"]

    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    run("train_image_vq", f"{arguments} --output_dir {tmp_path / 'broken'} --resume_from_checkpoint latest")
    whole, resumed = (ImageVQModel.from_pretrained(tmp_path / folder) for folder in ("whole", "broken"))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantizer",
    [
        *("rvq --num_quantizers 2", "simvq --gradient_estimator rotation", "fsq --fsq_levels 8 5 5"),
        "lfq --vq_embed_dim 6 --entropy_weight 0.1",
    ],
)
def test_every_quantizer_trains(run, root, tmp_path, quantizer):
    run(
        "train_image_vq",
        f"--dataset_name {root / 'training/data/emoji.parquet'} --max_train_samples 8 --validation_split none "
        "--block_out_channels 8 8 --norm_num_groups 4 --latent_channels 8 --report_to none --train_batch_size 4 "
        f"--max_train_steps 2 --output_dir {tmp_path} --quantizer_type {quantizer}",
    )
    model = ImageVQModel.from_pretrained(tmp_path)
    assert model.config.quantizer_type == quantizer.split()[0]
    assert model.num_codes == {"rvq": 1024, "simvq": 1024, "fsq": 200, "lfq": 64}[model.config.quantizer_type]


@pytest.mark.slow
def test_residual_codes_from_the_tokenizers_to_the_transformer(run, root, tmp_path, capsys):
    data = f"--dataset_name {root / 'training/data/emoji.parquet'}"
    residual, few = "--quantizer_type rvq --num_quantizers 2", f"{data} --max_train_samples 10 --report_to none"
    run(
        "train_image_vq",
        f"{few} --output_dir {tmp_path / 'image_vq'} {residual} --resolution 16 --block_out_channels 8 8 "
        "--norm_num_groups 4 --latent_channels 8 --num_vq_embeddings 32 --train_batch_size 4 --max_train_steps 2",
    )
    run(
        "train_text_vq",
        f"{few} --output_dir {tmp_path / 'text_vq'} {residual} --downsample_factor 2 --pack_captions --num_codes 32 "
        "--tokenizer_vocab_size 300 --max_length 16 --train_batch_size 2 --max_train_steps 2",
    )
    models = f"--image_vq {tmp_path / 'image_vq'} --text_vq {tmp_path / 'text_vq'}"
    run("encode_dataset", f"{data} --max_samples 10 {models} --text_columns text_zh --output_dir {tmp_path / 'codes'}")
    tasks = "--tasks text->image,image->text,text->text_zh"
    run(
        "train_vqdit",
        f"--codes_dir {tmp_path / 'codes'} {models} {TINY} {tasks} --output_dir {tmp_path / 'base'} "
        "--max_train_steps 2 --train_batch_size 4",
    )
    pipe = VQDiTPipeline.from_pretrained(tmp_path / "base")
    segments = pipe.transformer.config.segments
    assert segments["image"]["shape"] == [8, 8, 2] and segments["image"]["patch"] == [1, 1, 2]
    assert segments["text"]["shape"] == [8, 2] and segments["text"]["patch"] == [1, 2]
    assert isinstance(pipe(image=pipe("an apple", num_inference_steps=2).images[0]).texts[0], str)
    run(  # another patch needs to be asked for, here as before
        "train_vqdit",
        f"--pretrained_model_name_or_path {tmp_path / 'base'} --codes_dir {tmp_path / 'codes'} {TUNE} {tasks} "
        f"--output_dir {tmp_path / 'more'} --max_train_steps 1 --train_batch_size 4",
    )
    capsys.readouterr()
    run("evaluate_tokenizer", f"{data} --tokenizer {tmp_path / 'text_vq'} --caption_columns text text_zh")
    figures = json.loads(capsys.readouterr().out)
    assert {"exact_text", "exact_text_zh", "usage_1", "usage_2", "perplexity_2", "positions"} < figures.keys()
    run("evaluate_tokenizer", f"{data} --tokenizer {tmp_path / 'image_vq'} --max_samples 4")
    assert {"psnr", "usage_2", "perplexity_1"} < json.loads(capsys.readouterr().out).keys()


@pytest.mark.slow
def test_finetuning_on_a_folder_with_a_broken_file(run, tokenizers, picture_folder, tmp_path, caplog):
    codes = (
        f"--codes_dir {tokenizers / 'codes'} --image_vq {tokenizers / 'image_vq'} --text_vq {tokenizers / 'text_vq'}"
    )
    codes += " --tasks text->image,image->text,->image"
    run("train_vqdit", f"{codes} --output_dir {tmp_path / 'base'} {TINY} --max_train_steps 2 --train_batch_size 4")
    (picture_folder / "6.png").write_bytes(b"broken")
    run(
        "train_vqdit",
        f"--pretrained_model_name_or_path {tmp_path / 'base'} --train_data_dir {picture_folder} {TUNE} "
        f"--output_dir {tmp_path / 'mine'} --tasks text->image,->image --max_train_steps 3 --dropout 0.2 "
        "--train_batch_size 4 --validation_prompts apple --validation_steps 2 --gradient_checkpointing "
        "--report_to tensorboard",
    )
    assert list((tmp_path / "mine" / "logs").rglob("events.*"))
    assert "6.png" in caplog.text and "skipped 1 of 10" in caplog.text
    assert len(CodeDataset(tmp_path / "mine" / "codes")) == 9
    assert (tmp_path / "mine" / "samples" / "step-000002.png").is_file()
    index = json.loads((tmp_path / "mine" / "transformer" / "config.json").read_text())
    assert set(index["tasks"]) == {"text->image", "image->text", "->image"}
    assert index["dropout"] == 0.2
    pipe = VQDiTPipeline.from_pretrained(tmp_path / "mine")
    assert len(pipe("apple", num_inference_steps=2).images) == 1
    assert pipe.config.segments == {name: {"modality": name, "tokenizer": f"{name}_vq"} for name in ("image", "text")}


@pytest.mark.slow
def test_a_lora_is_small_and_at_scale_zero_changes_nothing(run, tokenizers, picture_folder, tmp_path):
    codes = f"--codes_dir {tokenizers / 'codes'} --image_vq {tokenizers / 'image_vq'} --tasks label->image,->image"
    run("train_vqdit", f"{codes} --output_dir {tmp_path / 'base'} {TINY} --max_train_steps 30 --train_batch_size 8")
    lora = f"--pretrained_model_name_or_path {tmp_path / 'base'} --codes_dir {tokenizers / 'codes'} --rank 2 {TUNE}"
    arguments = f"{lora} --tasks label->image --train_batch_size 4 --use_ema --ema_decay 0.5 --learning_rate 1e-2"
    run("train_vqdit", f"{arguments} --output_dir {tmp_path / 'lora'} --max_train_steps 12 --checkpointing_steps 8")
    files = [path.name for path in (tmp_path / "lora").iterdir() if path.is_file()]
    weights = "pytorch_lora_weights.safetensors"
    assert sorted(files) == [".lock", "README.md", weights]
    size = (tmp_path / "lora" / weights).stat().st_size
    assert size < (tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size / 4

    # A killed run resumes to the same LoRA.
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "lora" / "checkpoint-8", tmp_path / "broken" / "checkpoint-8")
    resumed = f"--output_dir {tmp_path / 'broken'} --max_train_steps 12 --resume_from_checkpoint latest"
    run("train_vqdit", f"{arguments} {resumed}")
    whole, again = (load_file(tmp_path / name / weights) for name in ("lora", "broken"))
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, msg=name)

    pipe = VQDiTPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)

    def logits():
        codes = {"image": torch.full((1, 8, 8), pipe.transformer.config.segments["image"]["vocab_size"])}
        with torch.no_grad():
            return pipe.transformer(codes, given={"label": torch.zeros(1, 1, dtype=torch.int64)}).sample["image"]

    base = logits()
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="style")
    changed = logits()
    assert (changed - base).abs().max() > 1e-2
    pipe.set_adapters("style", 0.0)
    assert torch.equal(logits(), base)
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    torch.testing.assert_close(logits(), changed, atol=1e-4, rtol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(logits(), base, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\['text'\] are new to the pipeline; a LoRA can't add them"):
        run("train_vqdit", f"{lora} --tasks text->image --output_dir {tmp_path / 'text'}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--caption_column title", "column 'title' is not in the data"),
        ("--tasks text-image", "must have one '->'"),
        ("--tasks label->image --label_column kind", "column 'kind' is not in the data"),
        ("--tasks label->image", r"need the segments \['label'\]; .* --label_column$"),
        ("--resume_from_checkpoint checkpoint-9", "'checkpoint-9' is not in"),
    ],
)
def test_bad_arguments_are_named(run, tokenizers, picture_folder, tmp_path, change, message):
    models = f"--image_vq {tokenizers / 'image_vq'} --text_vq {tokenizers / 'text_vq'}"
    with pytest.raises(ValueError, match=message):
        run("train_vqdit", f"{models} --train_data_dir {picture_folder} --output_dir {tmp_path} {TINY} {change}")


def test_flags_are_frozen(script, root):
    expected = json.loads((root / "tests/training/flags.json").read_text())
    written = {path.stem for path in (root / "training").glob("*.py") if "def parse_args" in path.read_text()}
    assert expected.keys() == {name for name in written if not name.startswith("prepare_")}
    for name, flags in expected.items():
        module = script(name)
        required = {
            "encode_dataset": "--image_vq x --output_dir x",
            "train_vqdit": "--codes_dir x --image_vq x",
            "train_latent_dit": "--dataset_name x --image_vq x",
            "distill_vqdit": "--codes_dir x --pretrained_model_name_or_path x",
            "evaluate_tokenizer": "--tokenizer x",
            "train_tokenizer": "--dataset_name x",
            "evaluate": "--pretrained_model_name_or_path x",
            "evaluate_speech": "--pretrained_model_name_or_path x",
            "plot_run": "--output_dir x",
        }
        args = module.parse_args(required.get(name, "").split())
        assert sorted(vars(args)) == flags, name


def test_a_tokenizer_is_measured_on_any_pictures(root, image_vq, picture_folder, tmp_path):
    image_vq.save_pretrained(tmp_path / "image_vq")
    options = ["--tokenizer", tmp_path / "image_vq", "--train_data_dir", picture_folder, "--split", "train"]
    subprocess.run(
        [sys.executable, root / "training/evaluate.py", *options, "--output_file", tmp_path / "figures.json"],
        check=True,
    )
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image")
    pictures, _ = decode_images(dataset, "image", image_vq.config.sample_size)
    expected = measure_image_tokenizer(image_vq, [pictures])
    assert json.loads((tmp_path / "figures.json").read_text()) == pytest.approx(expected, rel=1e-5)


def test_the_starter_dataset_can_be_loaded_as_a_user_would(root):
    data = load_dataset("parquet", data_files=str(root / "training/data/emoji.parquet"), split="train")
    assert data[0]["image"].size == (64, 64) and data[0]["text"] == "grinning face" and data[0]["text_zh"] == "嘿嘿"


def test_codes_without_what_made_them_are_told(run, image_vq, text_vq, tokenizer, picture_folder, tmp_path, caplog):
    text_vq.save_pretrained(tmp_path / "text_vq")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image")
    parts = {"image_vq": image_vq, "text_vq": text_vq, "tokenizer": tokenizer}
    columns = {"image_column": "image", "caption_column": "text", "label_column": "label"}
    encode_dataset(dataset, tmp_path / "codes", **parts, **columns, resolution=16)
    codes = f"--codes_dir {tmp_path / 'codes'} --tasks label->image --output_dir {tmp_path / 'pipe'}"
    with caplog.at_level("WARNING", "diffusers_vqdit"):
        run("train_vqdit", f"{codes} --text_vq {tmp_path / 'text_vq'} {TINY} --max_train_steps 1")
    assert "were made by ['image_vq'], without which" in caplog.text and "give --image_vq" in caplog.text
    pipe = VQDiTPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe(class_labels=0, output_type="latent", num_inference_steps=1).images.shape[1:] == (4, 4)
