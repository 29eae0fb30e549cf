#!/usr/bin/env python
"""Train or finetune a VQ diffusion transformer on codes, one task drawn for each micro-batch.

From scratch, on codes that ``encode_dataset.py`` wrote:

    accelerate launch training/train_vqdit.py \
        --codes_dir outputs/codes --image_vq outputs/image_vq --text_vq outputs/text_vq \
        --tasks "text->image:4,image->text:2,label->image:1,->image:1" --output_dir outputs/vqdit

Finetuning a pipeline on your own captioned pictures, which are encoded at the start:

    accelerate launch training/train_vqdit.py --pretrained_model_name_or_path model_cards/vqdit-emoji \
        --train_data_dir my_pictures --caption_column text --tasks "text->image:4,->image:1" --output_dir outputs/mine

The output folder is a complete pipeline, for ``VQDiTPipeline.from_pretrained``; with ``--rank 8`` it is a LoRA of the
pretrained one instead, for ``load_lora_weights``. The starters' commands, running
times and figures stand in their model cards.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.segment_base import ENCODERS, LABEL, TEXT
from diffusers_vqdit.schedulers.samplers import check_device
from diffusers_vqdit.tasks import Task, parse_tasks
from diffusers_vqdit.training import setup
from diffusers_vqdit.training.arguments import (
    add_keeping_arguments,
    add_model_arguments,
    add_patch_argument,
    add_training_arguments,
    add_transformer_arguments,
    add_validation_prompts_argument,
    with_patches,
)
from diffusers_vqdit.training.checkpoints import (
    find_checkpoint,
    fingerprint,
    plain_config,
    read_manifest,
    save_checkpoint,
)
from diffusers_vqdit.training.code_embeddings import start_embeddings, tokenizers_of
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.finetuning import check_new_patches, extend_entries, extend_transformer
from diffusers_vqdit.training.lora import add_lora, add_lora_arguments, check_lora_layers
from diffusers_vqdit.training.masked_loss import draw_batch, masked_diffusion_loss, track_loss
from diffusers_vqdit.training.model_card import Measure
from diffusers_vqdit.training.muon import check_muon, default_optimizer
from diffusers_vqdit.training.optimization import set_dropout, transformer_learning_rate, unwrap
from diffusers_vqdit.training.publish import publish_pipeline, publishes_checkpoints
from diffusers_vqdit.training.run import TrainingRun, check_drawable, due
from diffusers_vqdit.training.segment_columns import (
    add_encoder_arguments,
    add_text_tokenizer_argument,
    has_captions,
    load_encoders,
    missing_segments,
)
from diffusers_vqdit.training.sharding import evaluated
from diffusers_vqdit.training.task_codes import add_codes_arguments, check_source, load_codes, names_of_labels
from diffusers_vqdit.training.throughput import Throughput, shown_rate
from diffusers_vqdit.training.tokenizers import load_image_vq, load_text_tokenizer, load_text_vq
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.training.utilisation import Utilisation
from diffusers_vqdit.training.validation import draw_validation
from diffusers_vqdit.training.watch import TrainingWatch
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    share,
)
from diffusers_vqdit.utils.fingerprints import model_fingerprint, tokenizer_fingerprint
from diffusers_vqdit.utils.token_ids import makes_token_ids
from diffusers_vqdit.utils.told_errors import told_errors


logger = get_logger(__name__)

PROJECT = "vqdit"  # of the trackers
TASKS = "text->image:3,image->text:2,->image:0.5"
# A label is one code of a sample, of which so few are learned from a step that it gets more of them.
LABELLED = "text->image:2,image->text:2,->image:0.5,label->image:1,image->label:3"
LABELS_ALONE = "label->image:3,image->label:3,->image:0.5"


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train a VQ diffusion transformer.")

    models = parser.add_argument_group("models")
    size = {"num_layers": 8, "num_attention_heads": 4, "attention_head_dim": 64}
    add_model_arguments(models, "Pipeline to finetune", **size)
    models.add_argument("--revision", help="Revision of the pretrained pipeline.")
    models.add_argument("--variant", help="Variant of the pretrained pipeline's files, such as fp16.")
    models.add_argument("--text_vq", type=model_name, help="TextVQModel with its tokenizer, in the same way.")
    add_text_tokenizer_argument(models)
    add_encoder_arguments(models)
    add_patch_argument(models)
    models.add_argument(
        "--use_rotary_positional_embeddings",
        action="store_true",
        help="Rotate queries and keys by position, too: for grids and lengths of other sizes than are trained on.",
    )
    models.add_argument("--dropout", type=share, help="By default the pretrained transformer's, or 0.")
    models.add_argument("--masking", choices=["cosine", "linear"], default="cosine", help="Masking schedule.")

    add_lora_arguments(parser)

    data = add_codes_arguments(parser)
    data.add_argument(
        "--tasks",
        help=f"Tasks and their weights, by default {TASKS}, with labels {LABELLED}, or those of a pretrained "
        "model that doesn't know all of the first. Guidance needs the unconditional task of what is "
        "generated, such as ->image. Besides image, image_lowres, text, label and what --segment names, a task may "
        "name any column of texts. A list that begins with an arrow needs the equals sign: "
        "--tasks='->text:1,text->image:2'.",
    )

    training = add_training_arguments(
        parser,
        output_dir="outputs/vqdit",
        train_batch_size=64,
        num_train_epochs=100,
        learning_rate=None,
        lr_scheduler="cosine",
        lr_warmup_steps=None,
        adam_beta2=0.98,
        adam_weight_decay=0.01,
        ema_decay=None,
    )
    add_transformer_arguments(training)
    training.add_argument(
        "--optimizer",
        choices=["adamw", "muon"],
        help="muon trains the matrices of attention and feed-forward with torch.optim.Muon, all else with AdamW. By "
        "default muon for a new transformer, where torch has it and no engine shards its matrices; adamw else.",
    )
    training.add_argument("--loss_weighting", choices=["flat", "nelbo"], default="flat")

    keeping = add_keeping_arguments(parser)
    add_validation_prompts_argument(keeping)
    keeping.add_argument(
        "--validation_images",
        nargs="*",
        default=[],
        metavar="[SEGMENT=]FILE",
        help="Pictures to draw from in place of prompts, where tasks have pictures given.",
    )

    args = parser.parse_args(input_args)
    check_source(parser, args)
    if args.validation_prompts and args.validation_images:
        parser.error("give one of --validation_prompts and --validation_images: samples are drawn from one of them")
    tokenizers = [args.image_vq, args.text_vq, args.text_tokenizer, args.text_encoder, *args.segment]
    if args.pretrained_model_name_or_path is None and not any(tokenizers):
        parser.error("give --pretrained_model_name_or_path to finetune, or --image_vq and/or --text_vq to start anew")
    if args.text_vq is not None and args.text_tokenizer is not None:
        parser.error("give one of --text_vq and --text_tokenizer: either makes the codes of texts")
    if args.rank is not None and args.pretrained_model_name_or_path is None:
        parser.error("--rank needs --pretrained_model_name_or_path: a LoRA changes a trained pipeline")
    if args.rank is not None and find_spec("peft") is None:
        parser.error('--rank needs the library peft: pip install "diffusers_vqdit[lora]", or -e ".[lora]" in a clone')
    if args.rank is not None and args.optimizer == "muon":
        parser.error("--optimizer muon trains whole matrices of blocks: drop --rank, or give --optimizer adamw")
    if args.tasks is None and not (
        args.resume_from_checkpoint or args.pretrained_model_name_or_path or args.codes_dir
    ):
        args.tasks = default_tasks(args)
    refuse_unused_arguments(parser, args)
    return args


def load_components(args: argparse.Namespace) -> dict:
    """The pipeline's parts that are there before training: all of them when finetuning, else the tokenizers."""
    if args.pretrained_model_name_or_path is not None:
        pipeline = VQDiTPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, cache_dir=args.cache_dir
        )
        reading = {name: pipeline.config[name] for name in ("lowres_factor", "resize_mode", "segments")}
        return {**pipeline.components, "labels": list(pipeline.config.labels), **reading}
    text_vq, tokenizer = load_text_vq(args.text_vq, cache_dir=args.cache_dir) if args.text_vq else (None, None)
    if args.text_tokenizer is not None:
        tokenizer = load_text_tokenizer(args.text_tokenizer, cache_dir=args.cache_dir)
    return {
        "image_vq": load_image_vq(args.image_vq, cache_dir=args.cache_dir) if args.image_vq else None,
        "text_vq": text_vq,
        "tokenizer": tokenizer,
        **load_encoders(args),
        "transformer": None,
        "segment_tokenizers": None,
        "scheduler": MaskedDiffusionScheduler(masking=args.masking),
        "labels": [],
        "lowres_factor": args.lowres_factor or 2,
        "resize_mode": args.resize_mode or ("crop" if args.codes_dir else "auto"),  # of codes that don't say it
        "segments": {},
    }


