"""Training scripts publish what they trained, and what is loaded from the Hub is what was trained."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from diffusers_vqdit import ImageVQModel, TextVQModel, VQDiTLatentPipeline, VQDiTPipeline
from diffusers_vqdit.training.arguments import tracker_config
from diffusers_vqdit.training.model_card import Measure, shown_command, training_card
from diffusers_vqdit.training.publish import draw_gallery, publish_run
from diffusers_vqdit.utils.provenance import GENERATED, digital_source_type


COMMON = "--report_to none --max_train_steps 2 --train_batch_size 4 --checkpointing_steps 1 --push_to_hub"

LOAD_AND_DRAW = """
import hashlib, sys, torch
import diffusers_vqdit
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
codes = pipe("a red apple", num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="pt").images
print(hashlib.sha256(codes.numpy().tobytes()).hexdigest())
"""


@pytest.fixture
def run(script, monkeypatch):
    def run(name, arguments):
        monkeypatch.setattr(sys, "argv", [f"training/{name}.py", *arguments.split(), "--hub_token", "hf_alice"])
        module = script(name)
        module.main(module.parse_args(sys.argv[1:]))

    return run


def published_files(hub, repo_id):
    repository = hub.repositories[repo_id]
    assert len(repository.log()) == 2  # one commit after the first, empty one
    return repository.resolve("main").files


@pytest.mark.slow
def test_a_pipeline_is_trained_pushed_and_drawn_from_bit_for_bit(run, hub, client, pipeline, picture_folder, tmp_path):
    pipeline.save_pretrained(tmp_path / "base")
    run(
        "train_vqdit",
        f"{COMMON} --pretrained_model_name_or_path {tmp_path / 'base'} --train_data_dir {picture_folder} "
        f"--output_dir {tmp_path / 'run'} --hub_model_id alice/drawn --tasks text->image,->image --validation_prompts "
        "apple dot --license apache-2.0 --data_license own --language en zh",
    )
    files = published_files(hub, "alice/drawn")
    assert {"README.md", "model_index.json", "pipeline.py", "samples/0.png", "samples/1.png"} <= set(files)
    assert not any(path.startswith(("checkpoint", "codes", "logs", "tmp")) for path in files)
    assert digital_source_type(tmp_path / "run" / "samples" / "1.png") == GENERATED

    card = ModelCard(files["README.md"].content.decode())
    assert card.data.license == "apache-2.0" and card.data.language == ["en", "zh"]
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert [one["text"] for one in card.data.widget] == ["apple", "dot"]
    assert {result.task_name for result in card.data.eval_results} <= {"text->image", "->image"}
    assert "hf_alice" not in card.content and "--hub_token ..." in card.content

    local = VQDiTPipeline.from_pretrained(tmp_path / "run")
    local.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = local("a red apple", num_inference_steps=3, generator=generator, output_type="pt").images
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    drawn = subprocess.run(
        [sys.executable, "-c", LOAD_AND_DRAW, "alice/drawn"], env=environment, capture_output=True, text=True
    )
    assert drawn.stdout.strip() == hashlib.sha256(images.numpy().tobytes()).hexdigest(), drawn.stderr


LORA = """
import hashlib, sys, torch
import diffusers_vqdit
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
def draw():
    generator = torch.Generator().manual_seed(5)
    images = pipe("a red apple", num_inference_steps=3, generator=generator, output_type="pt").images
    print(hashlib.sha256(images.numpy().tobytes()).hexdigest())
draw()
pipe.load_lora_weights(sys.argv[2], adapter_name="style")
for scale in (0.0, 1.0):
    pipe.set_adapters(["style"], [scale])
    draw()
