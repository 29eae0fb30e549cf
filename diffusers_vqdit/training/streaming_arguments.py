"""``--streaming``, of the scripts that read data: rows that are counted and encoded, or samples without an end."""

import argparse


def add_streaming_argument(group: argparse._ActionsContainer, *, encoded: bool = True) -> None:
    """Add ``--streaming``; `encoded` is whether the rows are encoded once, before the training."""
    group.add_argument(
        "--streaming",
        action="store_true",
        help="Read the parquet, Arrow or webdataset files of --dataset_name as they are encoded, without a copy."
        if encoded
        else "Read --dataset_name as it is needed; needs --max_train_steps.",
    )


def check_streaming(parser: argparse.ArgumentParser, args: argparse.Namespace, *, encoded: bool = True) -> None:
    """End the program if ``--streaming`` has no data to read, or, of samples that aren't counted, no number of steps
    or one of samples."""
    if not args.streaming:
        return
    if encoded and args.dataset_name is None:
        parser.error("--streaming needs --dataset_name")
    if not encoded and (args.dataset_name is None or args.max_train_steps is None or args.max_train_samples):
        parser.error("--streaming needs --dataset_name and --max_train_steps, and can't take --max_train_samples")
