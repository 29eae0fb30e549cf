#!/usr/bin/env python
"""Bits per character of held-out texts: a checkpoint by its NELBO, an n-gram model, a causal transformer.

    python -m benchmarks.text_baselines --dataset_name outputs/poems.parquet --text_column poem \
        --given_column title --checkpoint outputs/poems --minutes 120

All are measured on the same texts of the test split, an end after each, and their bits are divided by the same
characters, so that tokenizers don't matter. The checkpoint's figure is a bound from above (``--num_samples`` masks a
block); the two others are exact.

* ``n-gram``: characters, interpolated by Witten and Bell (1991), from order 1 to ``--order``; below order 1 all of
  Unicode's 2^16 most common code points are as likely.
* ``gpt2``: transformers' `GPT2LMHeadModel` of the checkpoint's width over the checkpoint's tokens, with as many layers
  as bring it nearest to the checkpoint's parameters (ours has adaLN and a head of its own), trained from scratch for
  ``--minutes`` of process time (0 leaves it out), AdamW, a cosine schedule. With a given column, it reads given text,
  end, text, end, and the bits of the text alone are counted; it is trained on both.
"""

import argparse
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    non_negative_number,
    output_path,
    positive_integer,
    positive_number,
    torch_device,
)
from diffusers_vqdit.utils.token_ids import token_ids


UNKNOWN_CODE_POINTS = 2**16
END = "\x00"


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Bits per character beside an n-gram model and a causal transformer.")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--given_column", help="What the texts are given; by default nothing.")
    parser.add_argument("--checkpoint", type=model_name, required=True, help="A pipeline with a segment of blocks.")
    parser.add_argument("--segment", help="Of the texts, by default called as their column.")
    parser.add_argument("--max_samples", type=positive_integer, help="Of the test split.")
    parser.add_argument("--order", type=positive_integer, default=5)
    parser.add_argument("--minutes", type=non_negative_number, default=0.0)
    parser.add_argument("--train_batch_size", type=positive_integer, default=64)
    parser.add_argument("--learning_rate", type=positive_number, default=1e-3)
    parser.add_argument("--num_samples", type=positive_integer, default=8)
    parser.add_argument("--batch_size", type=positive_integer, default=16)
    parser.add_argument("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_file", type=output_path, default=Path("outputs/text_baselines.json"))
    return parser.parse_args(input_args)


class WittenBell:
    """An interpolated n-gram model of characters.

    p(c | h) = (n(h c) + t(h) p(c | h')) / (n(h) + t(h)), t(h) being how many different characters followed h, and h'
    the history without its first character.
    """

    def __init__(self, texts: Sequence[str], order: int) -> None:
        self.order = order
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        for text in texts:
            for place, history in self._histories(text):
                for start in range(len(history) + 1):
                    self.counts[history[start:]][text[place] if place < len(text) else END] += 1
        self.totals = {history: sum(found.values()) for history, found in self.counts.items()}

    def _histories(self, text: str) -> list[tuple[int, str]]:
        padded = END + text
        return [(i, padded[max(0, i + 2 - self.order) : i + 1]) for i in range(len(text) + 1)]

    def probability(self, character: str, history: str) -> float:
        below = self.probability(character, history[1:]) if history else 1 / UNKNOWN_CODE_POINTS
        found = self.counts.get(history)
        if found is None:
            return below
        return (found[character] + len(found) * below) / (self.totals[history] + len(found))

    def bits(self, text: str) -> float:
        """Of a text and its end."""
        characters = [*text, END]
        return -sum(math.log2(self.probability(characters[i], history)) for i, history in self._histories(text))


def sequences(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], given: Sequence[str] | None
) -> list[tuple[list[int], int]]:
    """Token ids of each text, what is given before it, and the places of these."""
    end = tokenizer.eos_token_id
    before = [[end]] * len(texts)
    if given is not None:
        before = [[end, *ids, end] for ids in token_ids(tokenizer, given)]
    return [([*first, *ids, end], len(first)) for first, ids in zip(before, token_ids(tokenizer, texts), strict=True)]


