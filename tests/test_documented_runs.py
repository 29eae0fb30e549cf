"""The commands of ``docs/*.md``, block by block as they stand there, with small models, little data and few steps.

The README's are run by test_newcomer.py, CONTRIBUTING's by test_contributing.py, those of docs/hub.md by
hub/test_publishing_page.py. The model cards' say how weights were made: test_documented_commands.py alone reads them.
"""

import importlib
import io
import json
import re
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetModel

from diffusers_vqdit import MultiTokenizerModel, VQDiTPipeline
from diffusers_vqdit.training import evaluation_speech


pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted({path.name for path in DOCS.glob("*.md")} - {"hub.md", "recipes.md"})
# Commands that are not run, and why.
NOT_RUN = {
    r"\bpip install\b|^apt-get |^git clone |\bdpkg\b": "installs what a machine may not have",
    r"-m pytest\b": "tests",
    r" \.\.\.$": "no whole command",
    r"\bprepare_(pairs|poems)\.py": "fetches packages of npm",
    r"\bprepare_speech\.py": "needs espeak-ng: tests/training/test_prepare_speech.py",
    r"\bimagenet_backbone\.py": "needs the weights of a package",
    r"--lpips_weights": "needs LPIPS' weights: tests/training/test_image_losses.py",
    r"\bbenchmarks[./](?!cut_pictures)": "measures for minutes, with other packages; parts of them: tests/benchmarks",
    r"\bdiffusers_vqdit\.app\b": "serves a page, or pushes it: tests/app",
}

QUICK = "--max_train_steps 2 --train_batch_size 2 --report_to none --lr_warmup_steps 1"
PLOTTED = QUICK.replace("none", "tensorboard") + " --mixed_precision no"
# What stands behind the arguments of each script, and, where it makes a new model, of what size.
SMALL = {
    "training.train_image_vq": (
        f"{PLOTTED} --dataloader_num_workers 0",
        "--layers_per_block 1 --norm_num_groups 4 --latent_channels 4 --num_vq_embeddings 32",
    ),
    "training.train_text_vq": (QUICK, "--tokenizer_vocab_size 270 --num_codes 32 --hidden_size 16"),
    "training.train_audio_vq": (
        f"{QUICK} --mixed_precision no --crop_length 0.8",
        "--sampling_rate 1600 --n_fft 32 --hop_length 8 --num_mel_bins 6 --block_out_channels 8 8 --norm_num_groups 4 "
        "--latent_channels 4 --num_vq_embeddings 16",
    ),
    "training.train_tokenizer": ("--vocab_size 300", ""),
    "training.train_vqdit": (
        f"{PLOTTED} --validation_steps 2",
        "--num_layers 1 --num_attention_heads 2 --attention_head_dim 16",
    ),
    "training.train_latent_dit": (
        f"{QUICK} --mixed_precision no --validation_steps 2",
        "--num_layers 1 --num_attention_heads 2 --attention_head_dim 16",
    ),
    "training.distill_vqdit": (f"{QUICK} --mixed_precision no", ""),
    "training.encode_dataset": ("--dataloader_num_workers 0", ""),
    "training.evaluate": ("--num_samples 2 --num_inference_steps 1", ""),
    "training.evaluate_tokenizer": ("", ""),
    "training.evaluate_speech": ("--num_samples 2 --num_inference_steps 1", ""),
    "training.plot_run": ("", ""),
    "benchmarks.cut_pictures": ("", ""),
    "diffusers_vqdit.interop.convert": ("", ""),
    "examples.animate_sampling": ("--num_inference_steps 2", ""),
}
ADVERSARIAL = "--adversarial_start 1 --discriminator_warmup 1 --discriminator_channels 4 --discriminator_layers 1"
EMOJI = "training/data/emoji.parquet"
# What a page takes for done.
TOKENIZER = f"python training/train_image_vq.py --dataset_name {EMOJI} --output_dir outputs/image_vq"
BEFORE = {
    "distributed.md": [TOKENIZER],
    "latent_diffusion.md": [TOKENIZER],
}


def shrunk(name, arguments):
    """The arguments of a command for a small model, little data and few steps."""
    quick, sizes = SMALL[name]
    # A compiler takes minutes, and float32 products of the tests after this one must not change.
    kept = [word.replace(":262144", ":64") for word in arguments if word not in ("--compile", "--allow_tf32")]
    more = kept + quick.split()
    if "--pretrained_model_name_or_path" not in arguments:
        more += sizes.split()
        if name == "training.train_image_vq":
            given = arguments[arguments.index("--block_out_channels") + 1 :] if "--block_out_channels" in more else []
            levels = next((place for place, word in enumerate(given) if word.startswith("--")), len(given)) or 3
            more += ["--block_out_channels", *["8"] * levels]
    if "--adversarial_weight" in arguments:
        more += ADVERSARIAL.split()
    if "--perceptual_backbone" in arguments:
        more += ["--perceptual_backbone", "backbone", "--perceptual_image_size", "32"]
    if "--image_augmentations" in arguments:
        more += ["--image_augmentations", "1"]
    return more


