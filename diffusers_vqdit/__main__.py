"""The demo, ``python -m diffusers_vqdit``: pictures from English and Chinese prompts, and captions of pictures; or,
with ``--say`` and ``--listen``, speech of texts and texts of speech, by a pipeline that was trained on sounds.

It uses a starter checkpoint of the checkout, unless another pipeline is named: the one of pictures, or with ``--say``
and ``--listen`` the one that talks.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from . import VQDiTPipeline
from .pipelines.segment_base import IMAGE, TEXT
from .tasks import Task
from .training.files import check_output_file
from .utils.arguments import (
    argument_parser,
    model_name,
    number,
    output_path,
    positive_integer,
    random_seed,
    refuse_unused,
)
from .utils.provenance import save_generated
from .utils.sounds import is_sound_file
from .utils.starter import STARTER, TALKING_STARTER, check_starter, model_id
from .utils.told_errors import told_errors


# Prompt, and its meaning where it isn't English, for a label that any font can show.
PROMPTS = [
    ("a red apple", None),
    ("sailboat", None),
    ("snowman", None),
    ("an astronaut with medium skin tone", None),
    ("man golfing, light skin tone", None),
    ("farmer, medium skin tone", None),
    ("红苹果", "red apple"),
    ("红心", "red heart"),
    ("向日葵", "sunflower"),
    ("自行车", "bicycle"),
    ("宇航员，中等肤色", "astronaut, medium skin tone"),
    ("拇指向上，中等肤色", "thumbs up, medium skin tone"),
]

CELL, LABEL = 128, 54  # pixels: side of a picture, height of its label


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(
        prog="python -m diffusers_vqdit", description="Draw prompts and caption pictures with a VQDiT pipeline."
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=model_name,
        help=f"Pipeline: a folder or a Hub id; by default {STARTER.name}, to talk {TALKING_STARTER.name}.",
    )
    parser.add_argument("--prompt", nargs="+", help="Prompts to draw in place of the default ones.")
    parser.add_argument(
        "--say",
        nargs="+",
        help="Texts to speak, each into a WAV file, in place of drawing; the starter says names of food: 'red apple'.",
    )
    parser.add_argument("--listen", nargs="+", help="Files of sounds to write down, in place of drawing.")
    parser.add_argument("--num_inference_steps", type=positive_integer, help="By default the pipeline's own.")
    parser.add_argument("--guidance_scale", type=number(), help="By default the pipeline's own.")
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--output_file", type=output_path, default=Path("vqdit_demo.png"))
    args = parser.parse_args(input_args)
    if args.say or args.listen:
        refuse_unused(parser, args, {"prompt": "with --say or --listen"})
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path = str(TALKING_STARTER if args.say or args.listen else STARTER)
    return args


def wrapped(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """The text in lines that fit the width, three at the most."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:3])


def labelled_grid(pictures: list[Image.Image], labels: list[str], columns: int = 6) -> Image.Image:
    """Pictures in rows, each with its label below."""
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    grid = Image.new("RGB", (columns * CELL, rows * (CELL + LABEL)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=12)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = index % columns * CELL, index // columns * (CELL + LABEL)
        grid.paste(picture.resize((CELL, CELL), Image.Resampling.BICUBIC), (left, top))
        draw.multiline_text((left + 4, top + CELL + 2), wrapped(label, draw, font, CELL - 8), fill="black", font=font)
    return grid


def spoken_files(args: argparse.Namespace) -> list[Path]:
    """Where each text of ``--say`` goes: beside ``--output_file``, as a WAV file."""
    file = args.output_file
    return [file.with_name(f"{file.stem}-{index}.wav") for index in range(len(args.say or []))]


def speak_and_listen(pipeline: VQDiTPipeline, args: argparse.Namespace) -> None:
    """Write what ``--say`` asks for beside ``--output_file``, as WAV files, and print what ``--listen`` hears."""
    fields = {name: one.kind for name, one in pipeline._segments.items()}
    tasks = [Task.parse(task) for task in pipeline.transformer.config.tasks or []]

    def between(given: str, generated: str) -> tuple[str, str]:
        """The segments of the first task that makes one such value of another."""
        for task in tasks:
            if [fields[name] for name in task.given] == [given] and [fields[n] for n in task.generated] == [generated]:
                return task.given[0], task.generated[0]
        raise ValueError(f"the pipeline has no task that makes {generated} of {given}; it has {list(map(str, tasks))}")

    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    for index, (said, path) in enumerate(zip(args.say or [], spoken_files(args), strict=True)):
        text, audio = between("texts", "audios")
        passed: dict = {"prompt": said} if text == TEXT else {"inputs": {text: said}}
        generator = torch.Generator().manual_seed(args.seed + index)
        spoken = pipeline(**passed, **options, output=audio, generator=generator)
        about = {"model_id": model_id(args.pretrained_model_name_or_path), "description": said}
        save_generated(spoken.audios[0], path, sampling_rate=spoken.sampling_rate, **about)
        print(f"{path.resolve()}: {said}, {len(spoken.audios[0]) / spoken.sampling_rate:.1f} s")
    for heard in args.listen or []:
        audio, text = between("audios", "texts")
        try:
            written = pipeline(inputs={audio: heard}, output=text, **options).segments[text][0]
        except ValueError as error:
            raise ValueError(f"--listen {heard!r}: {error}") from error
        print(f"{heard}: {written}")


def main(args: argparse.Namespace) -> None:
    started = time.time()
    for file in spoken_files(args):
        check_output_file("output_file", file)
    if not args.say and not args.listen:
        check_output_file("output_file", args.output_file, ".png")
    path = args.pretrained_model_name_or_path
    check_starter(path)
    pipeline = VQDiTPipeline.from_pretrained(path).to("cuda" if torch.cuda.is_available() else "cpu")
    if args.say or args.listen:
        speak_and_listen(pipeline, args)
        return
    pairs = [(prompt, None) for prompt in args.prompt] if args.prompt else PROMPTS
    prompts = [prompt for prompt, _ in pairs]
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(prompts))]
    images = pipeline(
        prompts,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=generators,
    ).images
    labels = [prompt if meaning is None else f"zh: {meaning}" for prompt, meaning in pairs]

    examples, captions, tasks = Path(path) / "examples" / "captions.json", {}, pipeline.transformer.config.tasks
    if not args.prompt and examples.is_file() and (tasks is None or f"{IMAGE}->{TEXT}" in tasks):
        captions = json.loads(examples.read_text(encoding="utf-8"))
        captions = {name: caption for name, caption in captions.items() if not is_sound_file(name)}
    if captions:
        pictures = [Image.open(examples.parent / name) for name in captions]
        generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(pictures))]
        texts = pipeline(image=pictures, num_inference_steps=args.num_inference_steps, generator=generators).texts
        print("Captions of pictures that training never saw (in brackets: the true one):")
        for text, truth in zip(texts, captions.values(), strict=True):
            print(f"  {text}  ({truth})")
        images += pictures
        labels += [f"-> {text}" for text in texts]

    save_generated(
        labelled_grid(images, labels),
        args.output_file,
        model_id=model_id(path),
        description="; ".join(prompts),
        composite=len(images) > len(prompts),
    )
    print("Drew: " + "; ".join(prompts))
    print(f"{args.output_file.resolve()}: {len(images)} pictures, {time.time() - started:.0f} s")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
