#!/usr/bin/env python
"""Build a dataset of spoken captions with their texts and pictures, as one parquet file.

    apt-get install espeak-ng
    python training/prepare_speech.py --output_file outputs/speech.parquet

speaks the captions of the emoji dataset, English and Chinese, in several voices and speeds, as a formant synthesiser
does; what it says is nobody's. Takes ten minutes of one core. With

    apt-get install tuxpaint-stamps-default
    python training/prepare_speech.py --stamps_dir /usr/share/tuxpaint/stamps --languages ro es ru fr \
        --output_file outputs/stamps.parquet

the captions are those of Debian's drawings for Tux Paint, read aloud by people: ``NAME_desc_LANGUAGE.ogg`` beside
``NAME.txt``, with the caption of that language, and ``NAME.png`` where the drawing is one (a sixth are SVG alone and
have no picture). ``--sound_effects`` adds ``NAME.ogg``, what 135 of the things sound like, with the English caption.
They are under the GPL-2, and so is the table made of them: it isn't this project's to give away.

Columns: ``audio`` (FLAC, one channel, ``--sampling_rate``), ``text`` (what is said), ``speech`` (the same in one voice
a language, or in a second one where the first is held out, for a model that hears many; not of stamps), ``image``,
``language`` (``effect`` of a sound effect), ``voice``, ``emoji`` (of stamps their file's name), ``label``, ``split``
and ``held_out``. By caption and voice alone, 1 in 25 goes to ``test`` (``held_out = "pair"``): the caption occurs in
``train`` in other voices, and the voice with other captions. All that the last voice of each language says is in
``test`` (``"voice"``): of what training says 1 caption in 25, or ``--unheard_voice_share``, which adds rows and leaves
all others as they are. So is what the emoji dataset holds out (``"composition"`` and ``"picture"``). Of stamps 1 in 10
is held out (``"picture"``).
"""

import argparse
import io
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Features, Image, Value, load_dataset

from diffusers_vqdit.training.draws import fraction
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    integer,
    output_path,
    positive_integer,
    refuse_unused,
    share,
)
from diffusers_vqdit.utils.sounds import read_sound
from diffusers_vqdit.utils.told_errors import told_errors
from diffusers_vqdit.utils.weight_files import replacing_file


# espeak-ng's voices and words a minute. Four speak, or as many of the first as are asked for; the last of each
# language is in no training row.
VOICES = {
    "en": [
        ("en-us", 160), ("en-us+f3", 145), ("en-gb+m3", 170), ("en-gb-scotland+f2", 155),
        ("en-us+m1", 150), ("en-gb+f4", 165), ("en-029+m5", 160), ("en-gb-x-rp+f5", 150),
        ("en-us+m8", 175), ("en-gb-scotland+m4", 145), ("en-us+Annie", 160), ("en-gb-x-rp+m6", 155),
        ("en-us-nyc+m7", 150),
    ],
    "zh": [
        ("cmn", 160), ("cmn+f3", 145), ("cmn+m3", 170), ("cmn+f2", 155),
        ("cmn+m1", 150), ("cmn+f4", 165), ("cmn+m5", 160), ("cmn+f5", 150),
        ("cmn+m8", 175), ("cmn+m4", 145), ("cmn+Annie", 160), ("cmn+m6", 155),
        ("cmn+m7", 150),
    ],
}  # fmt: skip
CAPTIONS = {"en": "text", "zh": "text_zh"}
HELD_OUT_PAIRS, HELD_OUT_STAMPS = 1 / 25, 1 / 10
MAX_FLAC_RATE = 655_350  # the highest that a FLAC file has
EFFECT = "effect"  # as a language, of sounds that say nothing
COLUMNS = ("text", "language", "voice", "emoji", "label", "split", "held_out")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Build a dataset of spoken captions.")
    parser.add_argument("--emoji_file", default="training/data/emoji.parquet", help="What prepare_emoji.py wrote.")
    parser.add_argument("--stamps_dir", type=Path, help="Tux Paint's stamps, in place of the emoji and espeak-ng.")
    parser.add_argument(
        "--languages", nargs="+", help="By default en and zh, of stamps all those with more than 500 recordings."
    )
    parser.add_argument(
        "--voices_per_caption",
        type=integer(1, min(map(len, VOICES.values())) - 1),
        default=2,
        help="Voices of training that say a caption.",
    )
    parser.add_argument(
        "--renditions", type=positive_integer, default=1, help="Times that a voice says a caption of training."
    )
    parser.add_argument(
        "--unheard_voice_share",
        type=share,
        default=HELD_OUT_PAIRS,
        help="Of the captions of training, those that the last voice of each language says, for the test split alone.",
    )
    parser.add_argument("--sound_effects", action="store_true", help="Of stamps, too, with the English captions.")
    parser.add_argument("--labels", nargs="+", help="Emoji of these groups, such as 'food & drink'; by default all.")
    parser.add_argument("--sampling_rate", type=integer(1, MAX_FLAC_RATE), default=11025)
    parser.add_argument("--max_captions", type=positive_integer, help="The first so many; by default all.")
    parser.add_argument("--output_file", type=output_path, default=Path("outputs/speech.parquet"))
    args = parser.parse_args(input_args)
    if args.stamps_dir is None and (unknown := sorted(set(args.languages or []) - set(VOICES))):
        parser.error(f"--languages {unknown}: espeak-ng speaks the captions in {list(VOICES)}")
    of_emoji = ("emoji_file", "voices_per_caption", "renditions", "unheard_voice_share", "labels")
    if args.stamps_dir is not None:
        refuse_unused(parser, args, dict.fromkeys(of_emoji, "with --stamps_dir"))
    else:
        refuse_unused(parser, args, {"sound_effects": "without --stamps_dir"})
    return args


