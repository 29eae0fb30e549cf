#!/usr/bin/env python
"""Teach the 32 px starter another style with a LoRA: Twemoji's flat pictures in place of Noto's.

    pip install -c constraints.txt -e ".[training,lora]"
    python examples/lora_style.py --output_dir outputs/twemoji

Trains `training/train_vqdit.py --rank` on Twemoji pictures of emoji that the starter knows. Then draws these emoji,
and others that the LoRA has not seen, at scale 0 and 1 with the same seeds. It prints whether scale 0 is the starter
bit for bit, and the share of pictures that are nearer to Twemoji's picture of their caption than to Noto's, and draws
scale 0, scale 1 and Twemoji above one another in ``lora.png``, half of the columns seen. Needs ``npm``, which fetches
the pictures (61 MB); takes about a quarter of an hour on one CPU core of two that are busy.

To expect: scale 0 is the starter bit for bit; at scale 1 all of 32 captions seen are nearer to Twemoji's picture, and
come out in its style, and 31.2 % of 32 not seen are nearer to it, whose shapes a LoRA of so few pictures spoils (0 %
of either at scale 0). The LoRA has 1.8 MB. What it drew is in ``docs/lora.png``.

Twemoji: copyright Twitter, Inc. and other contributors, CC-BY 4.0 (the npm package `emoji-datasource-twitter`).
"""

import argparse
import importlib.util
import io
import json
import random
import subprocess
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.npm_packages import open_package
from diffusers_vqdit.utils.arguments import argument_parser, model_name, output_path, positive_integer, positive_number
from diffusers_vqdit.utils.decoding import to_pixels
from diffusers_vqdit.utils.told_errors import told_errors


ROOT = Path(__file__).resolve().parent.parent
PICTURES = "emoji-datasource-twitter@16.0.0"


