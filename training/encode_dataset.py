#!/usr/bin/env python
"""Encode a dataset into codes once, so that transformer training never runs a tokenizer.

    python training/encode_dataset.py --dataset_name training/data/emoji.parquet \
        --image_vq outputs/image_vq --text_vq outputs/text_vq \
        --prompt_columns text_zh phrase keywords --text_columns text_zh keywords --label_column label \
        --image_augmentations 15 --lowres_factor 2 --output_dir outputs/codes

The emoji take about a minute on two CPU cores. Of several processes, started by ``accelerate launch`` or ``torchrun``,
each encodes its own shards (``--shard_size``). A run that was killed goes on where it stopped.
"""

import argparse
from contextlib import nullcontext
from datetime import timedelta

import torch
from accelerate import PartialState

from diffusers_vqdit.pipelines.segment_base import ENCODERS, IMAGE, TEXT, SegmentColumn
from diffusers_vqdit.training.code_files import INDEX_FILE
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.data import load_splits, take_split
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.image_arguments import add_image_arguments
from diffusers_vqdit.training.launch import check_launch
from diffusers_vqdit.training.run import output_folder
from diffusers_vqdit.training.segment_columns import (
    add_bucket_argument,
    add_encoder_arguments,
    add_segment_argument,
    add_text_arguments,
    add_text_tokenizer_argument,
    audio_options,
    columns_of,
    has_captions,
    is_taken,
    load_encoders,
    load_tokenizers,
)
from diffusers_vqdit.training.streaming_arguments import add_streaming_argument, check_streaming
from diffusers_vqdit.training.tokenizers import load_image_vq, load_text_tokenizer, load_text_vq
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    integer,
    model_name,
    non_negative_integer,
    output_path,
    positive_integer,
    torch_device,
)
from diffusers_vqdit.utils.told_errors import told_errors


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Encode a dataset into a folder of codes.")
    parser.add_argument("--dataset_name", help="Hub dataset, or files of it: a path, folder or pattern.")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--train_data_dir", help="Image folder with metadata.jsonl.")
    parser.add_argument("--split", default="train")
    add_streaming_argument(parser)
    parser.add_argument(
        "--image_vq",
        type=model_name,
        help="ImageVQModel, or a pipeline: folder or Hub id. Without, no pictures.",
    )
    parser.add_argument(
        "--text_vq", type=model_name, help="TextVQModel with its tokenizer, or a pipeline. Without, no captions."
    )
    add_text_tokenizer_argument(parser)
    add_text_arguments(parser)
    add_encoder_arguments(parser)
    parser.add_argument("--image_column", default="image")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--prompt_columns", nargs="*", default=[], help="More wordings, used where the text is given.")
    parser.add_argument("--text_columns", nargs="*", default=[], help="More texts, each a segment of that name.")
    parser.add_argument("--label_column")
    add_segment_argument(parser)
    parser.add_argument(
        "--image_augmentations",
        type=non_negative_integer,
        default=0,
        help="Moved copies of each picture, used where it is given.",
    )
    parser.add_argument(
        "--lowres_factor", type=integer(2), help="Adds image_lowres, so many times smaller, to upscale from."
    )
    parser.add_argument(
        "--resolution", type=positive_integer, help="In pixels; by default the ImageVQModel's sample size."
    )
    add_bucket_argument(parser, "By default all pictures become squares.")
    add_image_arguments(parser, resize_mode="auto", default="The default.")
    parser.add_argument("--batch_size", type=positive_integer, default=64)
    parser.add_argument(
        "--shard_size",
        type=positive_integer,
        help="Rows per file of codes; by default a 64th of them, between 256 and 100,000, of a stream 100,000.",
    )
    parser.add_argument("--max_samples", type=positive_integer)
    parser.add_argument("--cache_dir")
    parser.add_argument("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=output_path, required=True)
    args = parser.parse_args(input_args)
    if args.image_vq is None and args.text_vq is None and args.text_tokenizer is None and not args.segment:
        parser.error("give --image_vq, --text_vq or both: there is nothing to encode with")
    if args.text_vq is not None and args.text_tokenizer is not None:
        parser.error("give one of --text_vq and --text_tokenizer: either makes the codes of texts")
    check_streaming(parser, args)
    if args.resolution is not None and args.aspect_ratio_buckets is not None:
        parser.error("give one of --resolution and --aspect_ratio_buckets: both say the size of pictures")
    refuse_unused_arguments(parser, args)
    return args


def main(args: argparse.Namespace) -> None:
    check_launch()
    # The others wait for the one that has most to do.
    state = PartialState(cpu=torch.device(args.device).type == "cpu", timeout=timedelta(days=1))
    if state.num_processes > 1 and args.device == "cuda":
        args.device = str(state.device)
    own = output_folder(args.output_dir, files=[INDEX_FILE], kept="the codes that were there are whole")
    with own if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        encode(args, state)


def encode(args: argparse.Namespace, state: PartialState) -> None:
    named = {flag.name for flag in args.segment}
    image_column = args.image_column if args.image_vq and IMAGE not in named else None
    text = has_captions(args)
    caption_column = args.caption_column if text and TEXT not in named else None
    source = {"dataset_name": args.dataset_name, "dataset_config_name": args.dataset_config_name}
    source |= {"train_data_dir": args.train_data_dir, "cache_dir": args.cache_dir, "output_dir": args.output_dir}
    pictures, sounds, others = columns_of(args.segment)
    prompt_columns, text_columns = (args.prompt_columns, args.text_columns) if text else ([], [])
    others = [*others, *([args.label_column] if args.label_column else []), *prompt_columns, *text_columns]
    wanted = [column for column in (*others, *pictures, *sounds, caption_column, image_column) if column]
    splits = load_splits(**source, columns=wanted, streaming=args.streaming)
    if args.segment:
        # Where segments are named that take the tokenizers, the columns of these two names may be missing unless
        # something else needs them.
        there = next(iter(splits.values())).column_names
        needed = args.lowres_factor or not is_taken(args, "image_vq")
        image_column = None if image_column == IMAGE not in there and not needed else image_column
        taken = any(is_taken(args, name) for name in ("text_vq", "text_tokenizer", "text_encoder"))
        needed = prompt_columns or text_columns or not taken
        caption_column = None if caption_column == TEXT not in there and not needed else caption_column
    dataset = take_split(
        splits,
        args.split,
        columns=[*others, *([caption_column] if caption_column else [])],
        image_column=[*pictures, *([image_column] if image_column else [])],
        audio_column=sounds,
        max_samples=args.max_samples,
    )
    image_vq = load_image_vq(args.image_vq, cache_dir=args.cache_dir).to(args.device).eval() if args.image_vq else None
    text_vq, tokenizer = load_text_vq(args.text_vq, cache_dir=args.cache_dir) if args.text_vq else (None, None)
    if text_vq is not None:
        text_vq.to(args.device).eval()
    if args.text_tokenizer is not None:
        tokenizer = load_text_tokenizer(args.text_tokenizer, cache_dir=args.cache_dir)
    encoders = load_encoders(args)
    known = {("image_vq", args.image_vq): (image_vq, None), ("text_vq", args.text_vq): (text_vq, tokenizer)}
    known |= {("text_vq", args.text_tokenizer): (tokenizer, None)} if args.text_tokenizer else {}
    known |= {
        (name, getattr(args, name)): (encoders[name], encoders[beside])
        for name, beside in zip(ENCODERS[::2], ENCODERS[1::2], strict=True)
        if encoders[name] is not None
    }
    loaded = load_tokenizers(args.segment, known, cache_dir=args.cache_dir)
    for model in [*(encoders[name] for name in ENCODERS[::2] if encoders[name]), *(one for one, _ in loaded.values())]:
        if isinstance(model, torch.nn.Module):
            model.to(args.device)
    sample_size = image_vq.config.sample_size if image_vq and args.aspect_ratio_buckets is None else 0
    sizes = audio_options(args) | ({} if args.resolution is None else {"resolution": args.resolution})
    encode_dataset(
        dataset,
        args.output_dir,
        resolution=args.resolution or sample_size,
        image_vq=image_vq,
        text_vq=text_vq,
        tokenizer=tokenizer,
        **encoders,
        max_sequence_length=args.max_sequence_length,
        image_column=image_column,
        caption_column=caption_column,
        prompt_columns=prompt_columns,
        text_columns=text_columns,
        label_column=args.label_column,
        segments={
            flag.name: SegmentColumn(
                flag.modality, flag.column, *loaded.get(flag.name, (None, None)), options=sizes | flag.options
            )
            for flag in args.segment
        },
        image_augmentations=args.image_augmentations,
        lowres_factor=args.lowres_factor,
        resize_mode=args.resize_mode,
        aspect_ratio_buckets=args.aspect_ratio_buckets,
        block_length=args.block_length,
        max_text_length=args.max_text_length,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        image_interpolation_mode=args.image_interpolation_mode,
        dataloader_num_workers=args.dataloader_num_workers,
    )
    if state.is_main_process:
        codes = CodeDataset(args.output_dir)
        print(f"{args.output_dir}: {len(codes)} rows, segments {codes.segments}")


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
