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
pretrained one instead, for ``load_lora_weights``. The starter checkpoint's command,
running time and figures stand in its model card.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from tqdm.auto import tqdm

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.tasks import parse_tasks
from diffusers_vqdit.training.arguments import (
    add_keeping_arguments,
    add_patch_argument,
    add_training_arguments,
    add_transformer_arguments,
    tracker_config,
    with_patches,
)
from diffusers_vqdit.training.checkpoints import find_checkpoint, fingerprint, plain_config
from diffusers_vqdit.training.codes import RESERVED, CodeDataset, encode_dataset
from diffusers_vqdit.training.columns import encode_labels
from diffusers_vqdit.training.data import load_training_dataset, shuffled_batches
from diffusers_vqdit.training.draws import row_generators, step_generator
from diffusers_vqdit.training.files import (
    full_disk_named,
    save_pretrained_atomically,
    scratch_folder,
)
from diffusers_vqdit.training.launch import make_accelerator
from diffusers_vqdit.training.masked_loss import draw_task, masked_diffusion_loss, stratified_timesteps
from diffusers_vqdit.training.model_card import Measure, published_name
from diffusers_vqdit.training.optimization import averaged_weights, parameter_groups, set_dropout, unwrap
from diffusers_vqdit.training.publish import draw_gallery, publish_run, publishes_checkpoints
from diffusers_vqdit.training.run import TrainingRun, check_drawable, due, training_run
from diffusers_vqdit.training.tokenizers import load_image_vq, load_text_vq
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    integer,
    model_name,
    non_negative_integer,
    positive_integer,
    share,
)
from diffusers_vqdit.utils.weight_files import check_finite, move_into_place


