#!/usr/bin/env python
"""Build pairs of pictures, as one parquet file: each emoji drawn in two styles, with its outlines and its caption.

    python training/prepare_pairs.py --output_file outputs/pairs.parquet

Takes a minute or two and needs ``npm``, ``datasets`` and ``pillow``. The same versions give the same rows.

Sources: the rows of ``prepare_emoji.py`` (Noto Emoji, flat drawings), and the npm package
``@lobehub/fluent-emoji-3d`` 1.1.0 (Fluent Emoji by Microsoft in 3D style, 256 px, MIT), matched by code points. In
288 of its 304 emoji with skin tones, medium-light and medium are exchanged: of these two pictures the brighter is
taken for medium-light. The tones of "person mountain biking" are in another order, and left out.

Columns: ``source`` (the Noto picture), ``image`` (the Fluent picture of the same emoji), ``edges`` (the outlines of
``image``, black on white), all RGB of ``--size`` pixels a side with transparent pixels on white; and ``text``,
``text_zh``, ``phrase``, ``keywords``, ``label``, ``skin_tone``, ``emoji``, ``split`` and ``held_out`` as they stand in
the emoji dataset, whose held-out emoji so stay held out.

    train                         3,112 pairs
    test, held-out composition      185
    test, held-out picture           70
"""

import argparse
import io
import re
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, load_dataset
from PIL import Image as PILImage
from prepare_emoji import key

from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.npm_packages import open_package
from diffusers_vqdit.utils.arguments import argument_parser, output_path, positive_integer
from diffusers_vqdit.utils.told_errors import told_errors
from diffusers_vqdit.utils.weight_files import replacing_file


PICTURES = "@lobehub/fluent-emoji-3d@1.1.0"
MEDIUM_LIGHT, MEDIUM = "1F3FC", "1F3FD"
MIXED_UP = re.compile("1F6B5-1F3F[B-F]")  # person mountain biking: skin tone
CONTRAST = 2.0


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Build pairs of emoji pictures in two styles.")
    parser.add_argument("--emoji_file", default="training/data/emoji.parquet", help="What prepare_emoji.py wrote.")
    parser.add_argument("--size", type=positive_integer, default=64, help="Side of the pictures, in pixels.")
    parser.add_argument("--output_file", type=output_path, default=Path("outputs/pairs.parquet"))
    parser.add_argument("--download_dir", type=Path, default=None, help="Folder with the package already fetched.")
    return parser.parse_args(input_args)


def on_white(picture: PILImage.Image, size: int) -> PILImage.Image:
    """The picture with its transparent pixels white, `size` pixels a side."""
    picture = picture.convert("RGBA")
    white = PILImage.new("RGBA", picture.size, (255, 255, 255, 255))
    return PILImage.alpha_composite(white, picture).convert("RGB").resize((size, size), PILImage.Resampling.LANCZOS)


def edges(picture: PILImage.Image) -> PILImage.Image:
    """The outlines of an RGB picture, black on white: 255 less `CONTRAST` times the magnitude of the Sobel gradient in
    the channel where it is largest, cut at 0."""
    padded = np.pad(np.asarray(picture, dtype=np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth_y = padded[:-2] + 2 * padded[1:-1] + padded[2:]  # (H, W + 2, 3)
    smooth_x = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]  # (H + 2, W, 3)
    magnitude = np.hypot(smooth_y[:, 2:] - smooth_y[:, :-2], smooth_x[2:] - smooth_x[:-2]) / 8  # (H, W, 3)
    lines = 255 - CONTRAST * magnitude.max(axis=2)
    return PILImage.fromarray(lines.clip(0, 255).round().astype(np.uint8)).convert("RGB")


def png(picture: PILImage.Image, name: str) -> dict[str, bytes | str]:
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return {"bytes": out.getvalue(), "path": f"{name}.png"}


def read_fluent(archive: tarfile.TarFile, size: int) -> dict[str, PILImage.Image]:
    """The package's pictures by code points, each with the skin tone that it shows."""
    found = {}
    for member in archive.getmembers():
        name = key(Path(member.name).stem)
        if member.name.startswith("package/assets/") and not MIXED_UP.fullmatch(name):
            found[name] = on_white(PILImage.open(archive.extractfile(member)), size)
    for name in [name for name in found if MEDIUM_LIGHT in name]:
        other = name.replace(MEDIUM_LIGHT, MEDIUM)
        if other in found:
            pair = found[name], found[other]
            found[other], found[name] = sorted(pair, key=lambda picture: np.asarray(picture).mean())
    return found


def rows(emoji: Dataset, pictures: dict[str, PILImage.Image], size: int) -> list[dict]:
    """One row for each emoji that has both pictures, in the order of the emoji dataset."""
    out = []
    for row in emoji.cast_column("image", Image(decode=False)):
        noto = row.pop("image")
        name = Path(noto["path"]).stem
        image = pictures.get(key(name))
        if image is not None:
            source = on_white(PILImage.open(io.BytesIO(noto["bytes"])), size)
            both = {"source": png(source, name), "image": png(image, name)}
            out.append({**both, "edges": png(edges(image), name), **row})
    return out


def main(args: argparse.Namespace) -> None:
    check_output_file("output_file", args.output_file)
    emoji = load_dataset("parquet", data_files=args.emoji_file, split="train")
    with tempfile.TemporaryDirectory() as temporary:
        with open_package(PICTURES, args.download_dir or Path(temporary)) as pictures:
            table = rows(emoji, read_fluent(pictures, args.size), args.size)
    strings = {name: kind for name, kind in emoji.features.items() if name != "image"}
    dataset = Dataset.from_list(
        table, features=Features({"source": Image(), "image": Image(), "edges": Image(), **strings})
    )
    with replacing_file(args.output_file) as unfinished:
        dataset.to_parquet(unfinished)
    print(f"{args.output_file}: {len(table)} pairs, {args.output_file.stat().st_size / 2**20:.1f} MiB")
    for held in ("", "composition", "picture"):
        count = sum(row["held_out"] == held for row in table)
        print(f"  {'train' if not held else 'test, held-out ' + held}: {count}")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