def parse_args() -> argparse.Namespace:
    parser = argument_parser("Teach the 32 px starter another style with a LoRA.")
    parser.add_argument(
        "--pretrained_model_name_or_path", type=model_name, default=str(ROOT / "model_cards/vqdit-emoji-32")
    )
    parser.add_argument("--dataset_name", default=str(ROOT / "training/data/emoji.parquet"))
    parser.add_argument("--num_train_pictures", type=positive_integer, default=80)
    parser.add_argument("--num_test_pictures", type=positive_integer, default=32)
    parser.add_argument("--rank", type=positive_integer, default=16)
    parser.add_argument("--max_train_steps", type=positive_integer, default=600)
    parser.add_argument("--learning_rate", type=positive_number, default=2e-3)
    parser.add_argument("--download_dir", type=Path, help="Folder with the npm package already fetched.")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/twemoji"))
    args, more = parser.parse_known_args()
    args.more = more  # such as --push_to_hub --hub_model_id you/twemoji-lora
    return args


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def prepare(args: argparse.Namespace) -> tuple[Path, dict[str, list[dict]]]:
    """Write the pictures to train on as a folder with metadata.jsonl; return it, and captions to draw."""
    emoji = module("prepare_emoji")
    noto = load_training_dataset(
        dataset_name=args.dataset_name, split="train", image_column="image", columns=["text", "skin_tone", "label"]
    )
    # Without skin tones, so that no two captions are of one picture but for its tone; flags have no style.
    rows = [
        index
        for index, (tone, label) in enumerate(zip(noto["skin_tone"], noto["label"], strict=True))
        if not tone and label not in ("flags", "components")
    ]
    random.Random(0).shuffle(rows)
    folder = args.output_dir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    download_dir = args.download_dir or args.output_dir
    with open_package(PICTURES, download_dir) as archive:
        prefix = "package/img/twitter/64/"
        files = {emoji.key(Path(m.name).stem): m for m in archive.getmembers() if m.name.startswith(prefix)}
        found = []
        for index in rows:
            name = emoji.key(Path(noto[index]["image"]["path"]).stem)
            if name in files:
                data = emoji.on_white(archive.extractfile(files[name]).read())
                found.append({"row": index, "text": noto[index]["text"], "data": data})
            if len(found) == args.num_train_pictures + args.num_test_pictures:
                break
    train, others = found[: args.num_train_pictures], found[args.num_train_pictures :]
    if not others:
        raise ValueError(
            f"num_train_pictures={args.num_train_pictures} must be fewer than the {len(found)} pictures that there are"
        )
    test = [*train[: args.num_test_pictures], *others]
    lines = []
    for entry in train:
        (folder / f"{entry['row']}.png").write_bytes(entry["data"])
        lines.append(json.dumps({"file_name": f"{entry['row']}.png", "text": entry["text"]}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    originals, _ = decode_images(noto.select([entry["row"] for entry in test]), "image", 32)
    for entry, original in zip(test, originals, strict=True):
        picture = Image.open(io.BytesIO(entry["data"])).resize((32, 32), Image.Resampling.LANCZOS)
        pixels = torch.tensor(list(picture.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
        entry |= {"twemoji": to_pixels(pixels), "noto": to_pixels(original)}
    return folder, {"seen": test[: len(test) - len(others)], "not seen": others}


def train(args: argparse.Namespace, folder: Path) -> None:
    command = ["accelerate", "launch", str(ROOT / "training/train_vqdit.py")]
    options = {
        "pretrained_model_name_or_path": args.pretrained_model_name_or_path,
        "train_data_dir": folder,
        "tasks": "text->image:4,->image:1",
        "rank": args.rank,
        "lora_alpha": args.rank,
        "max_train_steps": args.max_train_steps,
        "train_batch_size": 32,
        "learning_rate": args.learning_rate,
        "lr_warmup_steps": 20,
        "report_to": "none",
        "output_dir": args.output_dir,
    }
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run([*command, *args.more], check=True)


def draw(pipeline: VQDiTPipeline, captions: list[str]) -> torch.Tensor:
    """A picture (3, H, W) in [-1, 1] for each caption, from a seed of its own."""
    generators = [torch.Generator().manual_seed(index) for index in range(len(captions))]
    return pipeline(captions, generator=generators, output_type="pt").images * 2 - 1


def compare(args: argparse.Namespace, drawn: dict[str, list[dict]]) -> None:
    pipeline = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipeline.set_progress_bar_config(disable=True)
    captions = [entry["text"] for group in drawn.values() for entry in group]
    base = draw(pipeline, captions)
    pipeline.load_lora_weights(str(args.output_dir), adapter_name="twemoji")
    pictures = {}
    for scale in (0.0, 1.0):
        pipeline.set_adapters(["twemoji"], [scale])
        pictures[scale] = draw(pipeline, captions)
    print("scale 0 is the starter bit for bit:", torch.equal(pictures[0.0], base))

    def real(style: str) -> torch.Tensor:
        return torch.stack([entry[style] for group in drawn.values() for entry in group])

    # Through the tokenizer, as both styles would be drawn at best.
    with torch.no_grad():
        best = {
            style: pipeline.image_vq.decode_codes(pipeline.image_vq.encode_codes(real(style))).sample
            for style in ("twemoji", "noto")
        }
    for scale, pixels in pictures.items():
        near = {style: (pixels - best[style]).square().flatten(1).sum(1) for style in best}
        nearer, start = (near["twemoji"] < near["noto"]).double(), 0
        for name, group in drawn.items():
            part = nearer[start : start + len(group)]
            print(f"scale {scale:g}: {100 * part.mean():.1f} % of {len(part)} captions {name} are nearer to Twemoji")
            start += len(group)

    seen, count = len(drawn["seen"]), min(6, *map(len, drawn.values()))
    shown = [*range(count), *range(seen, seen + count)]
    tiles = []
    for pixels in (pictures[0.0], pictures[1.0], real("twemoji")):
        arrays = ((pixels[shown].clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        tiles += [Image.fromarray(array).resize((96, 96), Image.Resampling.NEAREST) for array in arrays]
    make_image_grid(tiles, rows=3, cols=len(shown)).save(args.output_dir / "lora.png")
    print("captions:", "; ".join(captions[index] for index in shown))


if __name__ == "__main__":
    with told_errors():
        args = parse_args()
        folder, drawn = prepare(args)
        train(args, folder)
        compare(args, drawn)