@pytest.fixture
def run_page(documented, root, script, monkeypatch):
    """Runs the commands of a page of docs in the working directory, and gives the names of their scripts."""

    def run_page(page):
        text = (root / "docs" / page).read_text(encoding="utf-8")
        assert 'python -c "' not in text  # which documented.lines() leaves out
        lines = [*BEFORE.get(page, []), *documented.lines(text)]
        seen = []
        for line in lines:
            if any(re.search(pattern, line) for pattern in NOT_RUN):
                continue
            name, arguments = documented.script_command(line) or (None, [])
            assert name in SMALL, f"{page}: say in SMALL how {line!r} becomes small, or in NOT_RUN why it isn't run"
            if name == "training.plot_run" and find_spec("matplotlib") is None:
                continue
            folder, _, stem = name.partition(".")
            module = script(stem) if folder == "training" else importlib.import_module(name)
            monkeypatch.setattr(sys, "argv", [name, *shrunk(name, arguments)])
            module.main(module.parse_args())
            seen.append(name)
        return seen

    return run_page


def pictures(count, size=32, seed=0):
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def write_table(path, columns):
    """A parquet file of columns of strings, pictures and whatever else, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(str(path))


def write_photographs(folder):
    """Eight photographs of different sizes, two of them to measure with."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        (folder / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            height, width = generator.integers(256, 320, 2)
            coarse = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((width, height)).save(folder / split / f"{number}.jpg")
            rows.append(json.dumps({"file_name": f"{number}.jpg", "text": f"boats in harbour {number} at dusk"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def stand_ins(root, documented, encoders, audio_codecs, tmp_path_factory):
    """Small models and little data by the names that the pages have for them."""
    folder = tmp_path_factory.mktemp("stand-ins")
    starter = VQDiTPipeline.from_pretrained(root / "model_cards/vqdit-emoji-32")
    own = {name: getattr(starter, name) for name in ("image_vq", "text_vq", "tokenizer")}
    picture, text = {"vocab_size": 2048, "shape": [8, 8]}, {"vocab_size": 2048, "shape": [24]}
    drawn, tasks = folder / "model_cards", ["text->image", "image->text", "->image"]
    documented.small_pipeline({"text": text, "image": picture}, tasks, **own).save_pretrained(drawn / "vqdit-emoji-32")
    large = {"vocab_size": 2048, "shape": [16, 16], "patch": [2, 2]}
    segments = {"text": text, "image": large, "source": {**large, "shared_with": "image"}}
    entries = {"source": {"modality": "image"}}
    tasks += ["source->image", "source+text->image"]
    documented.small_pipeline(segments, tasks, **own, segments=entries).save_pretrained(drawn / "vqdit-emoji")
    for name in ("image_vq", "sketch_vq"):
        (folder / name).symlink_to(drawn / "vqdit-emoji-32" / "image_vq")
    (folder / "text_vq").symlink_to(drawn / "vqdit-emoji-32")
    codec, extractor = audio_codecs.audio_codec("encodec")
    said = {"vocab_size": 17, "shape": [20, 3], "patch": [1, 3], "separate_codebooks": True}
    documented.small_pipeline(
        {"text": text, "image": picture, "audio": said},
        ["audio->text", "audio->image", "text->audio"],
        **own,
        segments={"audio": {"modality": "audio", "tokenizer": "codec"}},
        segment_tokenizers=MultiTokenizerModel({"codec": codec}, {"codec": extractor}),
    ).save_pretrained(folder / "outputs/listening")
    encoders.save(folder / "descript/dac_16khz", *audio_codecs.audio_codec("dac"))
    words = encoders.text_tokenizer(["a red apple", "a blue box"] * 3)
    encoders.save(folder / "google/t5-v1_1-base", encoders.text_encoder("t5"), words)
    encoders.save(folder / "openai/clip-vit-base-patch32", encoders.text_encoder("clip"), words)
    encoders.save(folder / "facebook/dinov2-base", encoders.image_encoder("dinov2"), encoders.feature_extractor())
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder / "backbone")
    tensors = load_file(root / "tests/fixtures/interop/llamagen_vq_tiny.safetensors")
    weights = {name.removeprefix("checkpoint."): one for name, one in tensors.items() if not name.startswith("io.")}
    torch.save({"model": weights}, folder / "vq_ds16_c2i.pt")

    emoji = pq.read_table(root / EMOJI)
    plain = [row for row, tone in enumerate(emoji["skin_tone"].to_pylist()) if not tone]
    split = emoji["split"].to_pylist()
    rows = [row for row in plain if split[row] == "train"][:12] + [row for row in plain if split[row] == "test"][:4]
    (folder / EMOJI).parent.mkdir(parents=True)
    pq.write_table(emoji.take(rows), folder / EMOJI)
    write_photographs(folder / "photographs")

    count = 12
    captions, splits = ["a red apple", "a blue box"] * 6, ["train"] * 9 + ["test"] * 3
    shown = {"image": pictures(count), "text": captions, "kind": ["round", "square"] * 6}
    pairs = {"image": pictures(count, 64), "source": pictures(count, 64, 1), "edges": pictures(count, 64, 2)}
    pairs |= {"text": captions, "phrase": captions, "keywords": captions, "split": splits, "held_out": [""] * count}
    for name in ("pairs", "pairs_32"):
        write_table(folder / f"outputs/{name}.parquet", pairs)
    texts = {"body": [f"{one}, and no other" for one in captions], "abstract": captions}
    more = {"photo": pictures(count), "drawing": pictures(count, seed=1), "style": ["ink", "chalk"] * 6}
    write_table(folder / "data.parquet", shown | more | texts)
    write_table(folder / "user/photographs/0.parquet", {**shown, "image": pictures(count, 256)})
    clips = np.random.default_rng(0).integers(0, 64, (count, 4, 16, 16)).tolist()
    write_table(folder / "clips.parquet", {"text": captions, "codes": clips})
    verses = ["床前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。"] * 6
    write_table(folder / "outputs/poems.parquet", {"title": ["登高", "靜夜思"] * 6, "poem": verses, "split": splits})

    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "0.tar", "w") as tar:
        for number, (image, caption) in enumerate(zip(shown["image"], captions, strict=True)):
            file = io.BytesIO()
            image.save(file, "JPEG")
            for ending, data in (("jpg", file.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    lines = []
    for number, (image, caption) in enumerate(zip(shown["image"], captions, strict=True)):
        name = f"{('cat', 'dog')[number % 2]}/{number}.png"
        (folder / "my_pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / "my_pictures" / name)
        lines.append(json.dumps({"file_name": name, "text": caption, "label": name[:3]}))
    (folder / "my_pictures" / "metadata.jsonl").write_text("\n".join(lines))
    recordings = audio_codecs.sound_folder(folder / "my_recordings")
    heard = [f"{index}.flac,{captions[index]}" for index in range(10)]
    (recordings / "metadata.csv").write_text("\n".join(["file_name,text", *heard]))
    sounds = [(recordings / f"{index % 10}.flac").read_bytes() for index in range(count)]
    spoken = {name: [{"bytes": one, "path": None} for one in sounds] for name in ("audio", "speech")}
    spoken |= {**shown, "language": ["en"] * count, "split": splits, "held_out": [""] * 9 + ["pair"] * 3}
    speech = datasets.Dataset.from_dict(spoken)
    for name in ("audio", "speech"):
        speech = speech.cast_column(name, datasets.Audio(1600))
    speech.to_parquet(str(folder / "outputs/speech.parquet"))
    return folder


@pytest.fixture
def place(stand_ins, tmp_path, monkeypatch):
    """The working directory: what a page writes stays its own."""
    (tmp_path / "outputs").mkdir()
    for one in (*stand_ins.iterdir(), *(stand_ins / "outputs").iterdir()):
        if one.name != "outputs":
            (tmp_path / one.relative_to(stand_ins)).symlink_to(one)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Deaf:
    """In place of pocketsphinx, which not everyone has."""

    def __init__(self, captions):
        pass

    def knows(self, caption):
        return True

    def hears(self, waveform, sampling_rate, caption):
        return False

    def heard(self, waveform, sampling_rate):
        return None


@pytest.mark.parametrize("page", PAGES)
def test_each_command(page, place, run_page, monkeypatch):
    monkeypatch.setattr(evaluation_speech, "CaptionRecogniser", Deaf)
    run_page(page)


def test_the_recipe_from_photographs_to_a_published_model(root, place, run_page, monkeypatch):
    seen = run_page("recipes.md")
    names = ("train_image_vq", "evaluate", "evaluate_tokenizer", "train_text_vq", "encode_dataset", "train_vqdit")
    assert {f"training.{name}" for name in names} <= set(seen)
    figures = json.loads((place / "outputs/photographs/evaluation.json").read_text())
    assert figures.keys() == {"text->image", "image->text", "inpainting", "super-resolution", "likelihood"}
    assert list((place / "outputs/photographs").glob("*.png"))

    (draw,) = re.findall(r"```python\n(.*?)```", (root / "docs/recipes.md").read_text(), re.DOTALL)
    pushed = []
    monkeypatch.setattr(VQDiTPipeline, "push_to_hub", lambda self, name: pushed.append(name))
    exec(draw)
    assert pushed == ["you/photographs"]
    with Image.open(place / "harbour.png") as picture:
        assert picture.size == (256, 256)


@pytest.mark.parametrize("pattern", NOT_RUN)
def test_what_is_not_run_stands_on_a_page(pattern, root, documented):
    texts = [(root / "docs" / page).read_text(encoding="utf-8") for page in PAGES]
    assert any(re.search(pattern, line) for text in texts for line in documented.lines(text))