pipe.unload_lora_weights()
draw()
"""


@pytest.mark.slow
def test_a_lora_is_trained_pushed_and_loaded_over_its_base(run, hub, client, pipeline, picture_folder, tmp_path):
    pytest.importorskip("peft")
    pipeline.push_to_hub("alice/base", token="hf_alice")
    pipeline.save_pretrained(tmp_path / "base")
    run(
        "train_vqdit",
        f"{COMMON} --pretrained_model_name_or_path alice/base --train_data_dir {picture_folder} --rank 2 "
        f"--lora_alpha 32 --learning_rate 1e-1 --output_dir {tmp_path / 'run'} --hub_model_id alice/style "
        "--tasks text->image --lr_warmup_steps 0",
    )
    files = published_files(hub, "alice/style")
    assert set(files) - {".gitattributes"} == {"README.md", "pytorch_lora_weights.safetensors"}
    card = ModelCard(files["README.md"].content.decode())
    assert card.data.base_model == ["alice/base"] and "lora" in card.data.tags
    assert 'pipe.load_lora_weights("alice/style")' in card.content

    local = VQDiTPipeline.from_pretrained(tmp_path / "base")
    local.set_progress_bar_config(disable=True)
    expected = []
    for lora in (None, tmp_path / "run"):
        if lora is not None:
            local.load_lora_weights(lora)
        generator = torch.Generator().manual_seed(5)
        images = local("a red apple", num_inference_steps=3, generator=generator, output_type="pt").images
        expected.append(hashlib.sha256(images.numpy().tobytes()).hexdigest())
    base, styled = expected
    assert base != styled

    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    drawn = subprocess.run(
        [sys.executable, "-c", LORA, "alice/base", "alice/style"], env=environment, capture_output=True, text=True
    )
    assert drawn.stdout.split() == [base, base, styled, base], drawn.stderr


def test_tokenizers_are_trained_and_pushed(run, hub, client, root, tmp_path):
    data = f"--dataset_name {root / 'training/data/emoji.parquet'} --max_train_samples 8 --validation_split none"
    small = "--block_out_channels 8 8 --norm_num_groups 4 --latent_channels 8 --resolution 16"
    run("train_image_vq", f"{COMMON} {data} {small} --output_dir {tmp_path / 'iv'} --hub_model_id alice/iv")
    run("train_text_vq", f"{COMMON} {data} --output_dir {tmp_path / 'tv'} --hub_model_id alice/tv")
    images, texts = published_files(hub, "alice/iv"), published_files(hub, "alice/tv")
    weights = "diffusion_pytorch_model.safetensors"
    model, tokenizer = {".gitattributes", "README.md", "config.json", weights}, "tokenizer/tokenizer"
    assert set(images) == model  # and not the validation pictures, which are the data's
    assert set(texts) == {*model, f"{tokenizer}.json", f"{tokenizer}_config.json"}
    for files in (images, texts):
        assert not any(path.startswith("checkpoint") for path in files)
        assert ModelCard(files["README.md"].content.decode()).data.eval_results
    ImageVQModel.from_pretrained("alice/iv", cache_dir=tmp_path / "cache")
    TextVQModel.from_pretrained("alice/tv", cache_dir=tmp_path / "cache")


PRIVATE = [
    *("latents.safetensors", "gallery.safetensors", "notes/private.safetensors", "secret_config.json", "config.json"),
    *("samples/step-000001.png", "samples/mine.png", "codes/train-00000.parquet", "logs/events", "me.py", ".env"),
    *(
        "transformer/latents.safetensors",
        "tokenizer/names.json",
        "checkpoint-1/model.safetensors",
        "other/config.json",
    ),
    *("image_vq/samples/0.png", "tmp-run/model_index.json", "pytorch_lora_weights.safetensors", "transformer/a.txt"),
]


def write_private_files(folder):
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")


@pytest.mark.parametrize("listed", [True, False])
def test_what_was_saved_is_published_and_nothing_else(hub, client, script, pipeline, tmp_path, listed):
    write_private_files(tmp_path / "run")
    pipeline.save_pretrained(tmp_path / "run")
    pipeline.save_pretrained(tmp_path / "clean")
    saved = [p.relative_to(tmp_path / "clean").as_posix() for p in (tmp_path / "clean").rglob("*") if p.is_file()]
    name = f"alice/listed-{listed}".lower()
    arguments = f"--codes_dir x --image_vq x --push_to_hub --output_dir {tmp_path / 'run'} --hub_model_id {name}"
    args = script("train_vqdit").parse_args(arguments.split())
    samples = draw_gallery(pipeline, ["a dot"], tmp_path / "run", name)
    publish_run(args, pipeline, files=saved if listed else None, samples=samples)
    assert set(published_files(hub, name)) == {".gitattributes", "README.md", "samples/0.png", *saved}
    with pytest.raises(ValueError, match="files has 'gone.safetensors', which is no file in folder="):
        publish_run(args, pipeline, files=["gone.safetensors"])


def test_a_model_is_published_without_what_else_its_folder_holds(hub, client, text_vq, tmp_path):
    write_private_files(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    text_vq.save_pretrained(str(tmp_path / "run"), push_to_hub=True, repo_id="alice/beside", max_shard_size="10KB")
    files = set(published_files(hub, "alice/beside"))
    assert {"README.md", "config.json", "diffusion_pytorch_model.safetensors.index.json"} < files
    assert files & set(PRIVATE) == {"config.json"} and sum(name.endswith(".safetensors") for name in files) > 2


def test_a_latent_pipeline_is_trained_and_pushed_with_every_checkpoint(
    run, hub, client, image_vq, picture_folder, tmp_path
):
    image_vq.save_pretrained(tmp_path / "vq")
    run(
        "train_latent_dit",
        f"{COMMON} --hub_strategy every_save --image_vq {tmp_path / 'vq'} --train_data_dir {picture_folder} "
        "--label_column label --num_layers 1 --num_attention_heads 1 --attention_head_dim 16 "
        "--validation_labels round square "
        f"--output_dir {tmp_path / 'run'} --hub_model_id alice/latent --use_ema",
    )
    repository = hub.repositories["alice/latent"]
    assert repository.log()[:2] == ["End of training", "Training, step 1"]
    last = repository.resolve("main").files
    before = repository.commits[repository.resolve("main").parent].files
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert last[weights].content != before[weights].content
    card = ModelCard(last["README.md"].content.decode())
    assert [one["text"] for one in card.data.widget] == ["round", "square"]
    assert card.data.pipeline_tag == "unconditional-image-generation" and "flow-matching" in card.data.tags
    pipe = VQDiTLatentPipeline.from_pretrained("alice/latent", cache_dir=tmp_path / "cache")
    assert pipe.labels == {"round": 0, "square": 1}


def test_training_goes_on_where_a_checkpoint_cannot_be_published(run, hub, client, image_vq, picture_folder, tmp_path):
    image_vq.save_pretrained(tmp_path / "vq")
    arguments = (
        f"{COMMON} --hub_strategy every_save --image_vq {tmp_path / 'vq'} --train_data_dir {picture_folder} "
        "--num_layers 1 --num_attention_heads 1 --attention_head_dim 16 "
        f"--output_dir {tmp_path / 'run'} --hub_model_id bob/latent"
    )
    with pytest.raises(HfHubHTTPError):  # alice's token has no right there
        run("train_latent_dit", arguments)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("command", [["a.py", "--hub_token", "secret"], ["a.py", "--hub_token=secret", "--x", "a b"]])
def test_a_card_shows_no_token(command):
    shown = shown_command(command)
    assert "secret" not in shown and shown.startswith("accelerate launch a.py --hub_token")


def test_trackers_are_given_no_token(script):
    args = script("train_image_vq").parse_args(["--hub_token", "secret"])
    assert "secret" not in str(tracker_config(args)) and tracker_config(args)["seed"] == 0


EVERYWHERE = {
    "hub_token": "{}",
    "dataset_name": "https://bob:{}@example.org/data.parquet?token={}",
    "dataset_config_name": "{}",
    "caption_column": "caption{}",
    "image_column": "{}",
    "label_column": "x={}",
    "image_vq": "/home/bob/{}/vq",
    "text_vq": "../{}",
    "cache_dir": "/home/someone/{}",
    "tasks": "{}",
    "logging_dir": "{}",
    "license": "{}",
    "data_license": "See https://{}@example.org and ~/{}.",
    "variant": "{}",
    "revision": "{}",
    "resume_from_checkpoint": "{}",
    "hub_model_id": "alice/{}",
}
SECRETS = {"environment": "other-secret", "look": "hf_" + "aB3" * 11}


@pytest.mark.parametrize("place", [*EVERYWHERE, *SECRETS])
def test_a_secret_is_nowhere_in_card_pictures_and_trackers(script, pipeline, tmp_path, monkeypatch, place):
    secret = SECRETS.get(place, "plain-secret")
    monkeypatch.setenv("HF_TOKEN", SECRETS["environment"])
    arguments = {"hub_token": "plain-secret", "image_vq": "x", "dataset_name": "x", "output_dir": str(tmp_path)}
    arguments |= {
        place if place in EVERYWHERE else "caption_column": EVERYWHERE.get(place, "a{}").format(secret, secret)
    }
    words = ["/home/bob/train_vqdit.py", *(word for k, v in arguments.items() for word in (f"--{k}", v))]
    words += [f"--{key}={one}" for key, one in arguments.items()]
    args = script("train_vqdit").parse_args(words[1:])
    measures = [Measure(f"text->image {secret}", "loss", 1.0, f"data {secret}")]
    card = training_card(args, pipeline, measures=measures, samples={"samples/0.png": f"a {secret}"}, command=words)
    draw_gallery(pipeline, [f"a {secret}"], tmp_path, f"alice/{secret}", hub_token=args.hub_token)
    for shown in (card.content, str(tracker_config(args)), str(Image.open(tmp_path / "samples" / "0.png").info)):
        assert secret not in shown
    assert "bob" not in card.content and "accelerate launch train_vqdit.py" in card.content


def test_local_paths_are_nowhere_in_a_card(script, pipeline, tmp_path):
    arguments = (
        f"--image_vq {Path.home()}/vq --text_vq ~/runs/tv --train_data_dir=../../pictures --output_dir {tmp_path}/run "
        "--cache_dir /home/carol/cache --max_train_samples 5"
    ).split()
    args = script("train_vqdit").parse_args(arguments)
    command = [f"{tmp_path}/training/train_vqdit.py", *arguments, "--codes_dir=outputs/codes"]
    card = training_card(args, pipeline, command=command).content
    for hidden in (str(Path.home()), "~", "../", "carol", "/home", str(tmp_path), tmp_path.name, "runs"):
        assert hidden not in card, hidden
    assert "* Training data: pictures;" in card and "# run" in card
    assert "train_vqdit.py --image_vq vq --text_vq tv --train_data_dir=pictures --output_dir run" in card
    assert "--codes_dir=outputs/codes" in card  # inside the project
    assert "base_model" not in card  # `vq` is no name on the Hub


def test_configs_name_no_folder_of_this_machine(hub, client, image_vq, tmp_path):
    image_vq.save_pretrained(tmp_path / "private-folder" / "vq")
    model = ImageVQModel.from_pretrained(tmp_path / "private-folder" / "vq")
    model.push_to_hub("alice/origin")
    config = json.loads(published_files(hub, "alice/origin")["config.json"].content)
    assert config["_name_or_path"] == "vq"
    loaded = ImageVQModel.from_pretrained("alice/origin", cache_dir=tmp_path / "cache")
    assert {**loaded.config, "_name_or_path": None} == {**model.config, "_name_or_path": None}


def test_a_card_is_complete_and_valid(client, script, pipeline, tmp_path):
    arguments = (
        "--pretrained_model_name_or_path someone/base --dataset_name someone/pictures --hub_model_id alice/mine "
        "--hub_token hf_alice --license mit --language en --data_license CC0 --learning_rate 1e-4"
    )
    args = script("train_vqdit").parse_args(arguments.split())
    measures = [Measure("text->image", "CLIP score", 0.25, "held-out captions")]
    card = training_card(args, pipeline, measures=measures, samples={"samples/0.png": "a dot"}, command=["x.py"])
    metadata = card.data.to_dict()
    assert metadata["base_model"] == ["someone/base"] and metadata["datasets"] == ["someone/pictures"]
    assert metadata["license"] == "mit" and "diffusers_vqdit" in metadata["tags"]
    result = metadata["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 0.25 and result["task"]["type"] == "text-to-image"
    for heading in ("Use", "Intended use", "Limits", "Risks", "Evaluation", "Training", "Data and licences"):
        assert f"\n## {heading}\n" in card.content, heading
    for risk in ("Forgery", "Privacy", "Bias"):
        assert f"**{risk}.**" in card.content, risk
    assert "| text->image | held-out captions | CLIP score | 0.25 |" in card.content
    assert "hf_alice" not in card.content and "`learning_rate`" in card.content
    huggingface_hub.HfApi()._validate_yaml(card.content)
    card.save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == metadata


def test_the_hub_refuses_a_card_that_is_not_valid(client):
    with pytest.raises(ValueError, match="Invalid metadata"):
        huggingface_hub.HfApi()._validate_yaml("---\nlicense: [mit\n---\n")


@pytest.mark.parametrize(
    ("name", "arguments", "shown", "hidden"),
    [
        (
            *("train_vqdit", "--image_vq x --train_data_dir x"),
            "num_layers num_attention_heads attention_head_dim patch masking num_train_epochs image_augmentations",
            "lora_alpha lora_dropout lora_layers rank ema_decay max_train_steps",
        ),
        (
            "train_vqdit",
            "--pretrained_model_name_or_path x --train_data_dir x --dropout 0.1 --use_ema --ema_decay 0.9",
            "dropout ema_decay image_augmentations caption_column",
            "num_layers num_attention_heads attention_head_dim patch masking lora_dropout lora_layers image_vq",
        ),
        (
            *("train_vqdit", "--pretrained_model_name_or_path x --codes_dir x --rank 4 --max_train_steps 9"),
            "rank lora_dropout lora_layers codes_dir max_train_steps",
            "num_layers image_column caption_column prompt_columns image_augmentations num_train_epochs ema_decay",
        ),
        (
            *("distill_vqdit", "--pretrained_model_name_or_path x --codes_dir x --use_ema"),
            "num_teacher_steps num_student_steps tasks ema_decay",
            "guidance_scale image_column caption_column image_augmentations max_train_steps",
        ),
        (
            *("train_latent_dit", "--image_vq x --train_data_dir x --label_column label --lr_warmup_steps 9"),
            "num_layers patch_size dropout shift logit_normal label_dropout lr_warmup_steps",
            "learn_sigma snr_gamma caption_dropout alignment_weight alignment_layer ema_decay",
        ),
        (
            "train_latent_dit",
            "--image_vq x --train_data_dir x --objective epsilon --learn_sigma --alignment_encoder x "
            "--lr_scheduler constant --caption_columns text",
            "num_layers learn_sigma alignment_weight alignment_layer caption_dropout",
            "shift logit_normal label_dropout lr_warmup_steps",
        ),
        (
            *("train_latent_dit", "--pretrained_model_name_or_path x --train_data_dir x"),
            "objective random_flip",
            "num_layers num_attention_heads attention_head_dim patch_size dropout shift image_vq text_encoder",
        ),
        (
            *("train_image_vq", "--train_data_dir x"),
            "block_out_channels num_vq_embeddings vq_embed_dim codebook_update restart_threshold reconstruction_loss",
            "fsq_levels adversarial_loss lecam_weight discriminator_layers perceptual_backbone ema_decay",
        ),
        (
            *("train_image_vq", "--train_data_dir x --quantizer_type fsq --fsq_levels 8 8 --adversarial_weight 0.1"),
            "fsq_levels quantizer_type adversarial_loss lecam_weight discriminator_layers",
            "num_vq_embeddings vq_embed_dim codebook_update restart_threshold beta entropy_weight",
        ),
        (
            *("train_image_vq", "--train_data_dir x --pretrained_model_name_or_path x"),
            "resolution reconstruction_loss",
            "block_out_channels num_vq_embeddings quantizer_type codebook_norm beta mid_block_attention",
        ),
        (
            *("train_text_vq", "--train_data_dir x --use_ema"),
            "num_codes tokenizer_vocab_size max_length random_token_probability ema_decay",
            "pretrained_model_name_or_path",
        ),
        (
            *("train_text_vq", "--train_data_dir x --pretrained_model_name_or_path x"),
            "random_token_probability caption_columns",
            "num_codes num_codebooks code_dim tokenizer_vocab_size max_length hidden_size kernel_size num_layers",
        ),
    ],
)
def test_a_card_lists_what_applied(script, pipeline, name, arguments, shown, hidden):
    args = script(name).parse_args(arguments.split())
    args.learning_rate = args.learning_rate or 1e-3  # where none is given, that of the model is entered
    assert set(hidden.split()) | set(shown.split()) <= set(vars(args))
    card = training_card(args, pipeline, command=["x.py"]).content
    assert {one for one in shown.split() if f"| `{one}` |" not in card} == set()
    assert {one for one in hidden.split() if f"| `{one}` |" in card} == set()
    for one in ("seed", "train_batch_size", "learning_rate", "adam_beta2", "train_data_dir"):
        assert f"| `{one}` |" in card or (one == "train_data_dir" and args.train_data_dir is None)
