"""Tiny real components, a tiny dataset, and the training scripts as modules."""

import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
from pathlib import Path


# Before huggingface_hub is imported: a test that asks the Hub fails at once, and those of a Hub of their own say so.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is: the processes of pytest-xdist, and those that their tests start, share the cores.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import DDIMScheduler  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from diffusers_vqdit import (  # noqa: E402
    ImageVQModel,
    MaskedDiffusionScheduler,
    MultiTokenizerModel,
    TextVQModel,
    VQDiTLatentPipeline,
    VQDiTPipeline,
    VQDiTTransformer2DModel,
)


ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = [
    *("a red apple", "a blue box", "红苹果", "green", "a yellow dot"),
    *("蓝色", "pink box", "a dot", "white", "grey"),
]
TASKS = ["text->image", "image->text", "label->image", "->image", "image->label", "->image+text"]


@pytest.fixture(scope="session")
def root():
    """The checkout. Tests that need it are skipped where only the installed package and the tests are."""
    if not (ROOT / "training").is_dir():
        pytest.skip("needs the source tree")
    return ROOT


@pytest.fixture(scope="session")
def script(root):
    """Load a script of ``training/``, or of another folder, as a module."""

    def load(name, folder="training"):
        spec = importlib.util.spec_from_file_location(name, root / folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def run(script):
    """Run a script's main with arguments given as a string."""

    def run(name, arguments):
        module = script(name)
        module.main(module.parse_args(arguments.split()))

    return run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer(script):
    return script("train_text_vq").train_tokenizer(CAPTIONS * 3, vocab_size=300, max_length=12)


def tiny_image_vq():
    return ImageVQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=32,
        sample_size=16,
    ).eval()


def tiny_text_vq(tokenizer):
    return TextVQModel(vocab_size=len(tokenizer), max_length=12, num_codes=64, hidden_size=16, code_dim=4).eval()


def tiny_transformer():
    model = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        segments={
            "text": {"vocab_size": 64, "shape": [12]},
            "image": {"vocab_size": 32, "shape": [4, 4]},
            "label": {"vocab_size": 3, "shape": [1]},
        },
        tasks=TASKS,
    )
    for parameter in model.parameters():  # zero modulation and heads would hide every mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_latent_transformer():
    return VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=4,
        patch_size=1,
        num_embeds_ada_norm=3,
        caption_channels=4,
    ).share_embedder()