def build_transformer(
    args: argparse.Namespace,
    pretrained: VQDiTTransformer2DModel | None,
    segments: dict[str, dict],
    labels: dict[str, list[str]],
    tasks: list[tuple[Task, float]],
    newly_bucketed: set[str],
) -> VQDiTTransformer2DModel:
    """The transformer that is trained: a new one, or the pretrained one with what the data has beside its own."""
    names = [str(task) for task, _ in tasks]
    if pretrained is None:
        transformer = VQDiTTransformer2DModel(
            num_attention_heads=args.num_attention_heads,
            attention_head_dim=args.attention_head_dim,
            num_layers=args.num_layers,
            dropout=args.dropout or 0.0,
            segments=segments,
            tasks=names,
            use_rotary_positional_embeddings=args.use_rotary_positional_embeddings,
        )
    else:
        transformer = extend_transformer(
            pretrained, segments, labels, names, lora=args.rank is not None, newly_bucketed=newly_bucketed
        )
        transformer.float()
        if args.dropout is not None:
            set_dropout(transformer, args.dropout)
    transformer.train()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # each task has its own lengths
        transformer.compile_repeated_blocks()
    if args.rank is not None:
        add_lora(transformer, args)
    return transformer


def loss_measures(args: argparse.Namespace, task_losses: dict[str, float]) -> list[Measure]:
    """The losses of the tasks, for the model card."""
    metric = f"training loss ({args.loss_weighting})"
    return [Measure(task, metric, loss, "training data") for task, loss in task_losses.items()]


