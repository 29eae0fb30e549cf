#!/usr/bin/env python
"""Build the starter dataset: Noto Emoji pictures with English and Chinese captions, as one parquet file.

    python training/prepare_emoji.py --output_file training/data/emoji.parquet

Takes about a minute and needs ``npm``, ``datasets`` and ``pillow``. The same package versions give the same rows.

Sources, fetched with ``npm pack``:

* ``emoji-datasource-google`` 16.0.0: Noto Emoji pictures, 64 px (Apache-2.0; the packaging is MIT).
* ``emojibase-data`` 17.0.0: CLDR names, keywords and groups in English and Chinese (MIT; CLDR data: Unicode licence).

Columns: ``image`` (64 x 64 RGB, transparent pixels on white), ``text`` (English name), ``text_zh`` (Chinese name),
``phrase`` (the English name as one would say it, "an astronaut with dark skin tone"), ``keywords`` (the first four
English keywords and the skin tone, comma-separated), ``label`` (one of ten categories), ``skin_tone`` ("" or one or
two tones), ``emoji`` (the base emoji, without its skin tone: the *role*), ``split`` and ``held_out``.

The split is by composition and depends on the emoji's code points alone. A picture with a skin tone goes to ``test``
with probability 1/8 (``held_out = "composition"``): its role and its tone occur in ``train``, never together, so
neither the English, the Chinese nor the keyword caption has been seen. At most one tone of a role with five is held
out, so that every role stays well covered. Of the other pictures, which no one could guess, 1 in 25 goes to ``test``
as well (``held_out = "picture"``): these measure tokenizers and classification, not generation.

    train                         3,479 pictures
    test, held-out composition      236
    test, held-out picture           71
"""

import argparse
import io
import json
import tarfile
import tempfile
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from diffusers_vqdit.training.draws import fraction
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.npm_packages import open_package
from diffusers_vqdit.utils.arguments import argument_parser, output_path
from diffusers_vqdit.utils.told_errors import told_errors
from diffusers_vqdit.utils.weight_files import replacing_file


PICTURES = "emoji-datasource-google@16.0.0"
NAMES = "emojibase-data@17.0.0"
MAX_KEYWORDS = 4
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def parse_args() -> argparse.Namespace:
    parser = argument_parser("Build the emoji starter dataset from two npm packages.")
    parser.add_argument("--output_file", type=output_path, default=Path("training/data/emoji.parquet"))
    parser.add_argument("--download_dir", type=Path, default=None, help="Folder with the packages already fetched.")
    return parser.parse_args()


def read_json(archive: tarfile.TarFile, name: str) -> list | dict:
    return json.load(archive.extractfile(f"package/{name}"))


def key(hexcode: str) -> str:
    """Code points without the variation selector, which the two packages don't set alike."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def skin_tone(skin: dict) -> str:
    tones = skin.get("tone", [])
    return "+".join(TONES[tone - 1] for tone in (tones if isinstance(tones, list) else [tones]))


def caption(label: str, comma: str) -> str:
    """CLDR writes "astronaut: dark skin tone"; a colon stays only where it names a kind ("flag: France")."""
    if "肤色" in label or "skin tone" in label:
        return label.replace(": ", comma)
    return label.replace(": ", "：") if comma == "，" else label


def phrase(name: str, tone: str) -> str:
    """The English name as it is said in a sentence."""
    kind, _, detail = name.partition(": ")
    first = kind.split()[0]
    if kind == "flag":
        spoken = f"the flag of {detail}"
    elif detail or first in ("men", "women", "people") or first.endswith("s"):
        spoken = name.replace(": ", ", ")
    else:
        spoken = f"{'an' if first[0].lower() in 'aeiou' else 'a'} {name}"
    if tone:
        spoken += " with " + " and ".join(tone.split("+")) + " skin tone"
    return spoken


def on_white(data: bytes) -> bytes:
    picture = PILImage.open(io.BytesIO(data)).convert("RGBA")
    white = PILImage.new("RGBA", picture.size, (255, 255, 255, 255))
    out = io.BytesIO()
    PILImage.alpha_composite(white, picture).convert("RGB").save(out, format="PNG", optimize=True)
    return out.getvalue()


def rows(pictures: tarfile.TarFile, names: tarfile.TarFile) -> list[dict]:
    """One row for each picture that has a name and a category in both languages, in CLDR order."""
    files = {key(Path(m.name).stem): m for m in pictures.getmembers() if m.name.startswith("package/img/google/64/")}
    groups = {group["order"]: group["message"] for group in read_json(names, "en/messages.json")["groups"]}
    chinese = {}
    for entry in read_json(names, "zh/data.json"):
        for each in [entry, *entry.get("skins", [])]:
            chinese[key(each["hexcode"])] = each["label"]

    out = []
    for base in sorted(read_json(names, "en/data.json"), key=lambda entry: entry.get("order", 1 << 30)):
        if "group" not in base:  # bare regional indicators: letters, no pictures of anything
            continue
        skins = [skin for skin in base.get("skins", []) if key(skin["hexcode"]) in files]
        # The tone of a five-tone role that is held out, if any; a pair of tones is drawn for itself.
        drawn = fraction("role " + base["hexcode"])
        held_tone = TONES[int(drawn * 8)] if drawn < 5 / 8 else None
        for each in [base, *skins]:
            name = key(each["hexcode"])
            if name not in files or name not in chinese:
                continue
            tone = skin_tone(each) if each is not base else ""
            if "+" in tone:
                held = "composition" if fraction("pair " + name) < 1 / 8 else ""
            elif tone:
                held = "composition" if tone == held_tone else ""
            else:
                held = "picture" if fraction("picture " + name) < 1 / 25 and not skins else ""
            keywords = base.get("tags", [])[:MAX_KEYWORDS] or [base["label"]]
            tone_words = [f"{t} skin tone" for t in dict.fromkeys(tone.split("+"))] if tone else []
            out.append(
                {
                    "image": {
                        "bytes": on_white(pictures.extractfile(files[name]).read()),
                        "path": f"{name.lower()}.png",
                    },
                    "text": caption(each["label"], ", "),
                    "text_zh": caption(chinese[name], "，"),
                    "phrase": phrase(base["label"], tone),
                    "keywords": ", ".join(keywords + tone_words),
                    "label": groups[base["group"]],
                    "skin_tone": tone,
                    "emoji": base["emoji"],
                    "split": "test" if held else "train",
                    "held_out": held,
                }
            )
    return out


def main(args: argparse.Namespace) -> None:
    check_output_file("output_file", args.output_file)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.download_dir or Path(temporary)
        with open_package(PICTURES, folder) as pictures, open_package(NAMES, folder) as names:
            table = rows(pictures, names)
    strings = ["text", "text_zh", "phrase", "keywords", "label", "skin_tone", "emoji", "split", "held_out"]
    features = Features({"image": Image(), **{name: Value("string") for name in strings}})
    dataset = Dataset.from_list(table, features=features)
    with replacing_file(args.output_file) as unfinished:
        dataset.to_parquet(unfinished)
    print(f"{args.output_file}: {len(table)} pictures, {args.output_file.stat().st_size / 2**20:.1f} MiB")
    for held in ("", "composition", "picture"):
        count = sum(row["held_out"] == held for row in table)
        print(f"  {'train' if not held else 'test, held-out ' + held}: {count}")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