def tiny_pipeline(transformer, image_vq, text_vq, tokenizer):
    pipe = VQDiTPipeline(
        transformer, MaskedDiffusionScheduler(), image_vq, text_vq, tokenizer, labels=["fruit", "box", "dot"]
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def image_vq():
    return tiny_image_vq()


@pytest.fixture
def text_vq(tokenizer):
    return tiny_text_vq(tokenizer)


@pytest.fixture
def transformer():
    return tiny_transformer()


@pytest.fixture
def pipeline(transformer, image_vq, text_vq, tokenizer):
    return tiny_pipeline(transformer, image_vq, text_vq, tokenizer)


@pytest.fixture(scope="session")
def make_pipeline(tokenizer):
    """Makes a pipeline like `pipeline`, with the weights of a seed."""

    def make(seed):
        torch.manual_seed(seed)
        return tiny_pipeline(tiny_transformer(), tiny_image_vq(), tiny_text_vq(tokenizer), tokenizer)

    return make


@pytest.fixture(scope="session")
def make_latent_transformer():
    """Makes a tiny transformer of latents, as it is before training."""
    return tiny_latent_transformer


@pytest.fixture
def latent_pipeline(image_vq, text_vq, tokenizer, make_latent_transformer):
    """A tiny pipeline over latents, as there is one over codes."""
    image_vq.register_to_config(latents_mean=[0.1, 0.2, -0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 0.1])
    transformer = make_latent_transformer()
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    names = {0: "fruit, apple", 1: "box", 2: "dot"}
    pipe = VQDiTLatentPipeline(transformer.eval(), image_vq, DDIMScheduler(), text_vq, tokenizer, id2label=names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_this_folder(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def hub_server():
    """The module ``hub_server.py`` of this folder."""
    return of_this_folder("hub_server")


@pytest.fixture(scope="session")
def hub(hub_server):
    with hub_server.HubServer() as server:
        yield server


@pytest.fixture
def client(hub, use_hub, monkeypatch):
    """This process's huggingface_hub as a client of the local Hub."""
    use_hub(hub, monkeypatch)
    return huggingface_hub.HfApi()


@pytest.fixture(scope="session")
def use_hub():
    """Makes a process's huggingface_hub a client of a local Hub."""

    def use_hub(hub, monkeypatch):
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")

    return use_hub


@pytest.fixture(scope="session")
def encoders():
    """The module ``encoders.py`` of this folder."""
    return of_this_folder("encoders")


@pytest.fixture(scope="session")
def documented():
    """The module ``documented.py`` of this folder."""
    return of_this_folder("documented")


@pytest.fixture(scope="session")
def data_sources():
    return of_this_folder("data_sources")


@pytest.fixture(scope="session")
def audio_codecs():
    """The module ``audio_codecs.py`` of this folder."""
    return of_this_folder("audio_codecs")


@pytest.fixture
def sound_table(audio_codecs, tmp_path):
    """Makes a dataset of sounds."""
    from datasets import load_dataset

    def make(**options):
        path = audio_codecs.sound_table(tmp_path / "sounds.parquet", **options)
        return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    return make


@pytest.fixture
def talking_pipeline(image_vq, text_vq, tokenizer, audio_codecs):
    """One of texts, pictures, labels and sounds."""
    codec, extractor = audio_codecs.audio_codec("encodec")
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        segments={
            "text": {"vocab_size": 64, "shape": [12]},
            "image": {"vocab_size": 32, "shape": [4, 4]},
            "label": {"vocab_size": 2, "shape": [1]},
            "sound": {"vocab_size": 17, "shape": [12, 3], "patch": [1, 3], "separate_codebooks": True},
        },
        tasks=["text->sound", "sound->text", "sound->image", "image->sound", "sound->label", "->sound"],
    )
    return VQDiTPipeline(
        transformer.eval(),
        MaskedDiffusionScheduler(),
        image_vq,
        text_vq,
        tokenizer,
        id2label={0: "round", 1: "square"},
        segments={"sound": {"modality": "audio", "tokenizer": "codec"}},
        segment_tokenizers=MultiTokenizerModel({"codec": codec}, {"codec": extractor}),
    )


@pytest.fixture
def in_processes(tmp_path):
    """Calls a function with each rank of a group of forked processes, and gives their exit codes; that of one that was
    killed is the signal's, negative, and those of others that waited for it are no 0 either."""
    runs = itertools.count()

    def member(function, rank, world_size, store):
        torch.set_num_threads(1)  # a forked process must not wait for its parent's threads
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
        function(rank)
        torch.distributed.destroy_process_group()

    def run(function, world_size=2):
        context, store = multiprocessing.get_context("fork"), tmp_path / f"store-{next(runs)}"
        jobs = [context.Process(target=member, args=(function, rank, world_size, store)) for rank in range(world_size)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(60)
            job.kill()
            job.join()
        return [job.exitcode for job in jobs]

    return run


@pytest.fixture
def picture_folder(tmp_path):
    """Ten captioned pictures, all different, with metadata.jsonl."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index, caption in enumerate(CAPTIONS):
        picture = Image.new("RGB", (32, 32), "white")
        draw = ImageDraw.Draw(picture)
        color = tuple(int(c) for c in torch.randint(256, (3,), generator=torch.Generator().manual_seed(index)))
        shape = draw.ellipse if index % 2 else draw.rectangle
        shape((2 + index, 4, 20 + index, 16 + index), fill=color)
        picture.save(folder / f"{index}.png")
        label = ["round", "square"][index % 2]
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption, "label": label}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
