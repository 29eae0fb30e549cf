#!/usr/bin/env python
"""Teach the 32 px starter your own voice: from a folder of recordings to a pipeline that speaks and listens.

    pip install -c constraints.txt -e ".[training,audio]"
    python examples/your_own_voice.py --recordings my_recordings --output_dir outputs/my_voice

The folder has a ``metadata.csv`` of ``file_name,text`` beside its files. Without ``--recordings`` a voice of
``espeak-ng`` (``apt-get install espeak-ng``) stands for yours and reads 60 captions of the emoji dataset aloud.

A segment ``audio``, the codes of an audio codec, is added to the starter, and all of it is trained to speak, to write
down and to babble. Then it says texts, into WAV files whose metadata say that they are generated, listens to the
recordings, and prints what it heard. With ``pip install pocketsphinx`` and English texts a recogniser judges too,
which chooses among the texts of all recordings.

With a voice of espeak-ng and the defaults, some eleven minutes of one CPU core, pocketsphinx recognises 57 of 58
texts that it says (56 of the recordings), and it writes down 57 of the 60 recordings exactly. All are texts that it
was trained on: so few recordings can't teach it others.
"""

import argparse
import csv
import subprocess
from pathlib import Path

import torch

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.caption_recogniser import CaptionRecogniser
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    non_negative_integer,
    output_path,
    positive_integer,
)
from diffusers_vqdit.utils.provenance import save_generated
from diffusers_vqdit.utils.told_errors import told_errors


ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = argument_parser(
        "Teach the 32 px starter your own voice, in some eleven minutes of one CPU core. All other flags go to "
        "training/train_vqdit.py, such as --train_batch_size."
    )
    parser.add_argument("--recordings", type=Path, help="Folder of recordings with a metadata.csv of file_name,text.")
    parser.add_argument("--num_recordings", type=positive_integer, default=60, help="Of espeak-ng, in place of yours.")
    parser.add_argument("--say", nargs="+", help="Texts to say; by default those of the first recordings.")
    parser.add_argument(
        "--pretrained_model_name_or_path", type=model_name, default=str(ROOT / "model_cards/vqdit-emoji-32")
    )
    parser.add_argument(
        "--codec",
        type=model_name,
        default=str(ROOT / "model_cards/audio-vq-speech"),
        help="SpectrogramVQModel, or a codec of transformers: a folder or a Hub id.",
    )
    parser.add_argument(
        "--codec_steps", type=non_negative_integer, default=0, help="Steps that the codec is finetuned for first."
    )
    parser.add_argument("--max_train_steps", type=positive_integer, default=1500)
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/my_voice"))
    args, more = parser.parse_known_args()
    args.more = more  # for train_vqdit.py, such as --mixed_precision bf16 --push_to_hub
    return args


def record(folder: Path, count: int) -> Path:
    """Captions read aloud by espeak-ng, as a folder of recordings."""
    rows = load_training_dataset(
        dataset_name=str(ROOT / "training/data/emoji.parquet"), split="train", columns=["text"]
    )
    captions = sorted({text for text in rows["text"] if len(text.split()) <= 2})  # what is short is learned soon
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for index, caption in enumerate(captions[:: max(1, len(captions) // count)][:count]):
            subprocess.run(["espeak-ng", "-v", "en-us", "-w", folder / f"{index}.wav", "--", caption], check=True)
            table.writerow([f"{index}.wav", caption])
    return folder


def launch(script: str, options: dict, more: list[str] | None = None) -> None:
    command = ["accelerate", "launch", str(ROOT / "training" / f"{script}.py"), "--report_to", "none"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run([*command, *(more or [])], check=True)


def train(args: argparse.Namespace, recordings: Path) -> None:
    codec = args.codec
    if args.codec_steps:
        codec = str(args.output_dir / "codec")
        options = {"learning_rate": 3e-4, "max_train_steps": args.codec_steps, "output_dir": codec}
        options |= {"pretrained_model_name_or_path": args.codec, "dataset_name": recordings}
        launch("train_audio_vq", options)
    options = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "dataset_name": recordings,
        "segment": f"audio=audio:audio:{codec}",
        # Writing down is learned in a tenth of the steps that speaking takes; ->audio is for guidance.
        "tasks": "text->audio:6,audio->text:1,->audio:0.5",
        "max_train_steps": args.max_train_steps,
        "train_batch_size": 8,
        "output_dir": args.output_dir,
    }
    launch("train_vqdit", options, ["--use_ema", *args.more])


def speak(pipe: VQDiTPipeline, texts: list[str], folder: Path, model_id: str) -> tuple[list, int]:
    """What the pipeline says, each text from a seed of its own, and its rate; kept as WAV files in a folder."""
    folder.mkdir(exist_ok=True)
    generators = [torch.Generator().manual_seed(index) for index in range(len(texts))]
    spoken = pipe(texts, output="audio", generator=generators)
    for index, (sound, text) in enumerate(zip(spoken.audios, texts, strict=True)):
        path = folder / f"{index}.wav"
        save_generated(sound, path, sampling_rate=spoken.sampling_rate, model_id=model_id, description=text)
    return spoken.audios, spoken.sampling_rate


def judge(texts: list[str], said: dict[str, tuple[list, list[str], int]]) -> None:
    """Print the share of sounds in which pocketsphinx recognises their texts, where it is installed."""
    try:
        recogniser = CaptionRecogniser(texts)
    except (ImportError, ValueError) as error:
        print(f"not judged: {error}")
        return
    for name, (sounds, captions, rate) in said.items():
        known = [(one, text) for one, text in zip(sounds, captions, strict=True) if recogniser.knows(text)]
        hits = sum(recogniser.hears(one, rate, text) for one, text in known)
        print(f"pocketsphinx recognises {hits} of {len(known)} {name}, among {len(recogniser.captions)} texts")


def main(args: argparse.Namespace) -> None:
    recordings = args.recordings or record(args.output_dir / "recordings", args.num_recordings)
    train(args, recordings)
    pipe = VQDiTPipeline.from_pretrained(args.output_dir).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    data = load_training_dataset(dataset_name=str(recordings), split="train", columns=["text"])
    texts, files = list(data["text"]), list(data["audio"])

    spoken, rate = speak(pipe, args.say or texts[:60], args.output_dir / "spoken", args.output_dir.name)
    print(f"{args.output_dir / 'spoken'}: {len(spoken)} WAV files")
    heard = pipe(inputs={"audio": files[:60]}, output="text").texts
    for text, truth in list(zip(heard, texts, strict=False))[:10]:
        print(f"heard: {text}  ({truth})")
    right = sum(text.lower() == truth.lower() for text, truth in zip(heard, texts, strict=False))
    print(f"it writes down {right} of {len(heard)} recordings exactly")
    if args.say is None:
        sounds = pipe._segments["audio"].read(files[:60])
        own = pipe._segments["audio"].beside.sampling_rate
        judge(texts, {"recordings": (sounds, texts[:60], own), "of what it says": (spoken, texts[:60], rate)})


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
