#!/usr/bin/env python
"""Train a text VQ-VAE, and the byte-level BPE tokenizer beside it: captions to a grid of codes and back.

    accelerate launch training/train_text_vq.py --dataset_name training/data/emoji.parquet \
        --caption_columns text text_zh phrase keywords --use_ema --output_dir outputs/text_vq

trains the starters' text tokenizer: every caption of the test split comes back exactly, after some minutes on two CPU
cores. The output folder holds the model, and the tokenizer in ``tokenizer/``.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerFast

from diffusers_vqdit import TextVQModel
from diffusers_vqdit.schedulers.samplers import uniform
from diffusers_vqdit.training import setup
from diffusers_vqdit.training.arguments import add_keeping_arguments, add_training_arguments
from diffusers_vqdit.training.byte_pairs import train_tokenizer
from diffusers_vqdit.training.checkpoints import find_checkpoint, fingerprint, plain_config, save_checkpoint
from diffusers_vqdit.training.columns import READ_ROWS, CaptionColumn, Texts
from diffusers_vqdit.training.data import choose_validation_split, load_splits, take_split
from diffusers_vqdit.training.draws import row_generators
from diffusers_vqdit.training.file_lists import in_file
from diffusers_vqdit.training.files import save_pretrained_atomically
from diffusers_vqdit.training.metrics import level_figures
from diffusers_vqdit.training.model_card import Measure
from diffusers_vqdit.training.optimization import averaged_weights, unwrap
from diffusers_vqdit.training.publish import publish_run, publishes_checkpoints
from diffusers_vqdit.training.row_stream import LISTED_FOLDER
from diffusers_vqdit.training.run import TrainingRun, due
from diffusers_vqdit.training.sharding import check_unsharded, evaluated
from diffusers_vqdit.training.streaming_arguments import add_streaming_argument, check_streaming
from diffusers_vqdit.training.throughput import Throughput, shown_rate
from diffusers_vqdit.training.tokenizer_metrics import measure_text_tokenizer
from diffusers_vqdit.training.tokenizers import load_text_vq
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.training.utilisation import Utilisation
from diffusers_vqdit.training.watch import TrainingWatch
from diffusers_vqdit.utils.arguments import argument_parser, model_name, non_negative_number, positive_integer, share
from diffusers_vqdit.utils.fingerprints import tokenizer_fingerprint
from diffusers_vqdit.utils.texts import in_parts, length_warning, tokenize_to_length
from diffusers_vqdit.utils.told_errors import told_errors


logger = get_logger(__name__)

PROJECT = "text_vq"  # of the trackers
VALIDATION_ROWS = 10_000  # whose captions are measured, at most


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train a text VQ-VAE and its tokenizer.")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path", type=model_name, help="TextVQModel with its tokenizer, to finetune."
    )
    model.add_argument("--tokenizer_vocab_size", type=positive_integer, default=2048)
    model.add_argument(
        "--max_length", type=positive_integer, default=24, help="Tokens of a caption; longer ones are cut."
    )
    model.add_argument("--downsample_factor", type=positive_integer, default=1, help="Tokens a code position.")
    model.add_argument("--quantizer_type", choices=["vq", "rvq"], default="vq", help="rvq: residual codes.")
    model.add_argument("--num_quantizers", type=positive_integer, default=1, help="Codes a position, of rvq.")
    model.add_argument(
        "--num_codebooks", type=positive_integer, default=1, help="Codes a position of vq, which lie side by side."
    )
    model.add_argument("--num_codes", type=positive_integer, default=4096)
    model.add_argument("--code_dim", type=positive_integer, default=16)
    model.add_argument("--hidden_size", type=positive_integer, default=128)
    model.add_argument("--num_layers", type=positive_integer, default=1)
    model.add_argument(
        "--kernel_size", type=positive_integer, default=1, help="Window of the convolutions, in positions."
    )
    model.add_argument(
        "--codebook_norm",
        choices=["none", "l2"],
        help="By default l2 for vq and none for rvq.",
    )
    model.add_argument("--restart_threshold", type=non_negative_number, default=0.05)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub dataset, or files of it: a path, folder or pattern.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="Image folder with metadata.jsonl.")
    data.add_argument("--caption_columns", nargs="+", default=["text"])
    data.add_argument(
        "--validation_split", help="Split for round trips, by default test if there is one; 'none': training captions."
    )
    data.add_argument("--max_train_samples", type=positive_integer)
    add_streaming_argument(data)
    data.add_argument("--cache_dir")
    data.add_argument(
        "--random_token_probability",
        type=share,
        default=0.25,
        help="Share of tokens replaced by random ones, so that rare tokens and new neighbours are learned too.",
    )

    data.add_argument(
        "--pack_captions",
        action="store_true",
        help="Train on rows of several captions, a position of padding after each: faster where most are short.",
    )

    add_training_arguments(
        parser,
        output_dir="outputs/text_vq",
        train_batch_size=256,
        num_train_epochs=30,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=50,
        adam_beta2=0.99,
        adam_weight_decay=0.0,
        ema_decay=0.99,
    )

    add_keeping_arguments(parser, validation_steps=250)
    args = parser.parse_args(input_args)
    check_streaming(parser, args)
    refuse_unused_arguments(parser, args)
    return args


def load_captions(args: argparse.Namespace) -> tuple[Texts, Texts]:
    """The captions of the training split, and those that validation measures, of `VALIDATION_ROWS` rows at most.

    Of a stream they are listed in the run's folder, without the other columns. All processes must call it.
    """
    splits = load_splits(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        columns=args.caption_columns,
        cache_dir=args.cache_dir,
        output_dir=args.output_dir,
        streaming=args.streaming,
    )
    args.validation_split = choose_validation_split(splits, args.validation_split)

    def read(split: str, max_samples: int | None, folder: str) -> Texts:
        dataset = take_split(splits, split, columns=args.caption_columns, max_samples=max_samples)
        if args.streaming:
            dataset = dataset.rows(args.output_dir / LISTED_FOLDER / folder, args.caption_columns, {})
        return Texts([CaptionColumn(dataset, column) for column in args.caption_columns])

    measured = "train" if args.validation_split == "none" else args.validation_split
    rows = VALIDATION_ROWS
    if measured == "train":
        rows = min(args.max_train_samples or rows, rows)
    return read("train", args.max_train_samples, "train"), read(measured, rows, "validation")


def pack_captions(tokens: torch.Tensor, pad_token_id: int, downsample_factor: int) -> torch.Tensor:
    """Tokens (M, T) of several captions a row, of those (N, T) of one a row, in their order.

    Each begins at a position of its own, and one position of padding or more comes after it, but at a row's end.
    """
    length = tokens.shape[1]
    sizes = torch.cat([(part != pad_token_id).sum(1) for part in tokens.split(READ_ROWS)])
    sizes = (sizes + downsample_factor - 1) // downsample_factor * downsample_factor  # (N,)
    starts, rows, end = torch.empty_like(sizes), 0, length + 1  # even one without tokens begins a row
    for index, size in enumerate(sizes.tolist()):
        if end + size > length:
            rows, end = rows + 1, 0
        starts[index] = (rows - 1) * length + end
        end += size + downsample_factor
    packed, places = in_file((rows, length), np.int64).fill_(pad_token_id), torch.arange(length)
    for part, start, size in zip(*(x.split(READ_ROWS) for x in (tokens, starts, sizes)), strict=True):
        used = places < size[:, None]
        packed.view(-1)[(start[:, None] + places)[used]] = part[used]
    return packed


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Texts, length: int) -> torch.LongTensor:
    """Tokens (N, length) of all captions, some at a time, in a file, and one warning of those that are cut."""
    tokens, start = in_file((len(captions), length), np.int64), 0

    def counted() -> Iterator[tuple[list[str], list[int]]]:
        nonlocal start
        for part in in_parts(captions, READ_ROWS):
            tokens[start : start + len(part)], _, counts = tokenize_to_length(tokenizer, part, length)
            start += len(part)
            yield part, counts

    problem = f"captions have more than max_length={length} tokens and are cut"
    if warning := length_warning(counted(), length, problem):
        logger.warning(warning)
    return tokens


def build_model(args: argparse.Namespace, captions: Texts) -> tuple[TextVQModel, PreTrainedTokenizerFast]:
    if args.pretrained_model_name_or_path is not None:
        name, argument = args.pretrained_model_name_or_path, "pretrained_model_name_or_path"
        model, tokenizer = load_text_vq(name, argument=argument, cache_dir=args.cache_dir, torch_dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(captions, args.tokenizer_vocab_size, args.max_length)
        if args.num_codes > len(tokenizer) and args.downsample_factor == args.kernel_size == 1:
            logger.warning(
                f"num_codes={args.num_codes} are more than the {len(tokenizer)} tokens that these captions gave the "
                f"vocabulary, of which each gets one code: --num_codes {len(tokenizer)} is enough"
            )
        model = TextVQModel(
            vocab_size=len(tokenizer),
            max_length=args.max_length,
            pad_token_id=tokenizer.pad_token_id,
            downsample_factor=args.downsample_factor,
            quantizer_type=args.quantizer_type,
            num_quantizers=args.num_quantizers,
            num_codebooks=args.num_codebooks,
            num_codes=args.num_codes,
            code_dim=args.code_dim,
            hidden_size=args.hidden_size,
            num_layers=args.num_layers,
            kernel_size=args.kernel_size,
            codebook_norm=args.codebook_norm or ("none" if args.quantizer_type == "rvq" else "l2"),
            restart_threshold=args.restart_threshold,
        )
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.compile:
        for block in (*model.encoder, *model.decoder):
            block.compile()
    return model, tokenizer


@torch.no_grad()
def validate(model: TextVQModel, tokenizer: PreTrainedTokenizerFast, captions: Texts) -> dict[str, float]:
    """Share of captions that come back exactly as text."""
    figures = measure_text_tokenizer(model, tokenizer, {"captions": captions})
    model.train()
    return {"validation/exact": figures["exact_captions"]}


def publish(
    args: argparse.Namespace,
    model: TextVQModel,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Texts,
    step: int | None = None,
) -> None:
    """Save the model and its card, and push them where that is asked for."""
    files = save_pretrained_atomically(model, args.output_dir)
    saved = save_pretrained_atomically(tokenizer, args.output_dir / "tokenizer")
    files = [*files, *(f"tokenizer/{name}" for name in saved)]
    split = "training captions" if args.validation_split == "none" else f"{args.validation_split} split"
    dataset = f"{Path(args.dataset_name or args.train_data_dir).stem}, {split}"
    exact = validate(model, tokenizer, held_out)["validation/exact"]
    measures = [Measure("text tokenizer", "exact round trips", exact, dataset)]
    publish_run(args, model, files=files, measures=measures, step=step)


def main(args: argparse.Namespace) -> None:
    accelerator = setup.make_accelerator(args)
    check_unsharded(accelerator)
    with setup.open_run(
        args, accelerator, project=PROJECT, folders=["tokenizer", LISTED_FOLDER], files=["README.md", "config.json"]
    ) as run:
        train(args, accelerator, run)


def train(args: argparse.Namespace, accelerator: Accelerator, run: TrainingRun) -> None:
    # 1. Captions, tokenizer, model
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    captions, held_out = load_captions(args)
    model, tokenizer = build_model(args, captions)
    tokens = tokenize(tokenizer, captions, model.config.max_length)
    if args.pack_captions:
        tokens = pack_captions(tokens, tokenizer.pad_token_id, model.config.downsample_factor)
    captions_a_row = len(captions) / len(tokens)

    # 2. Optimizer and learning rate
    ema = setup.make_ema(args, model.parameters(), accelerator.device)
    model, optimizer, lr_scheduler, max_steps = setup.prepare(args, accelerator, model, len(tokens))

    # 3. Resume
    identity = {
        "script": "train_text_vq",
        "use_ema": args.use_ema,
        "random_token_probability": args.random_token_probability,
        "model": plain_config(unwrap(model)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "training data": fingerprint(tokens),
    }
    run.begin(checkpoint, identity=identity, args=args, states={"ema": ema})
    setup.start_trackers(args, accelerator, PROJECT)

    # 4. Train
    step, micro_step = run.step, run.step * args.gradient_accumulation_steps
    batches = setup.run_batches(args, accelerator, len(tokens), step)
    progress = setup.progress_bar(accelerator, max_steps, step)
    utilisation = Utilisation(args, accelerator)
    watch = TrainingWatch(accelerator, args, quantizer=unwrap(model).quantizers)
    throughput, measured, stop = Throughput(), {}, False
    while step < max_steps and not stop:
        batch = tokens[next(batches)]
        # Drawn for each row of the global batch, however many processes share it.
        generator = row_generators(args.seed, micro_step, len(batch), rank=accelerator.process_index)
        replaced = uniform(batch.shape, generator, batch.device) < args.random_token_probability
        random_tokens = (uniform(batch.shape, generator, batch.device) * len(tokenizer)).long()
        batch = torch.where(replaced & (batch != tokenizer.pad_token_id), random_tokens, batch).to(accelerator.device)
        micro_step += 1
        with accelerator.accumulate(model), utilisation.counting():
            output = model(batch)
            cross_entropy = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), batch.flatten())
            loss = cross_entropy + output.commit_loss
            norm = run.descend(optimizer, list(model.parameters()), loss, args.max_grad_norm, lr_scheduler, ema)
        throughput.add(captions_a_row * len(batch) * accelerator.num_processes)
        if not accelerator.sync_gradients:
            continue

        step += 1
        run.end_step(step)
        losses = accelerator.reduce(torch.stack([cross_entropy, output.commit_loss]).detach(), "mean").tolist()
        logs = {
            "cross_entropy": losses[0],
            "commitment": losses[1],
            **level_figures(output.usage, output.perplexity),
            "gradient_norm": norm,
            "skipped_steps": run.skipped_steps,
            "captions_per_second": throughput.end_step(),
            **utilisation.figures(),
        }
        progress.update(1)
        shown = {"ce": f"{losses[0]:.4f}", "vq": f"{losses[1]:.4f}", "usage": f"{logs['usage']:.2f}"}
        shown["captions/s"] = shown_rate(logs["captions_per_second"])
        shown |= {name.removeprefix("validation/"): f"{value:.3f}" for name, value in measured.items()}
        progress.set_postfix(shown)
        accelerator.log({**logs, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
        if accelerator.is_main_process and (due(step, args.validation_steps) or step == max_steps):
            with averaged_weights(ema, model.parameters()):
                measured = validate(unwrap(model), tokenizer, held_out)
            accelerator.log(measured, step=step)
            logger.info(f"step {step}: {measured}")
        watch.look(step, losses[0], norm, output.codes, logs["usage"])
        stop = run.stop_requested()
        if stop or due(step, args.checkpointing_steps) or step == max_steps:
            save_checkpoint(accelerator, args.output_dir, step, total_limit=args.checkpoints_total_limit, **run.kept())
            if accelerator.is_main_process and publishes_checkpoints(args) and step < max_steps and not stop:
                with evaluated(accelerator, model, ema, model.parameters()) as whole:
                    publish(args, whole, tokenizer, held_out, step)
        throughput.go_on()
    progress.close()

    # 5. Save
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and (not stop or step == max_steps):
        if ema is not None:
            ema.copy_to(model.parameters())
        model = unwrap(model).eval()
        model.merge_codes()
        logger.info(f"after merging duplicates: {validate(model, tokenizer, held_out)}")
        publish(args, model, tokenizer, held_out)
        logger.info(f"saved the model to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
