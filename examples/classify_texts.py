#!/usr/bin/env python
"""Classify captions by their codes: a linear probe on the text tokenizer's codes and on its embeddings.

    python examples/classify_texts.py

Trains on the training split's captions and measures the share of the test split's whose category, one of ten, is
found; the pipeline's ``text->label`` stands next to them where the checkpoint knows the task. With the 32 px starter's
tokenizer, in seconds: 89.9 % by the bag of codes and 87.3 % by the embeddings (± 1.9); always saying the most
frequent category is right 78.2 % of the time.
"""

import argparse
import math

import torch
import torch.nn.functional as F

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.pipelines.text_segment import encode_texts
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    non_negative_number,
    positive_integer,
    positive_number,
)
from diffusers_vqdit.utils.told_errors import told_errors


def parse_args() -> argparse.Namespace:
    parser = argument_parser("Classify captions by their codes.")
    parser.add_argument("--pretrained_model_name_or_path", type=model_name, default="model_cards/vqdit-emoji-32")
    parser.add_argument("--dataset_name", default="training/data/emoji.parquet")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--num_steps", type=positive_integer, default=300)
    parser.add_argument("--learning_rate", type=positive_number, default=0.05)
    parser.add_argument("--weight_decay", type=non_negative_number, default=1e-3)
    return parser.parse_args()


def bag_of_codes(codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Which codes occur in each text: (B, L) to (B, K) of zeros and ones; residual ones (B, L, q) to (B, q K)."""
    levels = codes.shape[2] if codes.ndim == 3 else 1
    codes = codes.view(len(codes), -1, levels) + num_codes * torch.arange(levels)
    return torch.zeros(len(codes), levels * num_codes).scatter_(1, codes.flatten(1), 1.0)


def probe(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Labels (M,) of `test` (M, F) by a logistic regression on `train` (N, F) and its `labels` (N,)."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(train.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    for _ in range(args.num_steps):
        loss = F.cross_entropy(layer(train), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer(test).argmax(1)


def main(args: argparse.Namespace) -> None:
    pipe = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
    columns = [args.caption_column, args.label_column]
    data = [
        load_training_dataset(dataset_name=args.dataset_name, split=split, columns=columns)
        for split in ("train", "test")
    ]
    captions = [list(part[args.caption_column]) for part in data]
    names = sorted(set(data[0][args.label_column]))
    labels = [torch.tensor([names.index(label) for label in part[args.label_column]]) for part in data]
    length = pipe.text_vq.config.max_length
    bags, vectors = [], []
    for texts in captions:
        bags.append(bag_of_codes(encode_texts(texts, pipe.text_vq, pipe.tokenizer), pipe.text_vq.num_codes))
        tokens = pipe.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        vectors.append(pipe.text_vq.embed(tokens.input_ids, tokens.attention_mask))

    def show(name: str, hits: torch.Tensor) -> None:
        accuracy = hits.float().mean().item()
        error = math.sqrt(accuracy * (1 - accuracy) / len(hits))
        print(f"{name}: {100 * accuracy:.1f} % (± {100 * error:.1f}, n = {len(hits)})")

    show("linear probe on the bag of codes", probe(bags[0], labels[0], bags[1], args) == labels[1])
    show("linear probe on embed", probe(vectors[0], labels[0], vectors[1], args) == labels[1])
    if "text->label" in pipe.transformer.config.tasks:
        found = pipe.classify(captions[1]).labels
        show("text->label", torch.tensor([a == b for a, b in zip(found, data[1][args.label_column], strict=True)]))
    show("the most frequent category", labels[1] == labels[0].mode().values)


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
