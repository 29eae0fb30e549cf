"""Figures of generated images, and of the tokenizers that they go through."""

import argparse
import math

import torch
import torch.nn.functional as F

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..utils.images import lower_resolution, resize
from .codes import encode_texts
from .data import to_pixels
from .evaluation import EmojiData, mean, sample, share
from .metrics import counts_by_level, level_figures, psnr, ssim, usage_of_counts


@torch.no_grad()
def round_trips(pipeline: VQDiTPipeline, captions: list[str]) -> list[bool]:
    codes = encode_texts(captions, pipeline.text_vq, pipeline.tokenizer)
    tokens = torch.cat([pipeline.text_vq.decode_codes(part).argmax(-1).cpu() for part in codes.split(64)])
    texts = pipeline.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text == caption for text, caption in zip(texts, captions, strict=True)]


def measure_tokenizers(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    real, decoded = to_pixels(data.pictures[data.test]), data.decoded[data.test]
    codes = level_figures(*usage_of_counts(counts_by_level(data.codes, pipeline.image_vq.num_codes)))
    return {
        f"pictures of {real.shape[-1]} px, whole test split, PSNR": mean(psnr(decoded, real), "dB"),
        f"pictures of {real.shape[-1]} px, whole test split, SSIM": mean(ssim(decoded, real), ""),
        "image codebook, all pictures, usage": {"value": codes["usage"]},
        "image codebook, all pictures, perplexity": {"value": codes["perplexity"], "unit": "codes"},
        "English captions, whole test split, exact round trip": share(round_trips(pipeline, data.texts(data.test))),
        "Chinese captions, whole test split, exact round trip": share(
            round_trips(pipeline, data.texts(data.test, "text_zh"))
        ),
    }


def drawn_right(
    pipeline: VQDiTPipeline, prompts: list[str], rows: list[int], data: EmojiData, args: argparse.Namespace
) -> list[bool]:
    """Whether the picture nearest to each prompt's sample is that of its row."""
    return data.nearest(sample(pipeline, args, len(rows), "text->image", prompt=prompts, output="image"), rows)


def measure_text_to_image(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    figures = {}
    for name, rows in (("training captions", data.train), ("held-out compositions", data.composition)):
        for language, column in (("English", "text"), ("Chinese", "text_zh")):
            hits = drawn_right(pipeline, data.texts(rows, column), rows, data, args)
            figures[f"{name}, {language}, nearest picture is the one named"] = share(hits)
    return figures


def measure_label_to_image(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """The nearest picture's label, of pictures drawn for each label in turn."""
    names = list(pipeline.config.labels)
    labels = [names[i % len(names)] for i in range(args.num_samples)]
    drawn = sample(pipeline, args, len(labels), "label->image", class_label=labels, output="image")
    hits = [data.columns["label"][row] == label for row, label in zip(data.nearest_rows(drawn), labels, strict=True)]
    return {"all labels, nearest picture has the label": share(hits)}


def central_hole(size: int) -> torch.Tensor:
    """A mask (1, 1, size, size) whose central square of ones is half of the area, or a little more."""
    border = math.floor(size * (1 - math.sqrt(0.5)) / 2)
    return F.pad(torch.ones(1, 1, size - 2 * border, size - 2 * border), (border,) * 4)


def measure_inpainting(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows, mask = data.composition, central_hole(data.pictures.shape[-1])
    real = data.real(rows)
    options = {"image": real, "mask_image": mask.expand(len(rows), -1, -1, -1), "output": "image"}
    with_caption = sample(pipeline, args, len(rows), "inpainting", prompt=data.texts(rows), **options)
    kept = [torch.equal(a[:, mask[0, 0] == 0], b[:, mask[0, 0] == 0]) for a, b in zip(with_caption, real, strict=True)]
    without = sample(pipeline, args, len(rows), "inpainting without caption", **options)
    return {
        "held-out compositions, central half, with caption, nearest picture is the right one": share(
            data.nearest(with_caption, rows)
        ),
        "held-out compositions, central half, without caption, nearest picture is the right one": share(
            data.nearest(without, rows)
        ),
        "pixels outside of the mask bit-identical": share(kept),
    }


def damage(pictures: torch.Tensor, seed: int) -> torch.Tensor:
    """Pictures in [0, 1] with four squares of noise each, a quarter of the area together at the most."""
    generator = torch.Generator().manual_seed(seed)
    pictures, side = pictures.clone(), pictures.shape[-1] // 4
    for picture in pictures:
        for _ in range(4):
            top, left = torch.randint(picture.shape[-1] - side, (2,), generator=generator).tolist()
            noise = torch.rand(3, side, side, generator=generator)
            picture[:, top : top + side, left : left + side] = noise
    return pictures


def measure_repair(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows = data.composition
    real, damaged = data.real(rows), damage(data.real(rows), args.seed)
    fixed = sample(
        pipeline, args, len(rows), "repair", prompt=data.texts(rows), image=damaged, strength=0.5, output="image"
    )
    return {
        "held-out compositions with squares of noise, PSNR before": mean(psnr(2 * damaged - 1, 2 * real - 1), "dB"),
        "held-out compositions with squares of noise, with caption, PSNR after": mean(
            psnr(2 * fixed - 1, 2 * real - 1), "dB"
        ),
    }


@torch.no_grad()
def measure_super_resolution(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows, factor = data.composition, pipeline.config.lowres_factor
    real = to_pixels(data.pictures[rows])
    small = resize(real, (real.shape[-2] // factor, real.shape[-1] // factor))
    bicubic = lower_resolution(real, factor)
    coded = pipeline.image_vq.decode_codes(pipeline.image_vq.encode_codes(bicubic.to(pipeline.image_vq.device)))
    large = sample(pipeline, args, len(rows), "super-resolution", image=small / 2 + 0.5, output="image")
    prompted = sample(
        pipeline, args, len(rows), "with caption", prompt=data.texts(rows), image=small / 2 + 0.5, output="image"
    )
    versions = {
        "bicubic": bicubic,
        "bicubic through the image tokenizer": coded.sample.cpu().clamp(-1, 1),
        "without caption": 2 * large - 1,
        "with caption": 2 * prompted - 1,
    }
    return {
        f"held-out compositions, {factor}x, {name}, {unit[0]}": mean(unit[1](pixels, real), unit[2])
        for name, pixels in versions.items()
        for unit in (("PSNR", psnr, "dB"), ("SSIM", ssim, ""))
    }
