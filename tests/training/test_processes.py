"""One process and two with the same global batch train the same weights, sharded too (FSDP2, which runs on CPUs); so
do two runs with the same seed.

What makes the same sums in another order differ by more than rounding, and is kept out of these runs:

- Adam's first step is g / (|g| + eps): gradients of about eps = 1e-8 are rounding, which becomes a step of any size
  up to the learning rate. The warm-up's first rate is 0, and with more steps in the averages hardly one is left.
- A vector exactly between two codes falls to either by rounding, and a codebook of moving averages then differs by
  1e-4 to 1e-3. Of the few vectors of these runs none does; should one elsewhere, take another --seed.
- A softmax at a temperature of 0.01, the default of the entropy loss, multiplies differences by 100 at each step.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from diffusers_vqdit import (
    ImageVQModel,
    MaskedDiffusionScheduler,
    TextVQModel,
    VQDiTPipeline,
    VQDiTTransformer2DModel,
)
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.encoding import encode_dataset


STEPS = 20
CASES = {  # with AdamW, for Muon's bfloat16 rounds sums of other orders apart
    "image_vq": (
        "train_image_vq",
        8,
        "--resolution 16 --block_out_channels 8 8 16 --norm_num_groups 4 --latent_channels 8 --num_vq_embeddings 32 "
        "--vq_embed_dim 4 --restart_threshold 0.9 --use_ema --adversarial_weight 0.5 --adaptive_weight "
        "--lecam_weight 0.1 --discriminator_channels 8 --discriminator_layers 2 --entropy_weight 0.1 "
        "--entropy_temperature 0.5 --validation_split none",
    ),
    "text_vq": (
        "train_text_vq",
        16,
        "--caption_columns text phrase --tokenizer_vocab_size 300 --num_codes 400 --max_length 12 --hidden_size 16 "
        "--code_dim 8 --restart_threshold 0.9 --use_ema --validation_split none",
    ),
    "vqdit": (
        "train_vqdit",
        4,
        "--codes_dir {codes} --image_vq {image_vq} --text_vq {text_vq} --num_layers 2 --num_attention_heads 2 "
        "--attention_head_dim 16 --gradient_accumulation_steps 2 --use_ema --optimizer adamw "
        "--tasks=text->image:2,image->text:2,->image:1",
    ),
    "vqdit, buckets": (
        "train_vqdit",
        4,
        "--codes_dir {buckets} --image_vq {image_vq} --num_layers 1 --num_attention_heads 2 --attention_head_dim 16 "
        "--aspect_ratio_buckets 16,16;24,12;12,24 --use_rotary_positional_embeddings --optimizer adamw "
        "--tasks=->image",
    ),
    "vqdit, states": (
        "train_vqdit",
        4,
        "--codes_dir {states} --image_vq {image_vq} --text_encoder {t5} --num_layers 1 --num_attention_heads 2 "
        "--attention_head_dim 16 --gradient_accumulation_steps 2 --use_ema --optimizer adamw "
        "--tasks=text->image:2,->image:1",
    ),
    "distilled": (
        "distill_vqdit",
        4,
        "--pretrained_model_name_or_path {teacher} --codes_dir {codes} --num_teacher_steps 4 --num_student_steps 1 "
        "--tasks text->image:2,image->text:1 --gradient_accumulation_steps 2 --use_ema --guidance_scale 2",
    ),
    "lora": (
        "train_vqdit",
        4,
        "--pretrained_model_name_or_path {teacher} --codes_dir {codes} --rank 2 --use_ema --tasks=text->image",
    ),
    "latent_dit": (
        "train_latent_dit",
        8,
        "--image_vq {image_vq} --text_vq {text_vq} --caption_columns text phrase --label_column label --random_flip "
        "--use_ema --num_layers 2 --num_attention_heads 2 --attention_head_dim 16 --caption_dropout 0.5 "
        "--label_dropout 0.5",
    ),
    "latent_dit, streamed": (
        "train_latent_dit",
        8,
        "--streaming --image_vq {image_vq} --text_vq {text_vq} --caption_columns text phrase --label_column label "
        "--num_layers 1 --num_attention_heads 2 --attention_head_dim 16",
    ),
    "latent_dit, epsilon": (
        "train_latent_dit",
        8,
        "--image_vq {image_vq} --objective epsilon --learn_sigma --num_layers 1 --num_attention_heads 2 "
        "--attention_head_dim 16",
    ),
}


SHARDED = ("vqdit", "distilled", "lora", "latent_dit")  # transformers; of the first a run is resumed, too


@pytest.fixture(scope="module")
def trained(root, script, encoders, tmp_path_factory):
    """Every case in one process twice and in two once, and some in two with shards: run -> case -> its folder, reports
    and placed codes."""
    folder = tmp_path_factory.mktemp("processes")
    data = str(root / "training/data/emoji.parquet")
    torch.manual_seed(0)
    image_vq = ImageVQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=64,
        sample_size=16,
    ).eval()
    dataset = load_training_dataset(dataset_name=data, image_column="image", max_samples=40)
    tokenizer = script("train_text_vq").train_tokenizer(list(dataset["text"]), vocab_size=300, max_length=12)
    text_vq = TextVQModel(vocab_size=len(tokenizer), max_length=12, num_codes=64, hidden_size=16, code_dim=4).eval()
    image_vq.save_pretrained(folder / "image_vq")
    text_vq.save_pretrained(folder / "text_vq")
    tokenizer.save_pretrained(folder / "text_vq" / "tokenizer")
    encode_dataset(
        dataset,
        folder / "codes",
        resolution=16,
        image_vq=image_vq,
        text_vq=text_vq,
        tokenizer=tokenizer,
        image_column="image",
        caption_column="text",
        prompt_columns=["phrase"],
    )
    cuts = [(24, 24), (40, 20), (20, 40)]
    pictures = [Image.open(io.BytesIO(one["bytes"])).resize(cuts[row % 3]) for row, one in enumerate(dataset["image"])]
    pictures = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
    encode_dataset(
        pictures.cast_column("image", datasets.Image(decode=False)),
        folder / "buckets",
        aspect_ratio_buckets=[[16, 16], [24, 12], [12, 24]],
        image_vq=image_vq,
        image_column="image",
    )
    words = encoders.text_tokenizer(list(dataset["text"]))
    encoders.save(folder / "t5", encoders.text_encoder("t5"), words)
    encode_dataset(
        dataset,
        folder / "states",
        resolution=16,
        image_vq=image_vq,
        image_column="image",
        caption_column="text",
        prompt_columns=["phrase"],  # of several texts a row, of other lengths, one is drawn
        text_encoder=encoders.text_encoder("t5"),
        tokenizer_2=words,
    )
    segments = {"image": {"vocab_size": 64, "shape": [8, 8]}, "text": {"vocab_size": 64, "shape": [12]}}
    teacher = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        segments=segments,
        tasks=["text->image", "image->text"],
    )
    for parameter in teacher.parameters():  # zero heads know nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    teacher = VQDiTPipeline(teacher, MaskedDiffusionScheduler(), image_vq, text_vq, tokenizer)
    teacher.save_pretrained(folder / "teacher")
    parts = {name: folder / name for name in ("codes", "buckets", "states", "t5", "image_vq", "text_vq", "teacher")}

    def jobs(run, processes):
        cases = {name: CASES[name] for name in SHARDED} if run == "sharded" else CASES
        if run == "sharded":
            halfway = f" --resume_from_checkpoint {folder / run / SHARDED[0] / f'checkpoint-{STEPS // 2}'}"
            name, batch, arguments = CASES[SHARDED[0]]
            cases["resumed"] = (name, batch, arguments + halfway)
        for case, (name, batch, arguments) in cases.items():
            source = "" if "codes_dir" in arguments else f"--dataset_name {data} --max_train_samples 40 "
            options = (
                f"{source}{arguments.format(**parts)} --output_dir {folder / run / case.replace(', ', '_')} "
                f"--train_batch_size {batch // processes} --max_train_steps {STEPS} --lr_warmup_steps 10 "
                f"--mixed_precision no --report_to none --checkpointing_steps {STEPS // 2}"
            )
            log = str(folder / f"{run}-{case}.json")
            yield {"script": str(root / f"training/{name}.py"), "arguments": options.split(), "log": log}

    runs = {"one": 1, "again": 1, "two": 2, "sharded": 2}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    started = []
    for group in (["one", "again"], ["two"], ["sharded"]):
        path = folder / f"{group[0]}.json"
        path.write_text(json.dumps([job for run in group for job in jobs(run, runs[run])]))
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        launcher = several if runs[group[0]] > 1 else []
        command = [sys.executable, "-W", "ignore", *launcher, str(Path(__file__).with_name("run_jobs.py")), str(path)]
        shared = {"SHARDED": "1"} if group == ["sharded"] else {}
        with open(path.with_suffix(".txt"), "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment | shared, cwd=folder)
        started.append((path.with_suffix(".txt"), process))
    for output, process in started:
        assert process.wait(timeout=900) == 0, output.read_text()[-3000:]
    logs = {run: sorted(folder.glob(f"{run}-*.json")) for run in runs}
    return {
        run: {
            (case := path.stem.removeprefix(f"{run}-")): (
                folder / run / case.replace(", ", "_"),
                json.loads(path.read_text()),
            )
            for path in paths
        }
        for run, paths in logs.items()
    }


def weights(folder):
    """Every tensor of the last checkpoint and of what was saved."""
    files = {path.relative_to(folder): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    assert any("checkpoint" in str(path) for path in files) and any("checkpoint" not in str(path) for path in files)
    return {f"{path}: {name}": value for path, tensors in files.items() for name, value in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_the_same_weights_as_one(trained, case):
    (folder, one), (other, two) = trained["one"][case], trained["two"][case]
    steps = [report for report in one["reports"] if "lr" in report]
    assert len(steps) == STEPS
    for step, (report, expected) in enumerate(zip([r for r in two["reports"] if "lr" in r], steps, strict=True)):
        assert report == pytest.approx(expected, rel=1e-4, abs=1e-6), step
    assert one["placed"] == two["placed"]
    if "restart_threshold" in CASES[case][2]:
        assert len(one["placed"]) > 1  # restarts, beside the first batch
    found, expected = weights(other), weights(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_runs_with_the_same_seed_are_bit_identical(trained, case):
    (folder, one), (other, again) = trained["one"][case], trained["again"][case]
    assert one == again
    found, expected = weights(other), weights(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def published(folder):
    """The tensors of what was saved for use, and those of the last checkpoint's averages."""
    checkpoints = [folder / f"checkpoint-{STEPS}/ema.safetensors"]
    found = {path for path in folder.rglob("*.safetensors") if "checkpoint" not in str(path.relative_to(folder))}
    files = {path.relative_to(folder): load_file(path) for path in [*found, *checkpoints] if path.is_file()}
    return {f"{path}: {name}": value for path, tensors in files.items() for name, value in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SHARDED, "resumed"])
