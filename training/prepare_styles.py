#!/usr/bin/env python
"""Build the dataset of the 64 px starter: emoji in two styles and in many people's words, as one parquet file.

    python training/prepare_styles.py --output_file outputs/styles.parquet

Takes a minute or two and needs ``npm``, ``datasets`` and ``pillow``. The same versions give the same rows.

Sources: the rows of ``prepare_emoji.py`` (Noto Emoji, flat drawings); the pictures of ``prepare_pairs.py`` (Fluent
Emoji in 3D style); and the tags and the shortcodes of GitHub, Slack (iamcal), CLDR, emojibase and
JoyPixels in the npm package ``emojibase-data`` 17.0.0 (MIT).

Each emoji has a row for each of its pictures. Columns: ``image``; ``source`` (the same emoji in the other style; where
there is none, or training must not see it, the picture itself); ``style`` ("flat" or "3d"); ``text``, ``text_zh``,
``phrase`` and ``keywords`` as in the emoji dataset, those of 3D pictures followed by ", 3d" or "，立体"; ``wording_1``
to ``wording_4`` (other wordings: shortcodes as words, without accents, commas or articles, in the plural, the skin
tone before or after); ``words_1`` to ``words_16`` (words of its names, tags and wordings in any order, one to six, so
many that they mean this emoji alone where that can be, some with another ending or written together; the published
starter had none of them); ``unseen`` (a wording of JoyPixels whose words are those of none of these, of this emoji
alone, or ""; to judge with, never trained on); ``label``, ``skin_tone``, ``emoji``, ``split`` and ``held_out``.

The split is that of the emoji dataset, and of the 3D pictures that are left 1 in 16 is held out too (``held_out =
"style"``): training saw the emoji flat and the style on others.
"""

import argparse
import io
import random
import re
import tarfile
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

from datasets import Dataset, Features, Image, Value, load_dataset
from PIL import Image as PILImage
from prepare_emoji import NAMES, key, read_json
from prepare_pairs import PICTURES, on_white, png, read_fluent

from diffusers_vqdit.training.draws import fraction
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.npm_packages import open_package
from diffusers_vqdit.utils.arguments import argument_parser, output_path, positive_integer
from diffusers_vqdit.utils.told_errors import told_errors
from diffusers_vqdit.utils.weight_files import replacing_file


TRAINED_WORDINGS = ("github", "iamcal", "cldr", "emojibase")
JUDGED_WORDINGS = "joypixels"
NUM_WORDINGS, NUM_SELECTIONS, MOST_WORDS = 4, 16, 6
ENDINGS = ("", "s", "ing", "ed", "er")
SPOKEN = ("text", "text_zh", "phrase", "keywords")
SUFFIXES = {"text_zh": "，立体"}  # of the captions of 3D pictures; the others have ", 3d"
TONE = re.compile("-1F3F[B-F]")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Build the dataset of the 64 px starter.")
    parser.add_argument("--emoji_file", default="training/data/emoji.parquet", help="What prepare_emoji.py wrote.")
    parser.add_argument("--size", type=positive_integer, default=64, help="Side of the pictures, in pixels.")
    parser.add_argument("--output_file", type=output_path, default=Path("outputs/styles.parquet"))
    parser.add_argument("--download_dir", type=Path, default=None, help="Folder with the packages already fetched.")
    return parser.parse_args(input_args)


def plain(text: str) -> str:
    """Small letters and single spaces, without accents, commas, articles and other signs."""
    letters = unicodedata.normalize("NFKD", text.lower().replace("&", " and "))
    kept = "".join(c for c in letters if not unicodedata.combining(c))
    words = re.sub(r"[^a-z0-9]+", " ", kept).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def shortcodes(archive: tarfile.TarFile, sets: tuple[str, ...]) -> dict[str, list[str]]:
    """Plain wordings of each emoji without a skin tone, by its code points."""
    found: dict[str, list[str]] = {}
    for name in sets:
        for code, words in read_json(archive, f"en/shortcodes/{name}.json").items():
            known = found.setdefault(key(code), [])
            for word in [words] if isinstance(words, str) else words:
                if len(worded := plain(word)) > 2 and worded not in known:
                    known.append(worded)
    return found


def toned(words: str, tone: str, order: int) -> str:
    """A wording with its skin tone, in one of four orders; without a tone as it is, with "the", or in the plural."""
    if not tone:
        return [words, f"the {words}", words if words.endswith("s") else f"{words}s", words][order]
    named = " and ".join(tone.split("+"))
    return [
        f"{words} with {named} skin tone",
        f"{named} skin tone {words}",
        f"{words} {named} skin",
        f"{named} skinned {words}",
    ][order]


def other_wordings(row: dict, words: list[str], code: str) -> list[str]:
    """`NUM_WORDINGS` wordings of a row, of as many words and orders as there are."""
    name = plain(row["text"].split(",")[0]) if row["skin_tone"] else plain(row["text"])
    words = list(dict.fromkeys([*words, name])) or [name]
    start = int(fraction("wording " + code) * len(words))
    return [
        toned(words[(start + index) % len(words)], row["skin_tone"], (index + start) % 4)
        for index in range(NUM_WORDINGS)
    ]