def padded(rows: Sequence[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, n), and labels with -100 at padding."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], -100)
    return ids.to(device), labels.to(device)


def equal_gpt2(pipe: VQDiTPipeline, longest: int) -> GPT2LMHeadModel:
    """An untrained causal transformer for rows of at most `longest` ids, of the checkpoint's width and of as many
    parameters, as nearly as whole layers allow."""
    transformer, end = pipe.transformer, pipe.tokenizer.eos_token_id

    def gpt2(layers: int) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(pipe.tokenizer),
                n_positions=longest,
                n_embd=transformer.inner_dim,
                n_layer=layers,
                n_head=transformer.config.num_attention_heads,
                **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), transformer.config.dropout),
                bos_token_id=end,
                eos_token_id=end,
            )
        )

    with torch.device("meta"):
        one, two = (gpt2(layers).num_parameters() for layers in (1, 2))
    torch.manual_seed(0)
    return gpt2(max(1, 1 + round((transformer.num_parameters() - one) / (two - one))))


def train_gpt2(args: argparse.Namespace, pipe: VQDiTPipeline, rows: list[list[int]]) -> tuple[GPT2LMHeadModel, int]:
    """A causal transformer of the checkpoint's size after the minutes, and its steps."""
    model = equal_gpt2(pipe, max(map(len, rows))).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    start, steps = clock(), 0
    # Texts of alike lengths together, as buckets have them.
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    batches = [order[i : i + args.train_batch_size] for i in range(0, len(order), args.train_batch_size)]
    model.train()
    while (share := (clock() - start) / (60 * args.minutes)) < 1:
        chosen = batches[int(torch.randint(len(batches), (), generator=generator))]
        ids, labels = padded([rows[row] for row in chosen], args.device)
        rate = args.learning_rate * min(1.0, (steps + 1) / 200) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = rate
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return model.eval(), steps


@torch.no_grad()
def gpt2_bits(model: GPT2LMHeadModel, rows: list[tuple[list[int], int]], args: argparse.Namespace) -> float:
    """Of all texts and their ends, without what is given."""
    total, longest = 0.0, model.config.n_positions
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        ids, labels = padded([row[:longest] for row, _ in part], args.device)
        for label, (_, first) in zip(labels, part, strict=True):
            label[:first] = -100
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
        total += float(torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum"))
    return total / math.log(2)


def main(args: argparse.Namespace) -> None:
    columns = [args.text_column, *([args.given_column] if args.given_column else [])]
    train, test = (
        load_training_dataset(dataset_name=args.dataset_name, split=split, columns=columns, max_samples=most)
        for split, most in (("train", None), ("test", args.max_samples))
    )
    pipe = VQDiTPipeline.from_pretrained(args.checkpoint).to(args.device)
    segment = args.segment or args.text_column
    longest = pipe.transformer.config.segments[segment]["shape"][0]
    # None is measured on more than it was trained on.
    lengths = [len(ids) for ids in token_ids(pipe.tokenizer, test[args.text_column])]
    test = test.select([row for row, length in enumerate(lengths) if length < longest])
    texts = list(test[args.text_column])
    given = list(test[args.given_column]) if args.given_column else None
    characters, figures = sum(map(len, texts)), {}
    print(f"{len(texts)} texts of {characters} characters")

    figures[f"{args.order}-gram"] = sum(map(WittenBell(train[args.text_column], args.order).bits, texts)) / characters
    if args.minutes:
        before = list(train[args.given_column]) if args.given_column else None
        rows = [ids for ids, first in sequences(pipe.tokenizer, list(train[args.text_column]), before)]
        rows = [ids for ids in rows if len(ids) <= 2 * longest]
        model, steps = train_gpt2(args, pipe, rows)
        size = f"{model.config.n_layer} layers, {model.num_parameters() / 1e6:.1f} M"
        figures[f"gpt2 ({size}), {args.minutes:g} minutes, {steps} steps"] = (
            gpt2_bits(model, sequences(pipe.tokenizer, texts, given), args) / characters
        )
    task = f"{args.given_column or ''}->{segment}"
    inputs = {segment: texts, **({args.given_column: given} if given is not None else {})}
    generator, options = torch.Generator().manual_seed(0), {"batch_size": args.batch_size}
    output = pipe.score(task, inputs=inputs, num_samples=args.num_samples, generator=generator, **options)
    figures[f"{args.checkpoint} ({task}), at most"] = float(output.nll.sum()) / math.log(2) / characters
    for name, value in figures.items():
        print(f"{name}: {value:.3f} bits per character")
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    args.output_file.write_text(json.dumps({"characters": characters, "bits_per_character": figures}, indent=2))


if __name__ == "__main__":
    main(parse_args())