logger = get_logger(__name__)

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train a VQ diffusion transformer.")

    models = parser.add_argument_group("models")
    models.add_argument(
        "--pretrained_model_name_or_path", type=model_name, help="Pipeline to finetune: a folder or a Hub id."
    )
    models.add_argument("--revision", help="Revision of the pretrained pipeline.")
    models.add_argument("--variant", help="Variant of the pretrained pipeline's files, such as fp16.")
    models.add_argument(
        "--image_vq",
        type=model_name,
        help="ImageVQModel for training from scratch: a folder or a Hub id of its own or of a pipeline.",
    )
    models.add_argument("--text_vq", type=model_name, help="TextVQModel with its tokenizer, in the same way.")
    models.add_argument("--num_layers", type=positive_integer, default=8)
    models.add_argument("--num_attention_heads", type=positive_integer, default=4)
    models.add_argument("--attention_head_dim", type=positive_integer, default=64)
    add_patch_argument(models)
    models.add_argument("--dropout", type=share, help="By default the pretrained transformer's, or 0.")
    models.add_argument("--masking", choices=["cosine", "linear"], default="cosine", help="Masking schedule.")

    lora = parser.add_argument_group("LoRA, in place of training all weights")
    lora.add_argument(
        "--rank", type=positive_integer, help="Rank of the LoRA matrices. Without it all weights are trained."
    )
    lora.add_argument(
        "--lora_alpha", type=positive_integer, help="Scale of the LoRA, alpha / rank; by default alpha is the rank."
    )
    lora.add_argument("--lora_dropout", type=share, default=0.0)
    lora.add_argument("--lora_layers", nargs="+", default=LORA_LAYERS, help="Linear layers that get LoRA matrices.")

    data = parser.add_argument_group("data")
    data.add_argument("--codes_dir", help="Folder written by encode_dataset.py.")
    data.add_argument("--dataset_name", help="Hub dataset, or path of a parquet file, to encode at the start.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="Image folder with metadata.jsonl, to encode at the start.")
    data.add_argument("--image_column", default="image")
    data.add_argument("--caption_column", default="text")
    data.add_argument("--prompt_columns", nargs="*", default=[], help="More wordings, used where the text is given.")
    data.add_argument("--label_column")
    data.add_argument(
        "--image_augmentations",
        type=non_negative_integer,
        default=0,
        help="Moved copies of each picture, used where it is given.",
    )
    data.add_argument(
        "--lowres_factor",
        type=integer(2),
        help="How many times smaller image_lowres is; by default as in the codes or the pretrained pipeline, or 2.",
    )
    data.add_argument(
        "--resize_mode",
        choices=["crop", "pad"],
        help="How pictures that are not square become so; by default as in the codes or the pretrained pipeline, or "
        "crop.",
    )
    data.add_argument("--max_train_samples", type=positive_integer)
    data.add_argument("--cache_dir")
    data.add_argument(
        "--tasks",
        default="text->image:4,image->text:2,->image:1",
        help="Tasks and their weights. Guidance needs the unconditional task of what is generated, such as ->image. "
        "Besides image, image_lowres, text and label, a task may name any column of texts. A list that begins with an "
        "arrow needs the equals sign: --tasks='->text:1,text->image:2'.",
    )

    training = add_training_arguments(
        parser,
        output_dir="outputs/vqdit",
        train_batch_size=64,
        num_train_epochs=100,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=200,
        adam_beta2=0.98,
        adam_weight_decay=0.01,
        ema_decay=0.999,
    )
    add_transformer_arguments(training)
    training.add_argument("--loss_weighting", choices=["flat", "nelbo"], default="flat")

    keeping = add_keeping_arguments(parser)
    keeping.add_argument("--validation_prompts", nargs="*", default=[])

    args = parser.parse_args(input_args)
    sources = [args.codes_dir, args.dataset_name, args.train_data_dir]
    if sum(source is not None for source in sources) != 1:
        parser.error("give one of --codes_dir, --dataset_name and --train_data_dir")
    if args.pretrained_model_name_or_path is None and args.image_vq is None and args.text_vq is None:
        parser.error("give --pretrained_model_name_or_path to finetune, or --image_vq and/or --text_vq to start anew")
    if args.rank is not None and args.pretrained_model_name_or_path is None:
        parser.error("--rank needs --pretrained_model_name_or_path: a LoRA changes a trained pipeline")
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
    return {
        "image_vq": load_image_vq(args.image_vq, cache_dir=args.cache_dir) if args.image_vq else None,
        "text_vq": text_vq,
        "tokenizer": tokenizer,
        "transformer": None,
        "scheduler": MaskedDiffusionScheduler(masking=args.masking),
        "labels": [],
        "lowres_factor": args.lowres_factor or 2,
        "resize_mode": args.resize_mode or "crop",
        "segments": {},
    }


def settle_reading(args: argparse.Namespace, parts: dict, codes: CodeDataset | None) -> None:
    """How pictures are read, in `parts`, for the saved pipeline: as in the codes, or as the arguments say.

    Raises:
        ValueError: if these differ, or the pretrained pipeline knows low resolution by another factor.
    """
    given = {"lowres_factor": args.lowres_factor, "resize_mode": args.resize_mode}
    if codes is not None:
        found = {"lowres_factor": codes.lowres_factor, "resize_mode": codes.settings.get("resize_mode")}
        for name, value in found.items():
            if None not in (value, given[name]) and value != given[name]:
                raise ValueError(f"{name}={given[name]!r}, but the codes in {args.codes_dir!r} have {value!r}")
        given = found
    known = parts["transformer"].config.segments if parts["transformer"] is not None else {}
    if "image_lowres" in known and given["lowres_factor"] not in (None, parts["lowres_factor"]):
        raise ValueError(
            f"lowres_factor={given['lowres_factor']}, but the pretrained pipeline's is {parts['lowres_factor']}"
        )
    parts |= {name: value for name, value in given.items() if value is not None}


def load_codes(args: argparse.Namespace, parts: dict, segments: set[str], accelerator: Accelerator) -> CodeDataset:
    """Read the folder of codes, after writing it from pictures and captions where that is what was given."""
    if args.codes_dir is not None:
        codes = CodeDataset(args.codes_dir)
        codes.check_tokenizers(parts["image_vq"], parts["text_vq"], parts["tokenizer"])
        known = parts["labels"]
        if "label" in segments and known and codes.labels[: len(known)] != known:
            raise ValueError(
                f"the codes in {args.codes_dir!r} have the labels {codes.labels}, but the pretrained pipeline has "
                f"{known}: theirs must come first, in their order; or give the data itself, not its codes"
            )
        settle_reading(args, parts, codes)
        return codes
    settle_reading(args, parts, None)
    text_columns = sorted(segments - set(RESERVED))
    image_column = args.image_column if segments & {"image", "image_lowres"} else None
    caption_column = args.caption_column if text_columns or "text" in segments else None
    label_column = args.label_column if "label" in segments else None
    prompt_columns = args.prompt_columns if caption_column is not None else []
    dataset = load_training_dataset(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        columns=[c for c in (caption_column, label_column, *prompt_columns, *text_columns) if c is not None],
        image_column=image_column,
        max_samples=args.max_train_samples,
        cache_dir=args.cache_dir,
        output_dir=args.output_dir,
    )
    folder = args.output_dir / "codes"
    if accelerator.is_main_process:
        labels = None
        if label_column is not None:
            # Names that a pretrained pipeline lacks come after its own.
            feature, known = dataset.features[label_column], dict(enumerate(parts["labels"]))
            labels = list(encode_labels(dataset[label_column], label_column, feature, known)[1].values())
        resolution = 0
        if image_column is not None and parts["image_vq"] is not None:
            known = parts["transformer"].config.segments if parts["transformer"] is not None else {}
            image_vq = parts["image_vq"]
            resolution = image_vq.config.sample_size
            if "image" in known:
                resolution = known["image"]["shape"][0] * image_vq.downsample_factor
        for name in ("image_vq", "text_vq"):
            if parts[name] is not None:
                parts[name].to(accelerator.device)
        encode_dataset(
            dataset,
            folder,
            resolution=resolution,
            image_vq=parts["image_vq"],
            text_vq=parts["text_vq"],
            tokenizer=parts["tokenizer"],
            image_column=image_column,
            caption_column=caption_column,
            prompt_columns=prompt_columns,
            text_columns=text_columns,
            label_column=label_column,
            labels=labels,
            image_augmentations=args.image_augmentations,
            lowres_factor=parts["lowres_factor"] if "image_lowres" in segments else None,
            resize_mode=parts["resize_mode"],
        )
    accelerator.wait_for_everyone()
    return CodeDataset(folder)


def save_lora(transformer: VQDiTTransformer2DModel, folder: Path) -> list[str]:
    """Write the LoRA as diffusers' pipelines load it, in place of an earlier one once it is whole; names the file."""
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(transformer)
    check_finite(layers, "the LoRA is not saved")
    with scratch_folder(folder) as scratch, full_disk_named("the LoRA", folder):
        VQDiTPipeline.save_lora_weights(
            scratch,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
        return move_into_place(scratch, folder)


def validate(args: argparse.Namespace, pipeline: VQDiTPipeline, accelerator: Accelerator, step: int) -> None:
    """Draw the validation prompts with a fixed seed; keep them as a PNG and send them to the trackers."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(args.validation_prompts))]
    images = pipeline(args.validation_prompts, generator=generators).images
    folder = args.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    columns = min(8, len(images))
    blank = [images[0].copy() for _ in range(-len(images) % columns)]
    make_image_grid([*images, *blank], rows=math.ceil(len(images) / columns), cols=columns).save(
        folder / f"step-{step:06d}.png"
    )
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images(
                "validation", np.stack([np.asarray(i) for i in images]), step, dataformats="NHWC"
            )
        elif tracker.name == "wandb":
            tracker.log_images({"validation": images}, step=step)


def main(args: argparse.Namespace) -> None:
    # A step trains the embeddings and heads of its task's segments only.
    accelerator = make_accelerator(args, find_unused_parameters=True)
    with training_run(
        accelerator,
        args.output_dir,
        folders=["samples", "codes", "transformer", "scheduler", "image_vq", "text_vq", "tokenizer"],
        files=["README.md", "model_index.json", "pipeline.py"],
        max_skipped_steps=args.max_skipped_steps,
    ) as run:
        train(args, accelerator, run)


def train(args: argparse.Namespace, accelerator: Accelerator, run: TrainingRun) -> None:
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # 1. Tasks, tokenizers, codes
    tasks = parse_tasks(args.tasks)
    names = {name for task, _ in tasks for name in task.segments}
    parts = load_components(args)
    codes = load_codes(args, parts, names, accelerator)
    missing = names - set(codes.segments)
    if missing:
        raise ValueError(
            f"tasks={args.tasks!r} need the segments {sorted(missing)}; the data has {sorted(codes.segments)}"
        )
    known_labels = parts.pop("labels")
    labels = codes.labels if "label" in names or not known_labels else known_labels

    # 2. Transformer
    transformer = parts["transformer"]
    needed = names | {codes.segments[name].get("shared_with", name) for name in names}
    parts["segments"] = parts["segments"] | {name: one for name, one in codes.entries.items() if name in needed}
    segments = with_patches({name: segment for name, segment in codes.segments.items() if name in needed}, args.patch)
    if transformer is None:
        transformer = VQDiTTransformer2DModel(
            num_attention_heads=args.num_attention_heads,
            attention_head_dim=args.attention_head_dim,
            num_layers=args.num_layers,
            dropout=args.dropout or 0.0,
            segments=segments,
            tasks=[str(task) for task, _ in tasks],
        )
    else:
        known = transformer.config.segments
        if "label" in known and "label" in segments and len(labels) > known["label"]["vocab_size"]:
            if args.rank is not None:
                raise ValueError(
                    f"the labels {labels[len(known_labels) :]} are new to the pipeline; a LoRA can't add them: drop "
                    "--rank"
                )
            transformer = transformer.with_vocab_size("label", len(labels))
            known = transformer.config.segments
        for name, segment in segments.items():
            own = {key: known[name][key] for key in ("patch", "separate_codebooks") if key in known.get(name, ())}
            if name in known and {**own, **segment} != known[name]:
                raise ValueError(
                    f"segment {name!r} is {segment} in the data but {known[name]} in the pretrained transformer"
                )
        if new := {name: segment for name, segment in segments.items() if name not in known}:
            if args.rank is not None:
                raise ValueError(
                    f"the segments {sorted(new)} are new to the pipeline; a LoRA can't add them: drop --rank"
                )
            transformer = transformer.with_segments(new)
        known = list(transformer.config.tasks or [])
        transformer.register_to_config(tasks=known + [str(t) for t, _ in tasks if str(t) not in known])
        transformer.to(torch.float32)
        if args.dropout is not None:
            set_dropout(transformer, args.dropout)
    transformer.train()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # each task has its own lengths
        transformer.compile_repeated_blocks()
    if args.rank is not None:
        from peft import LoraConfig

        transformer.requires_grad_(False)
        alpha = args.lora_alpha or args.rank
        transformer.add_adapter(
            LoraConfig(r=args.rank, lora_alpha=alpha, lora_dropout=args.lora_dropout, target_modules=args.lora_layers)
        )
    scheduler = parts["scheduler"]
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    ema = EMAModel(trained, decay=args.ema_decay, foreach=True) if args.use_ema else None

    # 3. Optimizer and learning rate
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.gradient_accumulation_steps * accelerator.num_processes
    optimizer = torch.optim.AdamW(
        parameter_groups(transformer, args.adam_weight_decay),
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    max_steps = args.max_train_steps or math.ceil(len(codes) / global_batch) * args.num_train_epochs
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_steps
    )
    transformer, optimizer, lr_scheduler = accelerator.prepare(transformer, optimizer, lr_scheduler)
    if ema is not None:
        ema.to(accelerator.device)

    def build_pipeline() -> VQDiTPipeline:
        pipeline = VQDiTPipeline(**{**parts, "transformer": unwrap(transformer), "labels": labels})
        return pipeline.to(accelerator.device)  # the tokenizers too, which encoded nothing where codes were given

    if accelerator.is_main_process:
        check_drawable(build_pipeline(), "prompt", "validation_prompts", args.validation_prompts)

    # 4. Resume
    more_states = {"ema": ema} if ema is not None else {}
    # Of what was encoded, where the folder tells: encoded again on a GPU it may give some other codes.
    made_of = [codes.fingerprints["data"], codes.settings] if "data" in codes.fingerprints else None
    identity = {
        "script": "train_vqdit",
        **{name: getattr(args, name) for name in ("loss_weighting", "use_ema", "rank", "lora_alpha", "lora_layers")},
        "tasks": {str(task): weight for task, weight in tasks},
        "segments": segments,
        "transformer": plain_config(unwrap(transformer)),
        "scheduler": plain_config(scheduler),
        "training data": fingerprint(made_of or [codes.codes, codes.prompts, codes.variants]),
        **{name: fingerprint(parts[name]) for name in ("image_vq", "text_vq")},
        "labels": labels,
    }
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    measures = run.begin(checkpoint, identity=identity, args=args, states=more_states)
    step = run.step
    if accelerator.is_main_process and accelerator.log_with:
        accelerator.init_trackers("vqdit", config=tracker_config(args))

    parameters = sum(p.numel() for p in trained)
    logger.info(
        f"{len(codes)} samples, {parameters / 1e6:.1f} M trained parameters, {max_steps} steps of batch {global_batch}"
    )

    # 5. Train
    micro_step = step * args.gradient_accumulation_steps
    batches = shuffled_batches(
        len(codes),
        args.train_batch_size,
        seed=args.seed,
        start=micro_step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    progress = tqdm(total=max_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)
    task_losses: dict[str, float] = measures.get("task_losses", {})
    started, seen, stop = time.time(), 0, False

    def publish(step: int | None = None) -> None:
        """Save the pipeline, or the LoRA, and its card, and push them where that is asked for."""
        unwrap(transformer).eval()
        with averaged_weights(ema, trained):
            name, pipeline, losses = published_name(args), build_pipeline(), task_losses.items()
            if args.rank is not None:
                files = save_lora(unwrap(transformer), args.output_dir)
            else:
                files = save_pretrained_atomically(pipeline, args.output_dir)
            publish_run(
                args,
                pipeline,
                files=files,
                measures=[
                    Measure(task, f"training loss ({args.loss_weighting})", x, "training data") for task, x in losses
                ],
                samples=draw_gallery(
                    pipeline, args.validation_prompts, args.output_dir, name, args.seed, hub_token=args.hub_token
                ),
                step=step,
            )
        unwrap(transformer).train()

    while step < max_steps:
        rows = next(batches)
        # Drawn for the global batch, however many processes share it: one task, so that all train the same parameters,
        # and each row's time, wording and masks.
        rank, generator = accelerator.process_index, step_generator(args.seed, micro_step)
        task = draw_task(tasks, generator)
        times = stratified_timesteps(len(rows), generator, rank=rank, world_size=accelerator.num_processes)
        generators = row_generators(args.seed, micro_step, len(rows), rank=rank)
        given, generated = codes.batch(rows, task, generator=generators)
        given = {name: value.to(accelerator.device) for name, value in given.items()}
        generated = {name: value.to(accelerator.device) for name, value in generated.items()}
        with accelerator.accumulate(transformer):
            loss = masked_diffusion_loss(
                transformer,
                scheduler,
                given,
                generated,
                weighting=args.loss_weighting,
                timesteps=times,
                generator=generators,
            )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm, stepped = run.optimizer_step(optimizer, trained, loss, args.max_grad_norm)
                if stepped:
                    lr_scheduler.step()
            optimizer.zero_grad()
        micro_step += 1
        seen += len(rows) * accelerator.num_processes
        average = accelerator.reduce(loss.detach(), "mean").item()
        if math.isfinite(average):
            task_losses[str(task)] = 0.95 * task_losses.get(str(task), average) + 0.05 * average
        if not accelerator.sync_gradients:
            continue

        step += 1
        run.end_step(step)
        if ema is not None and stepped:
            ema.step(trained)
        progress.update(1)
        rate = lr_scheduler.get_last_lr()[0]
        speed = seen / (time.time() - started)
        progress.set_postfix({**{name: f"{x:.3f}" for name, x in task_losses.items()}, "images/s": f"{speed:.0f}"})
        accelerator.log(
            {
                f"loss/{task}": average,
                "lr": rate,
                "gradient_norm": norm,
                "skipped_steps": run.skipped_steps,
                "images_per_second": speed,
            },
            step=step,
        )
        if args.validation_prompts and accelerator.is_main_process and due(step, args.validation_steps):
            unwrap(transformer).eval()
            with averaged_weights(ema, trained):
                validate(args, build_pipeline(), accelerator, step)
            unwrap(transformer).train()
        stop = run.stop_requested()
        if stop or due(step, args.checkpointing_steps) or step == max_steps:
            run.save(step, {"task_losses": task_losses}, total_limit=args.checkpoints_total_limit)
            if stop:
                break
            if accelerator.is_main_process and publishes_checkpoints(args) and step < max_steps:
                publish(step)
    progress.close()

    # 6. Save the pipeline
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not stop:
        publish()
        logger.info(f"saved to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