def test_sharded_processes_train_the_same_weights_as_one(trained, case):
    (folder, one), (other, sharded) = trained["one"]["vqdit" if case == "resumed" else case], trained["sharded"][case]
    steps, found = ([report for report in log["reports"] if "lr" in report] for log in (one, sharded))
    assert len(found) == (STEPS // 2 if case == "resumed" else STEPS)
    for report, expected in zip(reversed(found), reversed(steps), strict=False):
        assert report == pytest.approx(expected, rel=1e-4, abs=1e-6)
    found, expected = published(other), published(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    if case in SHARDED[:2]:
        averages, final = (f"checkpoint-{STEPS}/{name}" for name in ("ema.safetensors", "pytorch_model_fsdp_0"))
        assert (other / averages).is_file() and (other / final).is_dir()  # the weights in shards


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED[:2])
def test_averages_of_sharded_weights_move(trained, tmp_path, case):
    """They are neither what they began with, nor what they were halfway, nor the weights that they follow."""
    folder = trained["sharded"][case][0]
    last = folder / f"checkpoint-{STEPS}"
    dcp_to_torch_save(last / "pytorch_model_fsdp_0", tmp_path / "whole.pt")
    weights = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]
    averages, before = (load_file(one / "ema.safetensors") for one in (last, folder / f"checkpoint-{STEPS // 2}"))
    teacher = VQDiTPipeline.from_pretrained(folder.parents[1] / "teacher").transformer.state_dict()
    saved = VQDiTPipeline.from_pretrained(folder).transformer
    for number, (name, parameter) in enumerate(saved.named_parameters()):
        average = averages[f"shadow_params[{number}]"]
        assert torch.equal(parameter, average), name
        others = [weights[name], before[f"shadow_params[{number}]"], *([teacher[name]] if case == "distilled" else [])]
        assert all((average - other).abs().max() > 1e-5 for other in others), name


@pytest.mark.slow
def test_a_pipeline_trained_in_shards_draws_what_one_trained_whole_does(trained):
    drawn = [
        VQDiTPipeline.from_pretrained(trained[run]["vqdit"][0])(
            "a dog", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)
        ).images
        for run in ("one", "sharded")
    ]
    torch.testing.assert_close(*drawn, atol=1e-3, rtol=0)
