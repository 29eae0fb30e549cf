"""Training scripts publish what they trained, and what is loaded from the Hub is what was trained."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from diffusers_vqdit import ImageVQModel, TextVQModel, VQDiTLatentPipeline, VQDiTPipeline
from diffusers_vqdit.training import setup
from diffusers_vqdit.training.publish import create_repository, draw_gallery, publish_run
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
    types = {result.task_name: result.task_type for result in card.data.eval_results}
    assert types.items() <= {"text->image": "text-to-image", "->image": "unconditional-image-generation"}.items()
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


def test_tokenizers_are_trained_and_pushed(run, hub, client, root, tmp_path, caplog):
    caplog.set_level("INFO")
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
    addresses = [record.message for record in caplog.records if record.message.startswith("pushed to ")]
    assert [address.rpartition("/alice/")[2] for address in addresses] == ["iv", "tv"]
    assert all(address.startswith("pushed to http") for address in addresses)


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


def test_training_goes_on_where_a_checkpoint_cannot_be_published(
    run, hub, client, image_vq, picture_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(setup, "create_repository", lambda args: None)  # as if the right were lost since
    image_vq.save_pretrained(tmp_path / "vq")
    arguments = (
        f"{COMMON} --hub_strategy every_save --image_vq {tmp_path / 'vq'} --train_data_dir {picture_folder} "
        "--num_layers 1 --num_attention_heads 1 --attention_head_dim 16 "
        f"--output_dir {tmp_path / 'run'} --hub_model_id bob/latent"
    )
    with pytest.raises(HfHubHTTPError):  # alice's token has no right there
        run("train_latent_dit", arguments)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("token, name", [("hf_nobody", "alice/early"), ("hf_alice", "bob/early")])
def test_what_the_hub_refuses_is_told_before_the_work(
    hub, client, script, pipeline, picture_folder, tmp_path, token, name
):
    pipeline.save_pretrained(tmp_path / "base")
    module = script("train_vqdit")
    arguments = f"{COMMON} --pretrained_model_name_or_path {tmp_path / 'base'} --train_data_dir {picture_folder} "
    arguments += f"--output_dir {tmp_path / 'run'} --hub_model_id {name} --hub_token {token}"
    with pytest.raises(HfHubHTTPError):
        module.main(module.parse_args(arguments.split()))
    assert not [*(tmp_path / "run").glob("checkpoint-*")] and name not in hub.repositories


def test_a_repository_of_others_is_refused_before_the_work(hub, client, script, tmp_path):
    HfApi(token="hf_bob").create_repo("bob/theirs")
    arguments = f"--codes_dir x --image_vq x --push_to_hub --output_dir {tmp_path} --hub_model_id bob/theirs"
    module = script("train_vqdit")
    with pytest.raises(HfHubHTTPError, match="no right to write to bob/theirs"):
        create_repository(module.parse_args([*arguments.split(), "--hub_token", "hf_alice"]))
    create_repository(module.parse_args([*arguments.split(), "--hub_token", "hf_bob"]))


def test_a_mirror_that_knows_no_rights_is_pushed_to(hub_server, hub, client, script, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_server, "ROUTES", [one for one in hub_server.ROUTES if "auth-check" not in one[1]])
    arguments = f"--codes_dir x --image_vq x --push_to_hub --output_dir {tmp_path} --hub_model_id alice/mirrored"
    create_repository(script("train_vqdit").parse_args([*arguments.split(), "--hub_token", "hf_alice"]))
    assert "alice/mirrored" in hub.repositories and hub.count("GET", "auth-check/write", 404) == 1


def test_a_hub_that_fails_when_a_run_begins_is_asked_again_at_its_end(hub, client, script, tmp_path, caplog):
    arguments = f"--codes_dir x --image_vq x --push_to_hub --output_dir {tmp_path} --hub_model_id alice/late"
    args = script("train_vqdit").parse_args([*arguments.split(), "--hub_token", "hf_alice"])
    hub.fail_every = 1
    create_repository(args)
    assert "alice/late" not in hub.repositories and "the Hub was not reached" in caplog.text
    hub.fail_every = 0
    create_repository(args)
    assert "alice/late" in hub.repositories