def words_of_emoji(bases: list[str], emoji: list[dict], names: tarfile.TarFile) -> dict[str, set[str]]:
    """All words that are said of each emoji without a skin tone, but those of the judged wordings alone."""
    words = {code: set(" ".join(known).split()) for code, known in shortcodes(names, TRAINED_WORDINGS).items()}
    tags = {key(entry["hexcode"]): entry.get("tags", []) for entry in read_json(names, "en/data.json")}
    for base, row in zip(bases, emoji, strict=True):
        told = [row["text"].split(",")[0]] if row["skin_tone"] else [row["text"], row["phrase"], row["keywords"]]
        words.setdefault(base, set()).update(plain(" ".join([*told, *tags.get(base, [])])).split())
    return words


def reworded(word: str, generator: random.Random) -> str:
    """One word in ten with another ending."""
    stem = next((word.removesuffix(end) for end in ENDINGS[1:] if word.endswith(end)), word)
    return stem + generator.choice(ENDINGS) if len(stem) > 2 and generator.random() < 0.1 else word


def selections(words: set[str], means: dict[str, set[str]], refused: set[frozenset], seed: str) -> list[str]:
    """`NUM_SELECTIONS` times some of an emoji's words, as few as mean it alone, or `MOST_WORDS`; of one in ten the
    first two are written together.

    Args:
        means: the emoji that each word is said of.
        refused: the judged wordings, whose words are not all of a selection's where others can be.
    """
    generator, found = random.Random(seed), []
    for _ in range(NUM_SELECTIONS):
        order, least = generator.sample(sorted(words), len(words)), generator.randint(1, 3)
        for count in range(min(least, len(order)), min(MOST_WORDS, len(order)) + 1):
            chosen = order[:count]
            alone = len(set.intersection(*(means[word] for word in chosen))) == 1
            if alone and frozenset(chosen) not in refused:
                break
        joined = " ".join(reworded(word, generator) for word in chosen)
        found.append(joined.replace(" ", "", 1) if generator.random() < 0.1 else joined)
    return found


def rows(emoji: Dataset, fluent: dict[str, PILImage.Image], names: tarfile.TarFile, size: int) -> list[dict]:
    """The flat picture and the 3D picture of each emoji, in the order of the emoji dataset."""
    trained, judged = shortcodes(names, TRAINED_WORDINGS), shortcodes(names, (JUDGED_WORDINGS,))
    taken = Counter(word for known in judged.values() for word in known)
    taken.update(word for known in trained.values() for word in known)
    table = list(emoji.cast_column("image", Image(decode=False)))
    bases = [key(TONE.sub("", Path(row["image"]["path"]).stem.upper())) for row in table]
    words, means = words_of_emoji(bases, table, names), {}
    for base in bases:
        for word in words[base]:
            means.setdefault(word, set()).add(base)
    out = []
    for base, row in zip(bases, table, strict=True):
        picture = row.pop("image")
        name = Path(picture["path"]).stem
        flat, solid = PILImage.open(io.BytesIO(picture["bytes"])), fluent.get(key(name))
        row |= {
            f"wording_{index + 1}": words
            for index, words in enumerate(other_wordings(row, trained.get(base, []), key(name)))
        }
        refused = {frozenset(one.split()) for one in judged.get(base, [])}
        for index, chosen in enumerate(selections(words[base], means, refused, f"words {name}")):
            row[f"words_{index + 1}"] = toned(chosen, row["skin_tone"], index % 4) if row["skin_tone"] else chosen
        told = [plain(text) for column, text in row.items() if column not in ("text_zh", "label", "emoji")]
        known = {frozenset(text.split()) for text in told}  # the same words in another order are not new
        new = [one for one in judged.get(base, []) if taken[one] == 1 and frozenset(one.split()) not in known]
        row["unseen"] = new[0] if new and not row["skin_tone"] else ""
        pictures = {"flat": png(on_white(flat, size), f"{name}-flat")}
        if solid is not None:
            pictures["3d"] = png(solid, f"{name}-3d")
        held = "3d" in pictures and row["split"] == "train" and fraction("style " + name) < 1 / 16
        for style, image in pictures.items():
            # No training row shows a held-out picture, not even as what is given.
            others = [other for which, other in pictures.items() if which != style and not (held and style == "flat")]
            made = dict(row)
            if style == "3d":
                spoken = [one for one in row if one in SPOKEN or one.startswith(("wording_", "words_"))]
                made |= {column: row[column] + SUFFIXES.get(column, ", 3d") for column in spoken}
                made["unseen"] = ""
                if held:
                    made |= {"split": "test", "held_out": "style"}
            out.append({"image": image, "source": others[0] if others else image, "style": style, **made})
    return out


def main(args: argparse.Namespace) -> None:
    check_output_file("output_file", args.output_file)
    emoji = load_dataset("parquet", data_files=args.emoji_file, split="train")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.download_dir or Path(temporary)
        with open_package(PICTURES, folder) as pictures, open_package(NAMES, folder) as names:
            table = rows(emoji, read_fluent(pictures, args.size), names, args.size)
    strings = {name: Value("string") for name in table[0] if name not in ("image", "source")}
    dataset = Dataset.from_list(table, features=Features({"image": Image(), "source": Image(), **strings}))
    with replacing_file(args.output_file) as unfinished:
        dataset.to_parquet(unfinished)
    print(f"{args.output_file}: {len(table)} pictures, {args.output_file.stat().st_size / 2**20:.1f} MiB")
    for (style, held), count in sorted(Counter((row["style"], row["held_out"]) for row in table).items()):
        print(f"  {style}, {'test, held-out ' + held if held else 'train'}: {count}")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
