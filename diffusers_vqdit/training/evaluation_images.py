"""Figures of generated images, and of the tokenizers that they go through."""

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F

from ..models.text_vq import TextVQModel
from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..pipelines.text_segment import encode_texts
from ..tasks import Task
from ..utils.decoding import to_pixels
from ..utils.images import lower_resolution, resize
from .evaluation import (
    EmojiData,
    Roles,
    image_tasks,
    label_names,
    mean,
    sample,
    share,
    task_between,
    tasks_between,
    text_vq_of,
)
from .metrics import counts_by_level, level_figures, psnr, ssim, usage_of_counts


@torch.no_grad()
def round_trips(text_vq: TextVQModel, tokenizer: Any, captions: list[str]) -> list[bool]:
    codes = encode_texts(captions, text_vq, tokenizer)
    tokens = torch.cat([text_vq.decode_codes(part.to(text_vq.device)).argmax(-1).cpu() for part in codes.split(64)])
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text == caption for text, caption in zip(texts, captions, strict=True)]


def measure_tokenizers(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    real, decoded = to_pixels(data.pictures[data.test]), data.decoded[data.test]
    codes = level_figures(*usage_of_counts(counts_by_level(data.codes, pipeline.image_vq.num_codes)))
    figures = {
        f"pictures of {real.shape[-1]} px, whole test split, PSNR": mean(psnr(decoded, real), "dB"),
        f"pictures of {real.shape[-1]} px, whole test split, SSIM": mean(ssim(decoded, real), ""),
        "image codebook, all pictures, usage": {"value": codes["usage"]},
        "image codebook, all pictures, perplexity": {"value": codes["perplexity"], "unit": "codes"},
    }
    if (own := text_vq_of(pipeline)) is not None:
        for column, language in data.captions.items():
            trips = round_trips(*own, data.texts(data.test, column))
            figures[f"{language} captions, whole test split, exact round trip"] = share(trips)
    return figures


def drawn_right(
    pipeline: VQDiTPipeline, prompts: list[str], rows: list[int], data: EmojiData, args: argparse.Namespace
) -> list[bool]:
    """Whether the picture nearest to each prompt's sample is that of its row."""
    roles = Roles.of(pipeline)
    task = f"{roles.prompt}->{roles.image}"
    return data.nearest(sample(pipeline, args, len(rows), task, roles.image, {roles.prompt: prompts}), rows)


def measure_text_to_image(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Captions in all languages as prompts, and other texts as what they are."""
    roles, figures = Roles.of(pipeline), {}

    def draw(name: str, task: Task, column: str, title: str, rows: list[int]) -> None:
        drawn = sample(pipeline, args, len(rows), name, roles.image, {task.given[0]: data.texts(rows, column)})
        for how, figure in data.judged(drawn, rows, args.batch_size).items():
            figures[f"{name}, {title}, nearest picture{how} is the one named"] = figure

    for task in tasks_between(pipeline, [*roles.texts, *roles.states], [roles.image]):
        sets = {"training captions": data.train, data.held_out: data.composition}
        sets |= {"held-out styles": data.styles} if data.styles else {}
        for name, rows in sets.items():
            for column in roles.columns(task.given[0], data):
                draw(name, task, column, data.title(column), rows)
        if data.unseen and task.given == (roles.prompt,):
            draw("training pictures", task, "unseen", "wordings never seen", data.unseen)
    return figures


def measure_sizes(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Pictures drawn from captions at each of ``sizes``, beside the data's pictures fitted to it."""
    roles, figures = Roles.of(pipeline), {}
    if not task_between(pipeline, [roles.prompt], [roles.image]):
        return {}
    for height, width in args.sizes or ():
        fitted, size = data.at_size(pipeline.image_vq, (height, width), args), f"{height} x {width} px"
        for title, rows in (("training captions", data.train), (data.held_out, data.composition)):
            passed, options = {roles.prompt: data.texts(rows)}, {"height": height, "width": width}
            drawn = sample(pipeline, args, len(rows), size, roles.image, passed, **options)
            figures[f"{size}, {title}, nearest picture is the one named"] = share(fitted.nearest(drawn, rows))
    return figures


def measure_label_to_image(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """The nearest picture's label, of pictures drawn for each label in turn."""
    roles = Roles.of(pipeline)
    if not (task := task_between(pipeline, [roles.label], [roles.image])):
        return {}
    names = label_names(pipeline, roles.label)
    labels = [names[i % len(names)] for i in range(args.num_samples)]
    drawn = sample(pipeline, args, len(labels), task, roles.image, {roles.label: labels})
    return {
        f"all labels, nearest picture{how} has the label": share(
            [one == label for one, label in zip(data.labels(rows), labels, strict=True)]
        )
        for how, rows in data.nearest_by(drawn, args.batch_size).items()
    }


def central_hole(size: int) -> torch.Tensor:
    """A mask (1, 1, size, size) whose central square of ones is half of the area, or a little more."""
    border = math.floor(size * (1 - math.sqrt(0.5)) / 2)
    return F.pad(torch.ones(1, 1, size - 2 * border, size - 2 * border), (border,) * 4)


def measure_inpainting(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    roles, rows, figures = Roles.of(pipeline), data.composition, {}
    real = data.real(rows)
    mask = central_hole(real.shape[-1])
    options = {"mask_image": mask.expand(len(rows), -1, -1, -1)}
    outside, kept = mask[0, 0] == 0, None
    for name, given in (("with caption", [roles.prompt]), ("without caption", [])):
        if not task_between(pipeline, given, [roles.image]):
            continue
        passed = {**({roles.prompt: data.texts(rows)} if given else {}), roles.image: real}
        drawn = sample(pipeline, args, len(rows), f"inpainting {name}", roles.image, passed, **options)
        for how, figure in data.judged(drawn, rows, args.batch_size).items():
            figures[f"{data.held_out}, central half, {name}, nearest picture{how} is the right one"] = figure
        kept = kept or [torch.equal(a[:, outside], b[:, outside]) for a, b in zip(drawn, real, strict=True)]
    return {**figures, "pixels outside of the mask bit-identical": share(kept)} if kept else figures


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
    roles, rows = Roles.of(pipeline), data.composition
    if not task_between(pipeline, [roles.prompt], [roles.image]):
        return {}
    real, damaged = data.real(rows), damage(data.real(rows), args.seed)
    passed = {roles.prompt: data.texts(rows), roles.image: damaged}
    fixed = sample(pipeline, args, len(rows), "repair", roles.image, passed, strength=0.5)
    return {
        f"{data.held_out} with squares of noise, PSNR before": mean(psnr(2 * damaged - 1, 2 * real - 1), "dB"),
        f"{data.held_out} with squares of noise, with caption, PSNR after": mean(
            psnr(2 * fixed - 1, 2 * real - 1), "dB"
        ),
    }


def measure_image_to_image(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Of tasks from other pictures, and a text beside them: those pictures are columns of their segments' names."""
    roles, figures = Roles.of(pipeline), {}
    looked_at = {roles.image: data}
    for task, others in image_tasks(pipeline, roles).items():
        (output,) = task.generated
        if output not in looked_at:
            looked_at[output] = data.of_column(pipeline._segments[output].vq, output, args)
        for title, rows in (("training pictures", data.train), (data.held_out, data.composition)):
            passed = {name: roles.pictures(rows, name, data) for name in others}
            passed |= {n: data.texts(rows, roles.column(n, data)) for n in task.given if n not in others}
            drawn = sample(pipeline, args, len(rows), str(task), output, passed)
            for how, figure in looked_at[output].judged(drawn, rows, args.batch_size).items():
                figures[f"{task}, {title}, nearest picture{how} is the right one"] = figure
    return figures


@torch.no_grad()
def measure_super_resolution(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    roles, rows = Roles.of(pipeline), data.composition
    if not task_between(pipeline, [roles.lowres], [roles.image]):
        return {}
    factor = roles.factor
    real = to_pixels(data.pictures[rows])
    small = resize(real, (real.shape[-2] // factor, real.shape[-1] // factor)) / 2 + 0.5
    bicubic = lower_resolution(real, factor)
    coded = pipeline.image_vq.decode_codes(pipeline.image_vq.encode_codes(bicubic.to(pipeline.image_vq.device)))
    large = sample(pipeline, args, len(rows), "super-resolution", roles.image, {roles.image: small})
    versions = {
        "bicubic": bicubic,
        "bicubic through the image tokenizer": coded.sample.cpu().clamp(-1, 1),
        "without caption": 2 * large - 1,
    }
    if task_between(pipeline, [roles.lowres, roles.prompt], [roles.image]):
        passed = {roles.prompt: data.texts(rows), roles.image: small}
        versions["with caption"] = 2 * sample(pipeline, args, len(rows), "with caption", roles.image, passed) - 1
    return {
        f"{data.held_out}, {factor}x, {name}, {unit[0]}": mean(unit[1](pixels, real), unit[2])
        for name, pixels in versions.items()
        for unit in (("PSNR", psnr, "dB"), ("SSIM", ssim, ""))
    }
