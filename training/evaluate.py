#!/usr/bin/env python
"""Measure every task of a pipeline on the emoji dataset: ``evaluation.json``, ``.md`` (a table), ``.png`` (a picture).

    python training/evaluate.py --pretrained_model_name_or_path model_cards/vqdit-emoji-32

``evaluation_prompts.png`` has the first 48 held-out captions, one sample each, where ``text->image`` is measured.

Any data with a training and a test split will do (``--dataset_name``): without columns ``emoji`` and ``held_out``,
what needs them is left out, and all of the test split is measured in place of held-out compositions.

``--tokenizer model_cards/vqdit-emoji-32 --subfolder image_vq`` measures an image tokenizer alone, on any pictures; its
options are those of ``training/evaluate_tokenizer.py``. ``--audio_column audio`` measures a pipeline that speaks or
listens, on spoken captions, with the options of ``training/evaluate_speech.py``.

Takes about half an hour on two CPU cores; ``--tasks`` measures some of them, and what the pipeline doesn't do is left
out. A task's figures are in the files as soon as it is measured, and a run that was killed goes on after them, given
the same pipeline, data and options. One sample is drawn for each caption or picture, from a seed of its own, and each
share comes with its standard error. The captions and pictures are held-out compositions (a role and a skin tone that
training never saw together) or, where it says so, training captions or the whole test split. *Nearest picture* is the
one of all 3,786 whose reconstruction by the image tokenizer has the smallest pixel distance to a sample; with
``--features``, also the one whose features are nearest by a vision model. Where a column ``held_out`` says "style",
and where a column ``unseen`` has texts, these are measured besides.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.models.segment_layers import segment_patch
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.evaluation import (
    CAPTIONS,
    EmojiData,
    Roles,
    add_sampling_arguments,
    check_colours,
    task_between,
)
from diffusers_vqdit.training.evaluation_files import (
    UNFINISHED_FILE,
    add_report_arguments,
    evaluation_identity,
    measure_tasks,
    report_folder,
)
from diffusers_vqdit.training.evaluation_images import (
    measure_image_to_image,
    measure_inpainting,
    measure_label_to_image,
    measure_repair,
    measure_sizes,
    measure_super_resolution,
    measure_text_to_image,
    measure_tokenizers,
)
from diffusers_vqdit.training.evaluation_pictures import check_room
from diffusers_vqdit.training.evaluation_report import as_table, draw_rows, prompt_rows, task_rows
from diffusers_vqdit.training.evaluation_scores import (
    measure_classification,
    measure_likelihood,
    measure_retrieval,
    measure_similarity,
)
from diffusers_vqdit.training.evaluation_texts import (
    measure_image_to_text,
    measure_infilling,
    measure_joint,
    measure_plain_text_to_text,
    measure_text,
    measure_text_to_text,
)
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.image_losses import BackboneFeatures
from diffusers_vqdit.training.segment_columns import picture_sizes
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    positive_integer,
)
from diffusers_vqdit.utils.told_errors import told_errors


MEASURES: dict[str, Callable[[VQDiTPipeline, EmojiData, argparse.Namespace], dict]] = {
    "tokenizers": measure_tokenizers,
    "text->image": measure_text_to_image,
    "sizes": measure_sizes,
    "label->image": measure_label_to_image,
    "inpainting": measure_inpainting,
    "repair": measure_repair,
    "super-resolution": measure_super_resolution,
    "image->image": measure_image_to_image,
    "image->text": measure_image_to_text,
    "text->text": measure_text_to_text,
    "plain text->text": measure_plain_text_to_text,
    "->text": measure_text,
    "infilling": measure_infilling,
    "->image+text": measure_joint,
    "classification": measure_classification,
    "retrieval": measure_retrieval,
    "text similarity": measure_similarity,
    "likelihood": measure_likelihood,
}

FILES = ("evaluation.json", "evaluation.md", "evaluation.png", "evaluation_prompts.png")


def measures(names: str) -> list[str]:
    """The entries of `--tasks`: with commas, as a task that begins with ``->`` would be read as a flag."""
    chosen = [name.strip() for name in names.split(",")]
    if unknown := sorted(set(chosen) - set(MEASURES)):
        raise argparse.ArgumentTypeError(f"{unknown} are not among {list(MEASURES)}")
    return chosen


def titled_columns(name: str) -> tuple[str, str]:
    """A column and what the report calls its texts, of ``column=title`` or the column alone."""
    column, _, title = name.partition("=")
    return column, title or column


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(
        "Measure a VQDiT pipeline on the emoji dataset. With --tokenizer it measures a tokenizer, with --audio_column "
        "a pipeline of sounds; these have options of their own: evaluate.py --tokenizer FOLDER --help, "
        "evaluate.py --audio_column COLUMN --help."
    )
    parser.add_argument(
        "--pretrained_model_name_or_path", type=model_name, required=True, help="Pipeline: a folder or a Hub id."
    )
    parser.add_argument("--dataset_name", default="training/data/emoji.parquet")
    parser.add_argument("--image_column", default="image")
    parser.add_argument(
        "--caption_columns",
        type=titled_columns,
        nargs="+",
        default=list(CAPTIONS.items()),
        metavar="COLUMN=TITLE",
        help="Captions, tried as prompts, and what the report calls them; the first are those of the pipeline's.",
    )
    parser.add_argument("--label_column", default="label")
    parser.add_argument(
        "--max_samples",
        type=positive_integer,
        default=10_000,
        help="Rows of each split, the first ones, that are measured and that samples are compared with.",
    )
    parser.add_argument(
        "--tasks",
        type=measures,
        default=list(MEASURES),
        help=f"Of {', '.join(MEASURES)}; with commas, as in --tasks=->text,infilling.",
    )
    add_sampling_arguments(parser, num_samples=236)
    parser.add_argument(
        "--sizes",
        type=picture_sizes,
        metavar="HEIGHT,WIDTH;...",
        help="Heights and widths in pixels, such as '32,32;40,24', at which pictures are drawn from captions, too.",
    )
    parser.add_argument(
        "--features",
        type=model_name,
        help="Vision model of transformers, a Hub id or a folder: a second judge of pictures drawn from texts.",
    )
    parser.add_argument(
        "--features_image_size", type=positive_integer, help="Side that pictures are resized to for it."
    )
    add_report_arguments(parser)
    args = parser.parse_args(input_args)
    if args.sizes is None and "sizes" in args.tasks and args.tasks != parser.get_default("tasks"):
        parser.error("--tasks sizes needs --sizes")
    refuse_unused_arguments(parser, args)
    args.caption_columns = dict(args.caption_columns)
    return args


def main(args: argparse.Namespace) -> None:
    output_dir = report_folder(args)
    for name in (*FILES, UNFINISHED_FILE):
        check_output_file("output_dir", output_dir / name)
    pipeline = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path).to(args.device)
    check_colours(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    roles, segments = Roles.of(pipeline), pipeline.transformer.config.segments
    image = roles.image
    if args.sizes and not task_between(pipeline, [roles.prompt], [image]):
        tasks = pipeline.transformer.config.tasks
        raise ValueError(f"sizes={args.sizes} needs a task from captions to pictures: the pipeline has {tasks}")
    side = segments[image]["shape"][0]
    for size in args.sizes or ():
        pipeline._segments[image].shape_of(*size, segment_patch(segments, image))  # wrong ones end here
    judge = None
    if args.features is not None:
        judge = BackboneFeatures.from_pretrained(args.features, args.features_image_size).to(args.device)
    resolution = side * pipeline.image_vq.downsample_factor
    mode, known = pipeline.config.resize_mode, pipeline.transformer.config.tasks or []
    labels = [
        name
        for name, read in (("label->image", "given"), ("classification", "generated"))
        if name in args.tasks and any(roles.label in getattr(Task.parse(task), read) for task in known)
    ]
    data = EmojiData.load(pipeline.image_vq, resolution, args, judge, mode, args.max_samples, labels)
    for size in args.sizes or ():
        counts = {"count": len(data.pictures), "drawn": max(len(data.train), len(data.composition))}
        check_room("sizes", size, pipeline.image_vq, **counts, batch_size=args.batch_size)
    measures = {name: partial(MEASURES[name], pipeline, data, args) for name in args.tasks}
    report = measure_tasks(output_dir, evaluation_identity(pipeline, data, args), measures)
    print(as_table(report))
    draw_rows(task_rows(pipeline, data, args), args.font).save(output_dir / "evaluation.png")
    if "text->image" in args.tasks and (prompts := prompt_rows(pipeline, data, args)):
        draw_rows(prompts, args.font).save(output_dir / "evaluation_prompts.png")
    (output_dir / UNFINISHED_FILE).unlink(missing_ok=True)


if __name__ == "__main__":
    with told_errors():
        given = {argument.partition("=")[0] for argument in sys.argv}
        if "--tokenizer" in given:
            import evaluate_tokenizer

            evaluate_tokenizer.main(evaluate_tokenizer.parse_args())
        elif "--audio_column" in given:
            import evaluate_speech

            evaluate_speech.main(evaluate_speech.parse_args())
        else:
            main(parse_args())
