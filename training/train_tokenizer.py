#!/usr/bin/env python
"""Train a byte-level BPE tokenizer on one's own texts, whose ids then are the codes of texts of any length.

    python training/train_tokenizer.py --dataset_name outputs/poems.parquet --text_columns title poem \
        --vocab_size 8192 --output_dir outputs/tokenizer

Some seconds for 50,000 poems. It has an end of texts, ``<|endoftext|>``, and ``<mask>``, and gives texts back as they
are, lines and spaces too. The folder is what ``--text_tokenizer`` takes, as is any tokenizer of transformers.
"""

import argparse
import json
import logging
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from diffusers_vqdit.training.byte_pairs import train_text_tokenizer
from diffusers_vqdit.training.columns import READ_ROWS, CaptionColumn, Texts
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.files import save_pretrained_atomically
from diffusers_vqdit.training.run import output_folder
from diffusers_vqdit.utils.arguments import argument_parser, integer, output_path, positive_integer
from diffusers_vqdit.utils.texts import in_parts
from diffusers_vqdit.utils.told_errors import told_errors


logger = logging.getLogger(__name__)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train a byte-level BPE tokenizer.")
    parser.add_argument(
        "--dataset_name", help="Hub dataset, or files of it: a path, folder or pattern.", required=True
    )
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--split", default="train")
    parser.add_argument("--text_columns", nargs="+", default=["text"])
    parser.add_argument("--vocab_size", type=integer(260), default=8192, help="256 bytes, 3 special tokens, merges.")
    parser.add_argument(
        "--characters",
        action="store_true",
        help="No token is longer than a character: for scripts without spaces, and texts whose lines are counted.",
    )
    parser.add_argument("--max_samples", type=positive_integer)
    parser.add_argument("--cache_dir")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/tokenizer"))
    return parser.parse_args(input_args)


def is_another(file: Path, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a file is of another tokenizer, or of none."""
    try:
        return json.loads(file.read_bytes()) != json.loads(tokenizer.backend_tokenizer.to_str())
    except FileNotFoundError:
        return False
    except ValueError:
        return True


def main(args: argparse.Namespace) -> None:
    with output_folder(args.output_dir, files=["tokenizer.json", "tokenizer_config.json"]):
        dataset = load_training_dataset(
            dataset_name=args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            split=args.split,
            columns=args.text_columns,
            max_samples=args.max_samples,
            cache_dir=args.cache_dir,
        )
        texts = Texts([CaptionColumn(dataset, column) for column in args.text_columns])
        tokenizer = train_text_tokenizer(texts, args.vocab_size, args.characters)
        if is_another(args.output_dir / "tokenizer.json", tokenizer):
            logger.warning(
                f"{str(args.output_dir)!r} had another tokenizer, which this one replaces: codes of that one are none "
                "of this"
            )
        save_pretrained_atomically(tokenizer, args.output_dir)
    parts = in_parts(texts, READ_ROWS)
    count = sum(len(ids) for part in parts for ids in tokenizer(part, add_special_tokens=False).input_ids)
    share = sum(map(len, texts)) / count
    print(f"{args.output_dir}: {len(tokenizer)} tokens; {share:.2f} characters a token in {len(texts)} texts")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
