"""An evaluation as a table, and as an image with a row of examples for each task."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..utils.images import resize
from .evaluation import EmojiData, Roles, image_tasks, label_names, sample, task_between, tasks_between
from .evaluation_images import central_hole, damage
from .evaluation_texts import blanked


Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
PROMPTS, ACROSS = 48, 8  # held-out captions of the sheet, and how many stand in a row
CELL, CAPTION, TITLE = 112, 46, 210  # pixels in the picture: a cell's side, the height below it, the titles' width


def as_table(report: dict) -> str:
    """The report as a Markdown table."""

    def show(entry: dict) -> str:
        if "unit" not in entry:
            value, error, unit = 100 * entry["value"], 100 * entry.get("standard_error", 0), " %"
        else:
            value, error, unit = entry["value"], entry.get("standard_error", 0), f" {entry['unit']}".rstrip()
        digits = 1 if unit == " %" else 0 if value > 100 or isinstance(value, int) else 2 if unit else 3
        text = f"{value:.{digits}f}{unit}"
        return text + (f" (± {error:.{digits}f}, n = {entry['count']})" if "count" in entry else "")

    lines = ["| task | measure | value |", "|---|---|---|"]
    for task, figures in report.items():
        for index, (measure, entry) in enumerate(figures.items()):
            lines.append(f"| {task if not index else ''} | {measure} | {show(entry)} |")
    return "\n".join(lines)


def task_rows(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> list[tuple[str, list[tuple]]]:
    """Rows of a title and cells; a cell is a picture (C, H, W) in [0, 1] or a text, and the caption below it."""
    roles, rows = Roles.of(pipeline), data.composition[:ACROSS]
    real, captions = data.real(rows), data.texts(rows) if roles.prompt or roles.caption else []
    image, caption, label = roles.image, roles.caption, roles.label
    result: list[tuple[str, list[tuple]]] = []

    def draw(output: str, passed: Mapping[str, Any] | None = None, **options: Any) -> Any:
        return sample(pipeline, args, len(rows), "picture", output, passed, **options)

    def known(given: list[str], generated: list[str]) -> str:
        return task_between(pipeline, given, generated)

    def add(title: str, contents: Iterable, below: Iterable[str] | None = None) -> None:
        below = [""] * len(rows) if below is None else below
        result.append((title, list(zip(contents, below, strict=True))))

    for task in tasks_between(pipeline, [*roles.texts, *roles.states], [image]):
        (given,) = task.given
        for column in roles.columns(given, data):
            texts = data.texts(rows, column)
            add(f"{task}, {data.title(column)}", draw(image, {given: texts}), texts)
    if arrow := known([label], [image]):
        labels = (label_names(pipeline, label) * len(rows))[: len(rows)]
        add(arrow, draw(image, {label: labels}), labels)
    if arrow := known([], [image]):
        add(arrow, draw(image))
    for task, others in image_tasks(pipeline, roles).items():
        sources = {name: roles.pictures(rows, name, data) for name in others}
        for name, pictures in sources.items():
            add(name, pictures)
        words = {n: data.texts(rows, roles.column(n, data)) for n in task.given if n not in others}
        add(f"... {task}", draw(task.generated[0], {**sources, **words}), next(iter(words.values()), None))
    for task in tasks_between(pipeline, [image], roles.texts):
        add(str(task), real, draw(task.generated[0], {image: real}))
    if known([roles.prompt], [image]):
        mask, damaged = central_hole(real.shape[-1]), damage(real, args.seed)
        passed, masks = {roles.prompt: captions, image: real}, mask.expand(len(rows), -1, -1, -1)
        add("image to repaint", real * (1 - mask) + 0.5 * mask, captions)
        add("... repainted, with caption", draw(image, passed, mask_image=masks))
        add("image to repair", damaged, captions)
        add("... repaired, with caption", draw(image, {**passed, image: damaged}, strength=0.5))
    if known([roles.lowres], [image]):
        size = (real.shape[-2] // roles.factor, real.shape[-1] // roles.factor)
        small = resize(2 * real - 1, size) / 2 + 0.5
        add(f"image to enlarge, {roles.factor}x", small)
        add("... enlarged", draw(image, {image: small}))
    if arrow := known([], [image, caption]):
        pairs = draw(arrow.removeprefix("->"))
        add(arrow, pairs[image], pairs[caption])
    if arrow := known([], [caption]):
        add(arrow, draw(caption))
        blanks = blanked(captions, pipeline)
        add("text with a blank, filled", blanks, draw(caption, {caption: blanks}))
    shown: set[str] = set()
    for task in tasks_between(pipeline, roles.texts, roles.texts):
        (given,), (wanted,) = task.given, task.generated
        if f"{wanted}->{given}" not in shown:  # one way of the two
            texts = data.texts(rows, roles.column(given, data))
            add(str(task), texts, draw(wanted, {given: texts}))
        shown.add(str(task))
    for given, contents in ((image, real), (roles.prompt, captions)):
        if arrow := known([given], [label]):
            add(arrow, contents, draw(label, {given: contents}))
    return result


def prompt_rows(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> list[tuple[str, list[tuple]]]:
    """Rows as of [`task_rows`]: the first held-out captions, `PROMPTS` of them and one sample each; empty where the
    pipeline draws no captions."""
    roles, rows = Roles.of(pipeline), data.composition[:PROMPTS]
    if not task_between(pipeline, [roles.prompt], [roles.image]):
        return []
    texts = data.texts(rows)
    drawn = sample(pipeline, args, len(rows), "prompts", roles.image, {roles.prompt: texts})
    cells = list(zip(drawn, texts, strict=True))
    parts = [(start, cells[start : start + ACROSS]) for start in range(0, len(cells), ACROSS)]
    return [(f"{data.held_out}, {start + 1} to {start + len(part)}", part) for start, part in parts]


def wrapped(text: str, width: int, font: Font, lines: int) -> str:
    """The text in lines that fit a width in pixels, so many at the most; broken between letters where it must be."""
    result = [""]
    for word in text.replace(" ", " \0").split("\0"):
        if font.getlength(result[-1] + word.rstrip()) > width and result[-1]:
            result.append("")
        for letter in word:
            if font.getlength(result[-1] + letter) > width and letter != " ":
                result.append("")
            result[-1] += letter
    return "\n".join(result[:lines])


def draw_rows(rows: list[tuple[str, list[tuple]]], font_file: str | None) -> Image.Image:
    def font(size: int) -> Font:
        return ImageFont.truetype(font_file, size) if font_file is not None else ImageFont.load_default(size)

    width = TITLE + max(len(cells) for _, cells in rows) * (CELL + 8)
    heights = [CELL + (CAPTION if any(caption for _, caption in cells) else 8) for _, cells in rows]
    canvas = Image.new("RGB", (width, sum(heights) + 8), "white")
    pen, top = ImageDraw.Draw(canvas), 8
    for (title, cells), height in zip(rows, heights, strict=True):
        pen.multiline_text((8, top + 8), wrapped(title, TITLE - 16, font(16), 3), fill="black", font=font(16))
        for index, (content, caption) in enumerate(cells):
            left = TITLE + index * (CELL + 8)
            if isinstance(content, str):
                pen.rectangle((left, top, left + CELL - 1, top + CELL - 9), fill="#eef1f6")
                text = wrapped(content, CELL - 12, font(13), 6)
                pen.multiline_text((left + 6, top + 6), text, fill="black", font=font(13))
            else:
                pixels = (content.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
                canvas.paste(Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
            text = wrapped(caption, CELL, font(12), 3)
            pen.multiline_text((left, top + CELL), text, fill="#333333", font=font(12))
        top += height
    return canvas
