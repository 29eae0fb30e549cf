"""Training over latents as a user runs it: pictures to a pipeline that draws them; killed and resumed; aligned."""

import shutil

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from diffusers_vqdit import ImageVQModel, VQDiTLatentPipeline
from diffusers_vqdit.models.vae_latents import encode_latents
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.utils.decoding import to_pixels


@pytest.fixture
def run(script):
    def run(arguments):
        module = script("train_latent_dit")
        module.main(module.parse_args(arguments.split()))

    return run


@pytest.fixture
def models(image_vq, text_vq, tokenizer, tmp_path):
    """A random VQ, whose latents are as good as any to be learned by heart, and a text tokenizer."""
    image_vq.save_pretrained(tmp_path / "image_vq")
    text_vq.save_pretrained(tmp_path / "text_vq")
    tokenizer.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    return f"--image_vq {tmp_path / 'image_vq'}", f"--text_vq {tmp_path / 'text_vq'}"


TINY = "--num_layers 2 --num_attention_heads 2 --attention_head_dim 16 --patch_size 1 --report_to none"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "steps"), [("flow", 20), ("v_prediction --snr_gamma 5", 20), ("epsilon --learn_sigma", 100)]
)
def test_ten_pictures_are_drawn_from_their_captions(run, models, picture_folder, tmp_path, objective, steps):
    run(
        f"--train_data_dir {picture_folder} --caption_columns text --label_column label {' '.join(models)} "
        f"--objective {objective} --output_dir {tmp_path / 'out'} --num_layers 3 --num_attention_heads 4 "
        "--attention_head_dim 16 --patch_size 1 --report_to none --train_batch_size 40 --max_train_steps 500 "
        "--learning_rate 2e-3 --lr_warmup_steps 50 --lr_scheduler cosine --use_ema --ema_decay 0.98 "
        "--checkpointing_steps 1000"
    )
    pipe = VQDiTLatentPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    if objective.startswith("v_"):
        pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    dataset = load_training_dataset(train_data_dir=str(picture_folder), columns=["text"], image_column="image")
    latents = encode_latents(pipe.vae, to_pixels(decode_images(dataset, "image", 16)[0]))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    drawn = pipe(
        list(dataset["text"]),
        num_inference_steps=steps,  # epsilon is learned slowest; after so little training, ancestral steps mend it
        guidance_scale=1.5,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    nearest = torch.cdist(drawn.flatten(1), latents.flatten(1)).argmin(1)
    assert (nearest == torch.arange(10)).float().mean() >= 0.8
    assert pipe.labels == {"round": 0, "square": 1}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(run, models, picture_folder, tmp_path):
    arguments = (
        f"--train_data_dir {picture_folder} --label_column label {models[0]} {TINY} --random_flip --use_ema "
        f"--latents_file {tmp_path / 'latents.safetensors'} --train_batch_size 4 --max_train_steps 6 "
        "--checkpointing_steps 4 --gradient_accumulation_steps 2"
    )
    run(f"{arguments} --output_dir {tmp_path / 'whole'}")
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    run(f"{arguments} --output_dir {tmp_path / 'broken'} --resume_from_checkpoint latest")
    whole, resumed = (VQDiTLatentPipeline.from_pretrained(tmp_path / n).transformer for n in ("whole", "broken"))
    assert whole.has_shared_embedder
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


@pytest.mark.slow
def test_alignment_to_a_frozen_encoder_and_finetuning(run, models, picture_folder, tmp_path):
    ViTModel(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=4
        )
    ).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    data = f"--train_data_dir {picture_folder} --caption_columns text --report_to none --train_batch_size 4"
    run(
        f"{data} {' '.join(models)} {TINY} --alignment_encoder {tmp_path / 'vit'} --alignment_layer 1 "
        f"--max_train_steps 3 --gradient_checkpointing --output_dir {tmp_path / 'base'}"
    )
    run(
        f"{data} --pretrained_model_name_or_path {tmp_path / 'base'} --max_train_steps 2 --validation_steps 2 "
        f"--validation_prompts apple --output_dir {tmp_path / 'mine'}"
    )
    assert (tmp_path / "mine" / "samples" / "step-000002.png").is_file()
    base, mine = (VQDiTLatentPipeline.from_pretrained(tmp_path / name) for name in ("base", "mine"))
    assert base.vae.config.latents_mean == mine.vae.config.latents_mean is not None
    assert any(
        not torch.equal(value, mine.transformer.state_dict()[name])
        for name, value in base.transformer.state_dict().items()
    )
    with pytest.raises(ValueError, match="objective='epsilon', but the pretrained pipeline's is 'flow'"):
        run(
            f"{data} --pretrained_model_name_or_path {tmp_path / 'base'} --objective epsilon "
            f"--output_dir {tmp_path / 'x'}"
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--alignment_encoder not/there --alignment_layer 1", "alignment_encoder='not/there' can't be loaded: "),
        ("--alignment_encoder not/there --alignment_layer 9", r"alignment_layer=9 must be an integer in \[1, 2\]"),
        ("--resume_from_checkpoint checkpoint-7", "checkpoint-7"),
    ],
)
def test_what_flags_alone_tell_is_told_before_latents_are_made(
    script, image_vq, picture_folder, tmp_path, monkeypatch, flags, message
):
    image_vq.save_pretrained(tmp_path / "vq")
    module = script("train_latent_dit")
    monkeypatch.setattr(module, "load_data", None)
    source = f"--train_data_dir {picture_folder} --image_vq {tmp_path / 'vq'} {TINY} --max_train_steps 1"
    with pytest.raises(ValueError, match=message):
        module.main(module.parse_args(f"{source} --output_dir {tmp_path / 'out'} {flags}".split()))


def test_a_vq_with_statistics_keeps_them(run, image_vq, picture_folder, tmp_path):
    image_vq.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4, scaling_factor=1.0)
    image_vq.save_pretrained(tmp_path / "vq")
    run(
        f"--train_data_dir {picture_folder} --image_vq {tmp_path / 'vq'} {TINY} --max_train_steps 1 "
        f"--train_batch_size 2 --output_dir {tmp_path / 'out'}"
    )
    assert list(ImageVQModel.from_pretrained(tmp_path / "out" / "vae").config.latents_mean) == [1.0] * 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("--dataset_name x", "give one of --dataset_name and --train_data_dir"),
        ("--text_vq a --text_encoder b", "give one of --text_vq and --text_encoder"),
        ("--learn_sigma", "--learn_sigma needs --objective epsilon"),
        ("--snr_gamma 5", "--snr_gamma is for --objective epsilon and v_prediction"),
        ("--image_vq=", "or --image_vq to start anew"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(script, change, told, capsys):
    module = script("train_latent_dit")
    options = "--train_data_dir x --image_vq x" if change != "--image_vq=" else "--train_data_dir x"
    with pytest.raises(SystemExit):
        module.parse_args([*options.split(), *(change.split() if change != "--image_vq=" else [])])
    assert told in capsys.readouterr().err
