"""What was published loads and gives what it gave: codes and texts exactly, numbers but for rounding.

``fixtures/published.json`` has what each folder of ``model_cards/`` gives at fixed seeds, in single precision. It is
written by the version of the package that the folder was published with, from the root of the checkout::

    PYTHONPATH=<a checkout of that version> python tests/test_published.py <the folders' names>

so that of vqdit-emoji-32 (published as vqdit-emoji) and vqdit-emoji-latent is by commit 3a4c96a, the others by that of
their publication or later.
Written anew only for a checkpoint that is itself another one, never because the test fails.

Other CPUs add in other orders. Numbers may therefore differ by 1e-4 of the largest, and pixels by one of 255. Codes
are drawn and looked up at thresholds: these were chosen so that the kernels for AVX2, for AVX-512 and for neither give
the same ones.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_vqdit import ImageVQModel, VQDiTLatentPipeline, VQDiTPipeline


CARDS = Path(__file__).resolve().parents[1] / "model_cards"
FILE = Path(__file__).resolve().parent / "fixtures" / "published.json"
PIXELS = "pixels"  # so begin the names of values in [0, 255]


def seeds(count=2):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def emoji(size, count=2):
    """Pictures (B, 3, size, size) in [0, 1] of the starter's folder, by leaving out pixels: no library rounds."""
    files = [CARDS / "vqdit-emoji-32" / "examples" / f"{number}.png" for number in range(count)]
    pictures = torch.stack(
        [torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8) for file in files]
    )
    step = 64 // size
    return pictures.view(count, 64, 64, 3)[:, ::step, ::step].permute(0, 3, 1, 2) / 255


def load(kind, name):
    pipe = kind.from_pretrained(CARDS / name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_emoji(name, size=32, prompts=("sailboat", "雪人"), **options):
    """What both starters over codes can do."""
    pipe, pictures = load(VQDiTPipeline, name), emoji(size)
    written = {
        language: pipe(image=pictures, output=language, output_type="latent", generator=seeds()).segments[language]
        for language in ("text", "text_zh")
    }
    drawn = pipe(list(prompts), output_type="latent", generator=seeds(), **options).images
    return {
        "prompts": pipe.encode_prompt(list(prompts)),
        "drawn": drawn,
        "pixels": pipe.image_vq.decode_codes(drawn[:1]).sample[..., :: size // 16, :: size // 16].add(1).mul(127.5),
        "seen": pipe.encode_image(pictures[:1]),
        **written,
        "captions": pipe(image=pictures, output="text", generator=seeds()).texts,
        "labels": pipe.classify(image=pictures).probabilities,
        "score": pipe.score("text->image", "person running", pictures, num_samples=2, generator=seeds()[0]).nll,
    }


def of_poems(name):
    pipe, titles = load(VQDiTPipeline, name), ["春日", "夜雨"]
    poems = pipe(
        inputs={"title": titles}, output="poem", gen_length=24, num_inference_steps=4, generator=seeds()
    ).texts
    begun = pipe(inputs={"poem": "床前明月光，"}, output="poem", gen_length=16, generator=seeds(1)).texts
    given = {"title": titles, "poem": "春眠不觉晓，处处闻啼鸟。"}
    scores = pipe.score("title->poem", inputs=given, num_samples=2, generator=seeds()[0]).nll
    return {"poems": poems, "begun": begun, "score": scores}


def of_talking(name):
    pipe, words = load(VQDiTPipeline, name), ["banana", "pizza"]
    latent = {"num_inference_steps": 6, "output_type": "latent"}
    said = pipe(words, output="speech", generator=seeds(), **latent).segments["speech"]
    return {
        "said": said,
        "heard": pipe(inputs={"audio": said}, output="text", generator=seeds()).texts,
        "drawn": pipe(inputs={"audio": said}, output="image", generator=seeds(), **latent).images,
        "label": pipe.classify(inputs={"audio": said}).probabilities,
    }


def of_latents(name):
    pipe = load(VQDiTLatentPipeline, name)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    drawn = pipe(["sailboat", "雪人"], generator=seeds(), **options).images
    labelled = pipe(class_labels=[4, 8], generator=seeds(), **options).images
    return {"pixels": drawn * 255, "pixels of labels": labelled * 255}


def of_image_tokenizer(name):
    vq = ImageVQModel.from_pretrained(CARDS / name)
    with torch.no_grad():
        codes = vq.encode_codes(2 * emoji(64) - 1)
        return {"codes": codes, "pixels": vq.decode_codes(codes).sample[:1, :, ::4, ::4].add(1).mul(127.5)}


def of_sound_tokenizer(name):
    from diffusers_vqdit import SpectrogramVQModel  # which older versions lack

    model, seconds = SpectrogramVQModel.from_pretrained(CARDS / name), torch.arange(8192) / 11025
    vowel = sum(torch.sin(6.2832 * 110 * k * seconds * (1 + 0.1 * seconds)) / k for k in range(1, 12))
    codes = model.encode_codes(0.2 * vowel[None])
    return {"codes": codes, "spectrogram": model.decode_log_mel(codes)[:, ::8, ::8]}


PUBLISHED = {
    "vqdit-emoji-32": of_emoji,
    "vqdit-emoji-latent": of_latents,
    "vqdit-emoji": lambda name: of_emoji(name, 64, num_inference_steps=6),
    "vqdit-poems": of_poems,
    "vqdit-talking-emoji": of_talking,
    "image-vq-emoji-64": of_image_tokenizer,
    "image-vq-photographs": of_image_tokenizer,
    "audio-vq-speech": of_sound_tokenizer,
}


def found(name):
    """What a folder gives, as JSON has it."""
    return {
        key: (value.round().clamp(0, 255).int() if key.startswith(PIXELS) else value).tolist()
        if isinstance(value, torch.Tensor)
        else value
        for key, value in PUBLISHED[name](name).items()
    }


def test_every_folder_is_recorded(root):
    folders = {path.name for path in CARDS.iterdir() if path.is_dir()}
    assert folders == set(PUBLISHED) == set(json.loads(FILE.read_text(encoding="utf-8")))
    assert FILE.stat().st_size < 200_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_gives_what_it_gave(root, name):
    expected, now = json.loads(FILE.read_text(encoding="utf-8"))[name], found(name)
    assert now.keys() == expected.keys()
    for key, value in expected.items():
        one, other = (torch.tensor(x) if not isinstance(x[0], str) else x for x in (now[key], value))
        if isinstance(one, list):
            assert one == other, key
        elif key.startswith(PIXELS):
            assert (one - other).abs().max() <= 1, key
        elif one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()), msg=key)
        else:
            assert torch.equal(one, other), key


if __name__ == "__main__":
    recorded = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    recorded |= {name: found(name) for name in sys.argv[1:]}
    lines = [f"{json.dumps(name)}: {json.dumps(recorded[name], ensure_ascii=False)}" for name in sorted(recorded)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
