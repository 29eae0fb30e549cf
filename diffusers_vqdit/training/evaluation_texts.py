"""Figures of generated texts, and of texts generated together with images."""

import argparse
from typing import Any

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..utils.token_ids import blank_of
from .evaluation import EmojiData, Roles, sample, share, task_between, tasks_between


def equal(texts: list[str], truths: list[str]) -> dict[str, Any]:
    return share([text == truth for text, truth in zip(texts, truths, strict=True)])


def measure_image_to_text(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    roles, figures = Roles.of(pipeline), {}
    for name, rows in (("training pictures", data.train), (data.held_out, data.composition)):
        for task in tasks_between(pipeline, [roles.image], roles.texts):
            (wanted,) = task.generated
            column = roles.column(wanted, data)
            texts = sample(pipeline, args, len(rows), str(task), wanted, {roles.image: data.real(rows)})
            figures[f"{name}, {data.title(column)}, exact match"] = equal(texts, data.texts(rows, column))
    return figures


def measure_text_to_text(
    pipeline: VQDiTPipeline,
    data: EmojiData,
    args: argparse.Namespace,
    rows: list[int] | None = None,
    name: str | None = None,
) -> dict:
    """Of the compositions, or of other `rows` that the report calls `name`."""
    roles, figures = Roles.of(pipeline), {}
    rows, name = (data.composition, data.held_out) if rows is None else (rows, name)
    for task in tasks_between(pipeline, roles.texts, roles.texts):
        (given, wanted), columns = task.segments, [roles.column(segment, data) for segment in task.segments]
        texts = sample(pipeline, args, len(rows), str(task), wanted, {given: data.texts(rows, columns[0])})
        # One language to another, or what is no language to a caption.
        translated = columns[0] in data.captions or wanted != roles.caption
        title = f"{data.title(columns[0])} to {data.title(columns[1]) if translated else 'caption'}"
        figures[f"{name}, {title}, exact match"] = equal(texts, data.texts(rows, columns[1]))
    return figures


def measure_plain_text_to_text(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Of captions of training that are no compositions: each is a name of its own, that no other tells."""
    return measure_text_to_text(pipeline, data, args, data.plain, "plain training captions") if data.plain else {}


def measure_text(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    roles = Roles.of(pipeline)
    if not (task := task_between(pipeline, [], [roles.caption])):
        return {}
    texts = sample(pipeline, args, args.num_samples, task, roles.caption)
    known = set(data.columns[data.caption_column])
    return {
        "samples that are captions of the dataset": share([text in known for text in texts]),
        "samples that differ from one another": {"value": len(set(texts)) / len(texts)},
    }


def blanked(captions: list[str], pipeline: VQDiTPipeline) -> list[str]:
    """Captions with a blank in place of one token each, the middle one."""
    segment, texts = pipeline._segments[Roles.of(pipeline).caption], []
    tokenizer = segment.vq if segment.has_length else segment.beside
    for caption in captions:
        ids = tokenizer(caption, add_special_tokens=False).input_ids
        middle = len(ids) // 2
        before, after = tokenizer.decode(ids[:middle]), tokenizer.decode(ids[middle + 1 :])
        texts.append(before + blank_of(tokenizer) + after)
    return texts


def measure_infilling(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    roles, rows = Roles.of(pipeline), data.composition
    figures: dict[str, Any] = {}
    if not roles.caption:
        return figures
    blanks = {roles.caption: blanked(data.texts(rows), pipeline)}
    if task_between(pipeline, [], [roles.caption]):
        alone = sample(pipeline, args, len(rows), "infilling", roles.caption, blanks)
        figures[f"{data.held_out}, one token, exact match"] = equal(alone, data.texts(rows))
    if task_between(pipeline, [roles.image], [roles.caption]):
        passed = {**blanks, roles.image: data.real(rows)}
        seen = sample(pipeline, args, len(rows), "infilling of a picture's caption", roles.caption, passed)
        figures[f"{data.held_out}, one token, picture given, exact match"] = equal(seen, data.texts(rows))
    return figures


def measure_joint(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Whether the nearest picture to a generated one is that of the generated caption, or one of its emoji."""
    roles, captions = Roles.of(pipeline), data.columns.get(data.caption_column, [])
    image, caption = roles.image, roles.caption
    if not (joint := task_between(pipeline, [], [image, caption])) or "emoji" not in data.columns:
        return {}
    drawn = {"both at once": sample(pipeline, args, args.num_samples, joint, joint.removeprefix("->"))}
    alone, prompted = task_between(pipeline, [], [caption]), task_between(pipeline, [caption], [image])
    if alone and prompted:
        texts = sample(pipeline, args, args.num_samples, alone, caption)
        pictures = sample(pipeline, args, len(texts), "its picture", image, {caption: texts})
        drawn[f"{alone}, then {prompted}"] = {caption: texts, image: pictures}
    emoji = dict(zip(captions, data.columns["emoji"], strict=True))
    figures = {}
    for name, pairs in drawn.items():
        for how, rows in data.nearest_by(pairs[image], args.batch_size).items():
            found = list(zip(pairs[caption], rows, strict=True))
            of_emoji = [emoji.get(text) == data.columns["emoji"][row] for text, row in found]
            own = [text == captions[row] for text, row in found]
            figures[f"{name}, nearest picture{how} is of the caption's emoji"] = share(of_emoji)
            figures[f"{name}, nearest picture{how} is the caption's own, skin tone too"] = share(own)
    return figures