def main(args: argparse.Namespace) -> None:
    # A step trains the embeddings and heads of its task's segments only.
    accelerator = setup.make_accelerator(args, find_unused_parameters=True)
    check_device(accelerator.device, "accelerate launch --cpu")
    if args.optimizer == "muon":
        check_muon(accelerator)
    with setup.open_run(
        args,
        accelerator,
        project=PROJECT,
        folders=["samples", "codes", "transformer", "scheduler", *VQDiTPipeline._optional_components],
        files=["README.md", "model_index.json", "pipeline.py"],
    ) as run:
        train(args, accelerator, run)


def default_tasks(
    args: argparse.Namespace, checkpoint: Path | None = None, pretrained: VQDiTTransformer2DModel | None = None
) -> str:
    """The tasks where ``--tasks`` gives none.

    Those of the run that goes on; or those of captioned or labelled pictures, by what the data have; or all of a
    pretrained transformer that doesn't know those of captions.
    """
    kept = {} if checkpoint is None else read_manifest(checkpoint).identity
    if kept.get("script") == "train_vqdit":  # a run of another one is refused later
        return ",".join(f"{task}:{weight}" for task, weight in kept["tasks"].items())
    labelled, texts = args.label_column is not None, has_captions(args)
    states = not (args.text_vq or args.text_tokenizer)  # of an encoder, which no task generates
    if pretrained is not None:
        segments = pretrained.config.segments
        texts, states = TEXT in segments, "channels" in segments.get(TEXT, {})
    elif args.codes_dir is not None:
        segments = CodeDataset(args.codes_dir).segments
        labelled, texts, states = LABEL in segments, TEXT in segments, "channels" in segments.get(TEXT, {})
    usual = (LABELLED if texts else LABELS_ALONE) if labelled else TASKS
    if texts and states:
        usual = ",".join(task for task in usual.split(",") if f"->{TEXT}" not in task)
    known = pretrained.config.tasks if pretrained is not None and not labelled else None
    return usual if not known or {str(task) for task, _ in parse_tasks(usual)} <= set(known) else ",".join(known)


