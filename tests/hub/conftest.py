"""A pipeline saved in every form, in folders and on a local Hub, and processes that load it."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from diffusers_vqdit import MultiTokenizerModel, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.utils.hub import push_folder


CELLS = Path(__file__).parent / "loading_cells.py"


@pytest.fixture(scope="session")
def forms(make_pipeline, tmp_path_factory):
    """Folders with a pipeline in every form that is to be loaded or refused."""
    folder = tmp_path_factory.mktemp("forms")
    pipe = make_pipeline(0)
    pipe.save_pretrained(folder / "plain")
    pipe.save_pretrained(folder / "sharded", max_shard_size="20KB")
    assert len(list((folder / "sharded" / "transformer").glob("*.safetensors"))) > 2
    make_pipeline(1).save_pretrained(folder / "other")
    save_segments(pipe, folder / "segments")
    save_several(pipe, make_pipeline(2), folder / "several")
    for name in ("later", "missing"):
        pipe.save_pretrained(folder / name)
    for path in (folder / "later" / "model_index.json", folder / "later" / "image_vq" / "config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "_format_version": 99}))
    (folder / "missing" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.transformer.half()
    pipe.image_vq.half()
    pipe.save_pretrained(folder / "plain", variant="fp16")
    return folder


def save_segments(pipe, folder):
    """A pipeline whose segments have names of their own, which only its config explains."""
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        segments={"sketch": {"vocab_size": 32, "shape": [4, 4]}, "style": {"vocab_size": 3, "shape": [1]}},
        tasks=["style->sketch", "sketch->style"],
    )
    segments = {"sketch": {"modality": "image"}, "style": {"modality": "label", "names": ["flat", "round", "bold"]}}
    parts = {**pipe.components, "transformer": transformer.eval()}
    VQDiTPipeline(**parts, segments=segments).save_pretrained(folder)


def save_several(pipe, other, folder):
    """A pipeline with tokenizers of two segments in its container, in float32 and float16."""
    transformer = VQDiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        segments={
            "image": {"vocab_size": 32, "shape": [4, 4]},
            "sketch": {"vocab_size": 32, "shape": [4, 4]},
            "summary": {"vocab_size": 64, "shape": [12]},
        },
        tasks=["image->sketch", "sketch->summary", "summary->image"],
    )
    segments = {
        "sketch": {"modality": "image", "tokenizer": "sketch"},
        "summary": {"modality": "text", "tokenizer": "words"},
    }
    several = MultiTokenizerModel({"sketch": other.image_vq, "words": other.text_vq}, {"words": other.tokenizer})
    parts = {**pipe.components, "transformer": transformer.eval(), "segment_tokenizers": several}
    VQDiTPipeline(**parts, segments=segments).save_pretrained(folder)
    half = {name: copy.deepcopy(part) for name, part in parts.items()}
    for part in half.values():
        if isinstance(part, torch.nn.Module):
            part.half()
    VQDiTPipeline(**half, segments=segments).save_pretrained(folder, variant="fp16")


@pytest.fixture(scope="session")
def published(forms, hub, use_hub):
    """The forms as repositories of the local Hub; `plain` at the tag ``v1`` has the weights of `other`."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_hub(hub, monkeypatch)
        push_folder(forms / "other", "alice/plain")
        huggingface_hub.HfApi().create_tag("alice/plain", tag="v1")
        for folder in sorted(forms.iterdir()):
            push_folder(folder, f"alice/{folder.name}")
    return hub


@pytest.fixture(scope="session")
def processes(forms, request, tmp_path_factory):
    """Runs the cells of a way of loading in a new process with an empty cache, once; gives their outcomes."""
    outcomes, homes = {}, {}

    def run(way, place, offline=False):
        key = (way, place, offline)
        if key in outcomes:
            return outcomes[key]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        homes.setdefault((way, place), tmp_path_factory.mktemp(f"{way}-{place}"))
        home = homes[way, place]
        environment |= {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": str(int(offline or place == "local"))}
        source = str(forms)
        if place == "hub":
            hub = request.getfixturevalue("published")
            endpoint = "http://127.0.0.1:9" if offline else hub.endpoint  # the discard port: nobody listens
            environment |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": "1"}
            source = "alice"
            if offline:
                run(way, place)
        output = home / f"outcomes-{offline}.json"
        arguments = [way, place, source, str(forms), str(output), *(["offline"] if offline else [])]
        done = subprocess.run([sys.executable, CELLS, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outcomes[key] = json.loads(output.read_text())
        return outcomes[key]

    return run
