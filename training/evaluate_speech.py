#!/usr/bin/env python
"""Measure a pipeline that speaks or listens on spoken captions that it was not trained on.

    python training/evaluate.py --pretrained_model_name_or_path outputs/talking --audio_column audio \
        --dataset_name outputs/speech.parquet

``training/evaluate.py`` hands over to this script where ``--audio_column`` is given. Speech is judged by pocketsphinx
(``pip install pocketsphinx``), which says which of the measured captions it hears: in the recordings, in what the
codec makes of them, and in what the pipeline says; in what it says of its own accord, which of all captions. Other
languages than English have no figures by it, and all others (``--language zh``). Figures are for each kind of
``held_out``: captions in another voice, voices and captions never heard; of each kind at most ``--num_samples`` rows,
all where that is more than there are. Segments of labels, such as voices, and other segments of sounds are columns of
the data of the same name; rows of labels that training didn't have are left out of their tasks.
``evaluation_speech.png`` has spectrograms, pictures and texts of the first eight, and the WAV files beside it are what
is said of their captions; those of an earlier run are removed.
"""

import argparse
import re

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.evaluation import add_sampling_arguments, check_colours
from diffusers_vqdit.training.evaluation_files import add_report_arguments, report_folder, write_report
from diffusers_vqdit.training.evaluation_report import draw_rows
from diffusers_vqdit.training.evaluation_speech import SpeechData, measure_speech
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.utils.arguments import argument_parser, model_name
from diffusers_vqdit.utils.provenance import save_generated
from diffusers_vqdit.utils.told_errors import told_errors


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Measure a VQDiT pipeline on spoken captions.")
    parser.add_argument(
        "--pretrained_model_name_or_path", type=model_name, required=True, help="Pipeline: a folder or a Hub id."
    )
    parser.add_argument("--dataset_name", default="outputs/speech.parquet", help="What prepare_speech.py wrote.")
    parser.add_argument("--audio_column", default="audio")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--label_column", default="label")
    parser.add_argument(
        "--language",
        default="en",
        help="Of the column of this name; the recogniser knows English alone.",
    )
    add_sampling_arguments(parser, num_samples=95)
    add_report_arguments(parser)
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    folder = report_folder(args)
    files = {ending: folder / f"evaluation_speech.{ending}" for ending in ("json", "md", "png")}
    for file in files.values():
        check_output_file("output_dir", file)
    pipeline = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path).to(args.device)
    check_colours(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    segments = pipeline._segments
    pictures = next((one for one in segments.values() if one.output_field == "images"), None)
    resolution = None if pictures is None else pictures.shape[0] * pictures.vq.downsample_factor
    data = SpeechData.load(args, resolution, pipeline.config.resize_mode)
    report = measure_speech(pipeline, data, args)
    write_report(folder, "evaluation_speech", report.figures)
    draw_rows(report.rows, args.font).save(files["png"])
    for index, (caption, sound) in enumerate(report.said):
        file = folder / f"evaluation_speech-{index}.wav"
        save_generated(sound, file, sampling_rate=report.sampling_rate, model_id=folder.name, description=caption)
    for file in folder.glob("evaluation_speech-*.wav"):  # of an earlier run that said more
        number = re.fullmatch(r"evaluation_speech-(0|[1-9][0-9]*)\.wav", file.name)
        if number is not None and int(number[1]) >= len(report.said) and file.is_file():
            file.unlink()
    print(files["md"].read_text())


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
