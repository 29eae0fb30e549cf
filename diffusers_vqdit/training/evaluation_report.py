"""An evaluation as a table, and as an image with a row of examples for each task."""

import argparse
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from ..utils.images import resize
from .evaluation import EmojiData, sample
from .evaluation_images import central_hole, damage
from .evaluation_texts import blanked


CELL, CAPTION, TITLE = 112, 46, 210  # pixels in the picture: a cell's side, the height below it, the titles' width


def as_table(report: dict) -> str:
    """The report as a Markdown table."""

    def show(entry: dict) -> str:
        if "unit" not in entry:
            value, error, unit = 100 * entry["value"], 100 * entry.get("standard_error", 0), " %"
        else:
            value, error, unit = entry["value"], entry.get("standard_error", 0), f" {entry['unit']}".rstrip()
        digits = 1 if unit == " %" else 0 if value > 100 else 2 if unit else 3
        text = f"{value:.{digits}f}{unit}"
        return text + (f" (± {error:.{digits}f}, n = {entry['count']})" if "count" in entry else "")

    lines = ["| task | measure | value |", "|---|---|---|"]
    for task, figures in report.items():
        for index, (measure, entry) in enumerate(figures.items()):
            lines.append(f"| {task if not index else ''} | {measure} | {show(entry)} |")
    return "\n".join(lines)


def task_rows(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> list[tuple[str, list[tuple]]]:
    """Rows of a title and cells; a cell is a picture (C, H, W) in [0, 1] or a text, and the caption below it."""
    rows = data.composition[:8]
    real, captions = data.real(rows), data.texts(rows)

    def draw(**inputs: Any) -> Any:
        return sample(pipeline, args, len(rows), "picture", **inputs)

    mask = central_hole(real.shape[-1])
    holed, damaged = real * (1 - mask) + 0.5 * mask, damage(real, args.seed)
    small = resize(2 * real - 1, (real.shape[-2] // 2, real.shape[-1] // 2)) / 2 + 0.5
    blanks = blanked(captions, pipeline)
    labels = (list(pipeline.config.labels) * len(rows))[: len(rows)]
    zh = data.texts(rows, "text_zh")
    pairs = draw(output="image+text")
    named = list(zip(real, captions, strict=True))
    return [
        ("text->image, English", list(zip(draw(prompt=captions, output="image"), captions, strict=True))),
        ("text->image, Chinese", list(zip(draw(prompt=zh, output="image"), zh, strict=True))),
        ("label->image", list(zip(draw(class_label=labels, output="image"), labels, strict=True))),
        ("->image", [(picture, "") for picture in draw(output="image")]),
        ("image->text", list(zip(real, draw(image=real, output="text"), strict=True))),
        ("image->text_zh", list(zip(real, draw(image=real, output="text_zh"), strict=True))),
        ("image to repaint", [(picture, caption) for picture, (_, caption) in zip(holed, named, strict=True)]),
        (
            "... repainted, with caption",
            [
                (p, "")
                for p in draw(
                    prompt=captions, image=real, mask_image=mask.expand(len(rows), -1, -1, -1), output="image"
                )
            ],
        ),
        ("image to repair", [(picture, caption) for picture, (_, caption) in zip(damaged, named, strict=True)]),
        (
            "... repaired, with caption",
            [(p, "") for p in draw(prompt=captions, image=damaged, strength=0.5, output="image")],
        ),
        ("image to enlarge, 2x", [(picture, "") for picture in small]),
        ("... enlarged", [(picture, "") for picture in draw(image=small, output="image")]),
        ("->image+text", list(zip(pairs["image"], pairs["text"], strict=True))),
        ("->text", [(text, "") for text in draw(output="text")]),
        ("text with a blank, filled", list(zip(blanks, draw(prompt=blanks, output="text"), strict=True))),
        ("text->text_zh", list(zip(captions, draw(prompt=captions, output="text_zh"), strict=True))),
        (
            "keywords->text",
            list(
                zip(
                    data.texts(rows, "keywords"),
                    draw(inputs={"keywords": data.texts(rows, "keywords")}, output="text"),
                    strict=True,
                )
            ),
        ),
        ("image->label", list(zip(real, draw(image=real, output="label"), strict=True))),
        ("text->label", list(zip(captions, draw(prompt=captions, output="label"), strict=True))),
    ]


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, lines: int) -> str:
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
    def font(size: int) -> ImageFont.FreeTypeFont:
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