def flac(value: Any, sampling_rate: int, name: str) -> dict[str, Any]:
    """A sound as `datasets` keeps it: a file of one channel, at this rate."""
    out = io.BytesIO()
    soundfile.write(out, read_sound(value, sampling_rate), sampling_rate, format="FLAC", subtype="PCM_16")
    return {"bytes": out.getvalue(), "path": f"{name}.flac"}


def speak(text: str, voice: str, speed: int, pitch: int) -> dict[str, Any]:
    """What espeak-ng says, at `speed` words a minute and a `pitch` of 0 to 99."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", "--", text]
    spoken = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    # Written to a pipe, its header says that it is endless.
    samples, rate = soundfile.read(
        io.BytesIO(spoken[44:]), format="RAW", subtype="PCM_16", channels=1, samplerate=22050
    )
    return {"array": samples, "sampling_rate": rate}


def manner(text: str, voice: str, speed: int, rendition: int) -> tuple[str, int, int]:
    """Voice, speed and pitch of a rendition: the first is as the table says, others within 15 % and 25 of it."""
    if rendition == 0:
        return voice, speed, 50
    faster, higher = (2 * fraction(what, text, voice, str(rendition)) - 1 for what in ("speed", "pitch"))
    return voice, round(speed * (1 + 0.15 * faster)), round(50 + 25 * higher)


def spoken_captions(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    emoji = load_dataset("parquet", data_files=args.emoji_file, split="train").cast_column(
        "image", Image(decode=False)
    )
    if unknown := sorted(set(args.labels or []) - (there := set(emoji["label"]))):
        raise ValueError(f"labels={unknown} are none of {args.emoji_file!r}, whose are {sorted(there)}")
    if args.labels is not None:
        emoji = emoji.select([row for row, label in enumerate(emoji["label"]) if label in args.labels])
    if args.max_captions is not None:
        emoji = emoji.select(range(min(args.max_captions, len(emoji))))
    for row in emoji:
        for language in args.languages or list(VOICES):
            text, (*voices, last) = row[CAPTIONS[language]], VOICES[language]
            voices = voices[: max(4, args.voices_per_caption)]
            voices.sort(key=lambda voice: fraction(text, *map(str, voice)))
            # Of a caption's voices one at most, so that training has it in another.
            pair = voices[0] if fraction("pair", text) < HELD_OUT_PAIRS * args.voices_per_caption else None
            pair = pair if args.voices_per_caption > 1 else None
            chosen = voices[: args.voices_per_caption]
            unheard = row["split"] == "test" or fraction(text, last[0]) < args.unheard_voice_share
            chosen += [last] if unheard else []
            # One voice a language speaks, but not what it's to be heard saying for the first time in the test split.
            speaker = next(voice for voice in VOICES[language] if voice != pair)
            speech = flac(speak(text, *manner(text, *speaker, 0)), args.sampling_rate, "speech")
            for voice in chosen:
                held = row["held_out"] or ("voice" if voice == last else "pair" if voice == pair else "")
                kept = {"text": text, "speech": speech, "language": language, "voice": voice[0], "held_out": held}
                kept |= {name: row[name] for name in ("image", "emoji", "label")}
                for rendition in range(1 if held else args.renditions):
                    said = speak(text, *manner(text, *voice, rendition))
                    yield {"audio": said, **kept, "split": "test" if held else "train"}


def stamp_captions(path: Path) -> dict[str, str]:
    """The captions of a stamp by language; the first line of its text is the English one."""
    first, *others = path.read_text(encoding="utf-8").splitlines() or [""]
    found = dict(line.split(".utf8=", 1) for line in others if ".utf8=" in line)
    return {language: text.strip() for language, text in {"en": first, **found}.items() if text.strip()}


def stamps(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each recording of a caption, and sound effects where they are asked for, with the picture where that is a PNG
    file."""
    files = sorted(args.stamps_dir.rglob("*.txt"))
    spoken = [(path, sound) for path in files for sound in sorted(path.parent.glob(f"{path.stem}_desc*.ogg"))]
    of = {sound: sound.stem.removeprefix(f"{path.stem}_desc").removeprefix("_") or "en" for path, sound in spoken}
    counts = Counter(of.values())
    languages = args.languages or [language for language, count in counts.items() if count > 500]
    if args.sound_effects:
        effects = {sound: path for path in files if (sound := path.with_suffix(".ogg")).is_file()}
        spoken += [(path, sound) for sound, path in effects.items()]
        of, languages = of | dict.fromkeys(effects, EFFECT), [*languages, EFFECT]
    said = [
        (path, sound, stamp_captions(path).get("en" if of[sound] == EFFECT else of[sound])) for path, sound in spoken
    ]
    known = [one for one in said if of[one[1]] in languages and one[2] is not None]
    for path, sound, text in known[: args.max_captions]:
        language, picture = of[sound], path.with_suffix(".png")
        held = "picture" if fraction(path.stem) < HELD_OUT_STAMPS else ""
        yield {
            "audio": str(sound),
            "text": text,
            "image": {"bytes": picture.read_bytes(), "path": picture.name} if picture.is_file() else None,
            "language": language,
            "voice": "sound effect" if language == EFFECT else f"reader of {language}",
            "emoji": path.stem,
            "label": path.relative_to(args.stamps_dir).parts[0],
            "split": "test" if held else "train",
            "held_out": held,
        }


def main(args: argparse.Namespace) -> None:
    check_output_file("output_file", args.output_file)
    rows, failed = [], 0
    for row in spoken_captions(args) if args.stamps_dir is None else stamps(args):
        try:
            rows.append({**row, "audio": flac(row["audio"], args.sampling_rate, f"{len(rows):06d}")})
        except ValueError:  # a broken recording
            failed += 1
    if not rows:
        raise ValueError(f"stamps_dir={str(args.stamps_dir)!r} has no recordings of captions")
    sounds = dict.fromkeys(("audio", "speech") if args.stamps_dir is None else ("audio",), Audio(args.sampling_rate))
    features = Features({**sounds, "image": Image(), **{name: Value("string") for name in COLUMNS}})
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    with replacing_file(args.output_file) as unfinished:
        pq.write_table(table, unfinished, row_group_size=1000)  # `datasets` would encode the sounds once more
    size = args.output_file.stat().st_size / 2**20
    print(f"{args.output_file}: {len(rows)} sounds, {size:.1f} MiB; {failed} could not be read")
    for held, count in sorted(Counter(row["held_out"] for row in rows).items()):
        print(f"  {'test, held-out ' + held if held else 'train'}: {count}")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