def run_identity(
    args: argparse.Namespace,
    parts: dict,
    codes: CodeDataset,
    transformer: VQDiTTransformer2DModel,
    tasks: list[tuple[Task, float]],
    labels: list[str],
) -> dict:
    """What must be as it was where a run is resumed."""
    container = parts["segment_tokenizers"]
    several = {} if container is None else {name: container.parts[name] for name in container.config.kinds}
    several = {name: tokenizer_fingerprint(one) if makes_token_ids(one) else one for name, one in several.items()}
    return {
        "script": "train_vqdit",
        **{name: getattr(args, name) for name in ("optimizer", "loss_weighting", "use_ema")},
        **{name: getattr(args, name) for name in ("rank", "lora_alpha", "lora_layers")},
        "tasks": {str(task): weight for task, weight in tasks},
        "transformer": plain_config(transformer),
        "scheduler": plain_config(parts["scheduler"]),
        **codes.identity(),
        **{name: fingerprint(parts[name]) for name in ("image_vq", "text_vq")},
        **{name: codes.fingerprints[name] for name in ENCODERS if name in codes.fingerprints},
        **{f"tokenizer {name}": fingerprint(one) for name, one in several.items()},
        "labels": labels,
    }


def train(args: argparse.Namespace, accelerator: Accelerator, run: TrainingRun) -> None:
    # 1. Tasks, tokenizers, codes
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    parts = load_components(args)
    args.optimizer = args.optimizer or default_optimizer(accelerator, checkpoint, parts["transformer"])
    if args.tasks is None:
        args.tasks = default_tasks(args, checkpoint, parts["transformer"])
    tasks = parse_tasks(args.tasks)
    names = {name for task, _ in tasks for name in task.segments}
    if args.rank is not None:
        check_lora_layers(parts["transformer"], args.lora_layers)
    check_new_patches(parts["transformer"], args.patch, names)
    codes = load_codes(args, parts, names, accelerator)
    missing = names - set(codes.segments)
    if missing:
        raise ValueError(missing_segments(args.tasks, missing, codes.segments))
    known_labels = parts.pop("labels")
    labels = codes.labels if LABEL in names else known_labels

    # 2. Transformer, optimizer, learning rate
    needed = names | {codes.segments[name].get("shared_with", name) for name in names}
    read = {name: one for name, one in codes.entries.items() if name in needed}
    parts["segments"], newly_bucketed = extend_entries(parts["segments"], read)
    segments = with_patches({name: segment for name, segment in codes.segments.items() if name in needed}, args.patch)
    base = None if args.rank is None else model_fingerprint(parts["transformer"])
    grown = names_of_labels(parts["segments"], labels)
    transformer = build_transformer(args, parts["transformer"], segments, grown, tasks, newly_bucketed)
    if parts["transformer"] is None:
        start_embeddings(transformer, tokenizers_of(parts, codes.entries))
    scheduler = parts["scheduler"]
    rate = transformer_learning_rate(transformer.inner_dim, pretrained=parts["transformer"] is not None)
    setup.set_default(args, "learning_rate", checkpoint, rate)
    transformer, optimizer, lr_scheduler, max_steps = setup.prepare(
        args, accelerator, transformer, len(codes), checkpoint=checkpoint, scale_lr=args.scale_lr
    )
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    ema = setup.make_ema(args, trained, accelerator.device)

    def build_pipeline(whole: VQDiTTransformer2DModel) -> VQDiTPipeline:
        pipeline = VQDiTPipeline(**{**parts, "transformer": whole, "id2label": dict(enumerate(labels))})
        return pipeline.to(accelerator.device)  # the tokenizers too, which encoded nothing where codes were given

    argument, flag = ("image", "validation_images") if args.validation_images else ("prompt", "validation_prompts")
    wanted = getattr(args, flag)
    with evaluated(accelerator, transformer) as whole:
        if whole is not None:
            check_drawable(build_pipeline(whole), argument, flag, wanted)

    # 3. Resume
    identity = run_identity(args, parts, codes, unwrap(transformer), tasks, labels)
    identity |= {"segments": segments, "base of the LoRA": base}
    measures = run.begin(checkpoint, identity=identity, args=args, states={"ema": ema})
    setup.start_trackers(args, accelerator, PROJECT)

    # 4. Train
    step, micro_step = run.step, run.step * args.gradient_accumulation_steps
    batches = setup.run_batches(args, accelerator, len(codes), step, codes.buckets)
    progress = setup.progress_bar(accelerator, max_steps, step)
    task_losses: dict[str, float] = measures.get("task_losses", {})
    throughput, stop = Throughput(), False
    utilisation = Utilisation(args, accelerator)
    watch = TrainingWatch(accelerator, args)
    while step < max_steps and not stop:
        rows = next(batches)
        batch = draw_batch(codes, tasks, rows, accelerator, seed=args.seed, step=micro_step)
        with accelerator.accumulate(transformer), utilisation.counting():
            loss = masked_diffusion_loss(
                transformer,
                scheduler,
                batch.given,
                batch.generated,
                weighting=args.loss_weighting,
                timesteps=batch.timesteps,
                generator=batch.generator,
            )
            norm = run.descend(optimizer, trained, loss, args.max_grad_norm, lr_scheduler, ema)
        micro_step += 1
        throughput.add(len(rows) * accelerator.num_processes)
        average = track_loss(accelerator, task_losses, batch.task, loss)
        if not accelerator.sync_gradients:
            continue

        step += 1
        run.end_step(step)
        logs = {"lr": lr_scheduler.get_last_lr()[0], "gradient_norm": norm, "skipped_steps": run.skipped_steps}
        logs |= utilisation.figures()
        progress.update(1)
        speed = throughput.end_step()
        progress.set_postfix({**{name: f"{x:.3f}" for name, x in task_losses.items()}, "images/s": shown_rate(speed)})
        accelerator.log({f"loss/{batch.task}": average, **logs, "images_per_second": speed}, step=step)
        if wanted and due(step, args.validation_steps):
            with evaluated(accelerator, transformer, ema, trained) as whole:
                if whole is not None:
                    draw_validation(args, accelerator, build_pipeline(whole), wanted, step, argument=argument)
        watch.look(step, average, norm)
        stop = run.stop_requested()
        if stop or due(step, args.checkpointing_steps) or step == max_steps:
            kept = run.kept(task_losses=task_losses)
            save_checkpoint(accelerator, args.output_dir, step, total_limit=args.checkpoints_total_limit, **kept)
            if publishes_checkpoints(args) and step < max_steps and not stop:
                with evaluated(accelerator, transformer, ema, trained) as whole:
                    if whole is not None:
                        measured = loss_measures(args, task_losses)
                        publish_pipeline(args, build_pipeline(whole), measured, wanted, argument=argument, step=step)
        throughput.go_on()
    progress.close()

    # 5. Save the pipeline
    accelerator.wait_for_everyone()
    if not stop or step == max_steps:
        with evaluated(accelerator, transformer, ema, trained) as whole:
            if whole is not None:
                measured = loss_measures(args, task_losses)
                publish_pipeline(args, build_pipeline(whole), measured, wanted, argument=argument)
        logger.info(f"saved to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
