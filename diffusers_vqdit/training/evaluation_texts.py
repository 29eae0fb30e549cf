"""Figures of generated texts, and of texts generated together with images."""

import argparse
from typing import Any

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from .evaluation import EmojiData, sample, share


def equal(texts: list[str], truths: list[str]) -> dict[str, Any]:
    return share([text == truth for text, truth in zip(texts, truths, strict=True)])


def measure_image_to_text(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    figures = {}
    for name, rows in (("training pictures", data.train), ("held-out compositions", data.composition)):
        for language, column in (("English", "text"), ("Chinese", "text_zh")):
            if f"image->{column}" in pipeline.transformer.config.tasks:
                texts = sample(pipeline, args, len(rows), f"image->{column}", image=data.real(rows), output=column)
                figures[f"{name}, {language}, exact match"] = equal(texts, data.texts(rows, column))
    return figures


def measure_text_to_text(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows, figures = data.composition, {}
    for given, wanted, name in (
        ("text", "text_zh", "English to Chinese"),
        ("text_zh", "text", "Chinese to English"),
        ("keywords", "text", "keywords to caption"),
    ):
        inputs = {"inputs": {given: data.texts(rows, given)}} if given != "text" else {"prompt": data.texts(rows)}
        texts = sample(pipeline, args, len(rows), f"{given}->{wanted}", output=wanted, **inputs)
        figures[f"held-out compositions, {name}, exact match"] = equal(texts, data.texts(rows, wanted))
    return figures


def measure_text(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    texts = sample(pipeline, args, args.num_samples, "->text", output="text")
    known = set(data.columns["text"])
    return {
        "samples that are captions of the dataset": share([text in known for text in texts]),
        "samples that differ from one another": {"value": len(set(texts)) / len(texts)},
    }


def blanked(captions: list[str], pipeline: VQDiTPipeline) -> list[str]:
    """Captions with a blank in place of one token each, the middle one."""
    texts = []
    for caption in captions:
        ids = pipeline.tokenizer(caption).input_ids
        middle = len(ids) // 2
        before, after = pipeline.tokenizer.decode(ids[:middle]), pipeline.tokenizer.decode(ids[middle + 1 :])
        texts.append(before + pipeline.tokenizer.mask_token + after)
    return texts


def measure_infilling(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows = data.composition
    prompts = blanked(data.texts(rows), pipeline)
    alone = sample(pipeline, args, len(rows), "infilling", prompt=prompts, output="text")
    seen = sample(
        pipeline,
        args,
        len(rows),
        "infilling of a picture's caption",
        prompt=prompts,
        image=data.real(rows),
        output="text",
    )
    return {
        "held-out compositions, one token, exact match": equal(alone, data.texts(rows)),
        "held-out compositions, one token, picture given, exact match": equal(seen, data.texts(rows)),
    }


def measure_joint(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Whether the nearest picture to a generated one is that of the generated caption, or one of its emoji."""
    pairs = sample(pipeline, args, args.num_samples, "->image+text", output="image+text")
    texts = sample(pipeline, args, args.num_samples, "->text", output="text")
    chained = {"text": texts, "image": sample(pipeline, args, len(texts), "its picture", prompt=texts, output="image")}
    emoji = dict(zip(data.columns["text"], data.columns["emoji"], strict=True))
    figures = {}
    for name, drawn in (("both at once", pairs), ("->text, then text->image", chained)):
        found = list(zip(drawn["text"], data.nearest_rows(drawn["image"]), strict=True))
        of_emoji = [emoji.get(text) == data.columns["emoji"][row] for text, row in found]
        own = [text == data.columns["text"][row] for text, row in found]
        figures[f"{name}, nearest picture is of the caption's emoji"] = share(of_emoji)
        figures[f"{name}, nearest picture is the caption's own, skin tone too"] = share(own)
    return figures
