"""Model cards of runs: complete, true, and without secrets."""

import ast
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_vqdit.training.arguments import tracker_config
from diffusers_vqdit.training.model_card import Measure, published_name, shown_command, training_card
from diffusers_vqdit.training.publish import draw_gallery


@pytest.mark.parametrize("command", [["a.py", "--hub_token", "secret"], ["a.py", "--hub_token=secret", "--x", "a b"]])
def test_a_card_shows_no_token(command):
    shown = shown_command(command)
    assert "secret" not in shown and shown.startswith("accelerate launch a.py --hub_token")


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
    # What the others need to have a say.
    arguments |= {"tasks": "label->image"} if place == "label_column" else {}
    arguments |= {"pretrained_model_name_or_path": "x"} if place in ("revision", "variant") else {}
    if "pretrained_model_name_or_path" in arguments:
        del arguments["image_vq"]
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


@pytest.mark.parametrize("base", ["b{x}", "a{0}", "we{ird", 'quo"te', "back\\\\slash", "emoji 🍎"])
def test_the_base_of_a_lora_may_have_any_name(client, script, pipeline, tmp_path, base):
    arguments = ["--pretrained_model_name_or_path", base, "--codes_dir", "codes", "--rank", "2"]
    card = training_card(script("train_vqdit").parse_args(arguments), pipeline, command=["x.py"])
    code = card.content.split("```python\n")[1].split("```")[0]
    calls = [one for one in ast.walk(ast.parse(code)) if isinstance(one, ast.Call)]
    loaded = [one.args[0].value for one in calls if getattr(one.func, "attr", "") == "from_pretrained"]
    assert loaded == [base]


def test_a_lora_is_loaded_over_the_revision_that_it_was_trained_on(script, pipeline):
    arguments = "--pretrained_model_name_or_path a/b --revision v1.0 --variant fp16 --codes_dir codes --rank 2".split()
    card = training_card(script("train_vqdit").parse_args(arguments), pipeline, command=["x.py"])
    assert 'DiffusionPipeline.from_pretrained("a/b", revision="v1.0", variant="fp16")' in card.content


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


def test_losses_of_tasks_of_different_types_are_entries_of_their_own(client, script, pipeline):
    pipeline.transformer.register_to_config(tasks=["text->image", "label->image", "->image", "image->text", "->text"])
    args = script("train_vqdit").parse_args("--codes_dir x --image_vq x --hub_model_id alice/mine".split())
    tasks = [*pipeline.transformer.config.tasks, "the whole"]
    measures = [Measure(task, "loss", float(value), "training data") for value, task in enumerate(tasks)]
    card = training_card(args, pipeline, measures=[*measures, Measure("->image", "FID", 9.0, "test data")])
    found = {
        (one["task"]["type"], one["dataset"]["name"]): (one["task"]["name"], [m["value"] for m in one["metrics"]])
        for one in card.data.to_dict()["model-index"][0]["results"]
    }
    assert found == {
        ("text-to-image", "training data"): ("text->image, label->image, the whole", [0.0, 1.0, 5.0]),
        ("unconditional-image-generation", "training data"): ("->image", [2.0]),
        ("image-to-text", "training data"): ("image->text", [3.0]),
        ("text-generation", "training data"): ("->text", [4.0]),
        ("unconditional-image-generation", "test data"): ("->image", [9.0]),
    }
    huggingface_hub.HfApi()._validate_yaml(card.content)


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


@pytest.mark.parametrize("rank", ["", "--rank 2"])
@pytest.mark.parametrize("tasks", [["label->image"], ["text->image", "->image", "image->text"], None])
def test_a_card_says_which_tasks_the_run_trained(script, pipeline, tasks, rank):
    known = pipeline.transformer.config.tasks
    tasks = tasks or known
    source = f"--train_data_dir x --tasks {','.join(tasks)}"
    finetuned = f"{source} --pretrained_model_name_or_path someone/base {rank}"
    card = training_card(script("train_vqdit").parse_args(finetuned.split()), pipeline, command=["x.py"]).content
    summary = card.split("## Use")[0]
    assert f"This run trained {', '.join(f'`{task}`' for task in tasks)}." in summary
    others = [f"`{task}`" for task in known if task not in tasks]
    assert (f"It did not train {', '.join(others)}: these are of `someone/base`" in summary) == bool(others)
    if not rank:
        anew = script("train_vqdit").parse_args(f"{source} --image_vq x".split())
        assert "This run" not in training_card(anew, pipeline, command=["x.py"]).content


def test_a_card_shows_no_call_that_needs_what_is_not_there(pipeline):
    tasks = ["text->image", "->text", "label->image", "image->text"]
    assert len(pipeline._example_calls(tasks)) == 3
    pipeline.image_vq = None
    assert pipeline._example_calls(tasks) == ['pipe(output="text").texts[0]']
    pipeline.text_vq = None
    assert pipeline._example_calls(tasks) == []


def test_a_card_shows_calls_that_work(script, pipeline, tmp_path, monkeypatch):
    """Of the tasks that the run trained most, each as a user would paste it."""
    tasks = {"->text": 1, "text->image": 2, "image->text": 4, "label->image": 3, "->image+text": 5}
    flags = f"--train_data_dir x --pretrained_model_name_or_path {tmp_path} --tasks"
    args = script("train_vqdit").parse_args([*flags.split(), ",".join(f"{one}:{tasks[one]}" for one in tasks)])
    usage = training_card(args, pipeline, command=["x.py"]).content.split("```python\n")[1].split("```")[0]
    shown = [line for line in usage.splitlines() if line.startswith("pipe(")]
    label = pipeline.config.labels[0]
    assert shown == [
        'pipe(image=load_image("image.png"), output="text").texts[0]',
        f'pipe(class_labels="{label}", output="image").images[0]',
        'pipe(prompt="a text", output="image").images[0]',
    ]
    pipeline.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("image.png")
    code = usage.split("# Without the package")[0].replace(f'"{published_name(args)}"', f'"{tmp_path}"')
    exec(compile(code, "card", "exec"), {})  # noqa: S102
