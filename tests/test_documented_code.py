"""The Python of docs and cards runs as it stands there: blocks in the order of their page, and the code within lines.

With the shipped checkpoints; where a page has trained its own, with a small one of the same segments.
"""

import re
import textwrap

import pytest
import torch
from PIL import Image

from diffusers_vqdit import MultiTokenizerModel, VQDiTPipeline
from diffusers_vqdit.training.byte_pairs import train_text_tokenizer


pytestmark = pytest.mark.slow

BLOCK = re.compile(r"^( *)```(?:python|py)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:print\()?pipe\([^`\n]*|(?:print\()?pipe\.\w+[.(\[][^`\n]*|print\(pipe[^`\n]*)`")
# Pages of several checkpoints: which one a line is about is told by a segment of its own.
WHOSE = {
    "speech": r"\baudio\b|\bspeech\b",
    "poems": r"\bpoem\b",
    "sketches": r"\b(sketch|style)\b",
    "pairs": r"\b(source|edges)\b",
    "states": r"states|query=.prompt",
}
# What is of a reader's own model or account: a folder of a LoRA, pushing, buckets; and what takes a
# compiler's minutes.
NOT_RUN = re.compile(r"load_lora_weights|push_to_hub|inputs=\.\.\.|compile|vocoder|buckets")


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory, documented, encoders, audio_codecs):
    """Where the pages' ``outputs`` and ``model_cards`` are."""
    small = documented.small_pipeline
    folder = tmp_path_factory.mktemp("docs")
    (folder / "model_cards").symlink_to(root / "model_cards")
    starter = VQDiTPipeline.from_pretrained(root / "model_cards/vqdit-emoji-32")
    own = {name: getattr(starter, name) for name in ("image_vq", "text_vq", "tokenizer")}
    picture, text = {"vocab_size": 2048, "shape": [8, 8]}, {"vocab_size": 2048, "shape": [24]}

    codec, extractor = audio_codecs.audio_codec("encodec")
    tasks = ["text->audio", "audio->text", "audio->image", "->audio", "text->speech"]
    said = {"vocab_size": 17, "shape": [12, 3]}
    audio = {**said, "patch": [1, 3], "separate_codebooks": True}
    pipe = small(
        {"text": text, "image": picture, "audio": audio, "speech": {**said, "shared_with": "audio"}},
        tasks,
        **own,
        segments=dict.fromkeys(("audio", "speech"), {"modality": "audio", "tokenizer": "codec"}),
        segment_tokenizers=MultiTokenizerModel({"codec": codec}, {"codec": extractor}),
    )
    pipe.save_pretrained(folder / "outputs/speech")
    audio_codecs.soundfile.write(folder / "apple.wav", audio_codecs.tone(0.1), audio_codecs.RATE)

    segments = {name: picture for name in ("image", "source", "edges")} | {"text": text}
    tasks = ["source->image", "source+text->image", "text->image", "image->edges", "->image"]
    pipe = small(segments, tasks, **own, segments={n: {"modality": "image"} for n in ("source", "edges")})
    pipe.save_pretrained(folder / "outputs/pairs")

    segments = {"image": picture, "sketch": picture, "style": {"vocab_size": 2, "shape": [1]}}
    entries = {"sketch": {"modality": "image"}, "style": {"modality": "label", "names": ["ink", "chalk"]}}
    tasks = ["image->sketch", "sketch->image", "->sketch", "image->style"]
    small(segments, tasks, image_vq=starter.image_vq, segments=entries).save_pretrained(folder / "outputs/sketches")

    words = train_text_tokenizer(["床前明月光，疑是地上霜。登高", "once upon a time"] * 3, 300)
    blocks = {"vocab_size": len(words), "shape": [64], "block_length": 16}
    segments = {"title": {**blocks, "shape": [16]}, "poem": blocks, "text": {**blocks, "shape": [1024]}}
    entries = {name: {"modality": "text", "tokenizer": "tokenizer"} for name in segments}
    tasks = ["title->poem", "poem->title", "->poem", "->text"]
    small(segments, tasks, tokenizer=words, segments=entries).save_pretrained(folder / "outputs/poems")

    pipe = small(
        {"image": picture, "prompt": {"channels": 16, "shape": [14]}},
        ["prompt->image", "->image"],
        image_vq=starter.image_vq,
        segments={"prompt": {"modality": "states"}},
        text_encoder=encoders.text_encoder("t5"),
        tokenizer_2=encoders.text_tokenizer(["a red apple", "blurry", "a green apple"] * 3),
    )
    pipe.save_pretrained(folder / "outputs/t5")
    pipe.save_pretrained(folder / "outputs/states")
    small({"image": picture, "text": text}, ["text->image", "->image"], **own).save_pretrained(
        folder / "outputs/photographs"
    )
    return folder


def passed(starter):
    """What pages pass without saying where they have it from."""
    picture = starter("a red apple", generator=torch.Generator().manual_seed(0)).images[0]
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 16, 32))
    pictures = starter(["a sailboat", "a cat", "a red apple"]).images
    names = {name: picture for name in ("picture", "photo", "drawing", "noisy")}
    names |= {"pictures": pictures, "drawings": pictures, "small": picture.resize((16, 16)), "mask": mask}
    names |= {"captions": ["a cat", "a red apple"], "poem": "床前明月光，疑是地上霜。", "folder": "lora"}
    names |= {"waveform": torch.zeros(1, 8192), "sound": torch.zeros(64), "pixels": torch.zeros(1, 3, 64, 64)}
    return names | {"states": torch.zeros(1, 4, 16), "torch": torch}


def pages(root):
    for pattern in ("README.md", "docs/*.md", "model_cards/*/README.md"):
        yield from sorted(root.glob(pattern))


def test_each_block(root, trained, monkeypatch):
    monkeypatch.chdir(trained)
    starter = VQDiTPipeline.from_pretrained("model_cards/vqdit-emoji-32")
    pushed, count = [], 0
    monkeypatch.setattr(VQDiTPipeline, "push_to_hub", lambda self, name: pushed.append(name))
    for page in pages(root):
        names = passed(starter) | {"pipe": starter}
        exec("from diffusers_vqdit import *", names)  # short blocks leave imports out
        for _, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if "from_pretrained(..." not in block:
                exec(compile(textwrap.dedent(block), str(page), "exec"), names)
                count += 1
    assert count >= 14
    assert pushed == ["you/photographs"]


def test_code_within_lines(root, trained, monkeypatch):
    monkeypatch.chdir(trained)
    starter = VQDiTPipeline.from_pretrained("model_cards/vqdit-emoji-32")
    pipes = {whose: VQDiTPipeline.from_pretrained(f"outputs/{whose}") for whose in WHOSE}
    names, found = passed(starter), {}
    for page in pages(root):
        for code in INLINE.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
            found.setdefault(code, page)  # the README's rows stand in docs/tasks.md, too
    run = [code for code in found if not NOT_RUN.search(code)]
    assert len(run) >= 30
    for code in run:
        whose = next((one for one, segments in WHOSE.items() if re.search(segments, code)), None)
        own = {"mask": torch.arange(64) < 16} if whose == "speech" else {}
        pipe = pipes[whose] if whose else starter
        exec(compile(code, str(found[code]), "exec"), names | own | {"pipe": pipe})
