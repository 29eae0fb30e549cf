#!/usr/bin/env python
"""Train or finetune a DiT over the continuous latents of a VQ model: Gaussian diffusion or flow matching.

The DiT recipe (Peebles & Xie 2023, section 4: epsilon, linear schedule, learned variance, labels dropped at 10 %):

    accelerate launch training/train_latent_dit.py --train_data_dir my_pictures --label_column label \
        --image_vq outputs/image_vq --objective epsilon --learn_sigma --learning_rate 1e-4 --lr_scheduler constant \
        --lr_warmup_steps 0 --adam_weight_decay 0 --use_ema --ema_decay 0.9999 --random_flip --output_dir outputs/dit

The SiT recipe (Ma et al. 2024: the same with velocity and a linear path) has ``--objective flow`` in place of
``--objective epsilon --learn_sigma``. Captions need ``--text_vq`` or ``--text_encoder`` and ``--caption_columns``.
With captions and labels each is dropped on its own. For pictures of captions alone, drop most labels
(``--label_dropout 0.7 --caption_dropout 0.25``): at 0.1 each, nine in a hundred samples have a caption alone.
``--alignment_encoder facebook/dinov2-base`` aligns hidden states to a frozen encoder's features (REPA), which speeds
training up.

Pictures are encoded once, at the start, by all processes; ``--latents_file`` keeps the latents for the next run. The
latents' statistics are measured then and saved in the VQ's config. The output folder is a complete pipeline, for
``VQDiTLatentPipeline.from_pretrained``. The time of a run and the figures to expect depend on the data: the model card
of a checkpoint states its own.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_vqdit import VQDiTLatentPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.pipelines.frozen_encoders import check_sequence_length, load_text_encoder
from diffusers_vqdit.schedulers.samplers import uniform
from diffusers_vqdit.training import setup
from diffusers_vqdit.training.alignment import (
    FEATURES_FILE,
    AlignedTransformer,
    cache_features,
    load_alignment_encoder,
)
from diffusers_vqdit.training.arguments import (
    add_keeping_arguments,
    add_model_arguments,
    add_training_arguments,
    add_transformer_arguments,
)
from diffusers_vqdit.training.caption_states import caption_channels
from diffusers_vqdit.training.checkpoints import find_checkpoint, fingerprint, plain_config, save_checkpoint
from diffusers_vqdit.training.draws import row_generators
from diffusers_vqdit.training.files import check_output_file
from diffusers_vqdit.training.finetuning import as_trainable, check_layers
from diffusers_vqdit.training.image_arguments import add_image_arguments
from diffusers_vqdit.training.latent_data import (
    STATES_FILE,
    data_identity,
    draw_conditions,
    encode_captions_of,
    load_data,
    settle_statistics,
    take_rows,
)
from diffusers_vqdit.training.latent_files import LATENTS_FILE, cache_latents, check_latents_file
from diffusers_vqdit.training.latent_loss import alignment_loss, latent_diffusion_loss
from diffusers_vqdit.training.model_card import Measure
from diffusers_vqdit.training.optimization import unwrap
from diffusers_vqdit.training.publish import publish_pipeline, publishes_checkpoints
from diffusers_vqdit.training.row_stream import LISTED_FOLDER
from diffusers_vqdit.training.run import TrainingRun, check_drawable, due
from diffusers_vqdit.training.sharding import evaluated
from diffusers_vqdit.training.streaming_arguments import add_streaming_argument, check_streaming
from diffusers_vqdit.training.throughput import Throughput, shown_rate
from diffusers_vqdit.training.tokenizers import load_image_vq, load_text_vq
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.training.utilisation import Utilisation
from diffusers_vqdit.training.validation import draw_validation
from diffusers_vqdit.training.watch import TrainingWatch
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    non_negative_number,
    positive_integer,
    positive_number,
    share,
)
from diffusers_vqdit.utils.fingerprints import model_fingerprint
from diffusers_vqdit.utils.told_errors import told_errors


logger = get_logger(__name__)

PROJECT = "vqdit-latent"  # of the trackers


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train a DiT over VQ latents.")

    models = parser.add_argument_group("models")
    size = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}
    add_model_arguments(models, "Latent pipeline to finetune", **size)
    models.add_argument(
        "--text_vq", type=model_name, help="TextVQModel with its tokenizer, for captions, in the same way."
    )
    models.add_argument("--text_encoder", type=model_name, help="Frozen transformers text encoder, for captions.")
    models.add_argument(
        "--max_sequence_length",
        type=positive_integer,
        help="Tokens of a caption for --text_encoder; by default the pretrained pipeline's, or as many as it takes, "
        "512 at most.",
    )
    models.add_argument("--patch_size", type=positive_integer, default=2)
    models.add_argument("--dropout", type=share, default=0.0)

    objective = parser.add_argument_group("objective")
    objective.add_argument("--objective", choices=["epsilon", "v_prediction", "flow"], default="flow")
    objective.add_argument("--learn_sigma", action="store_true", help="Learn the variance too, with epsilon.")
    objective.add_argument("--snr_gamma", type=positive_number, help="Gamma of min-SNR weighting, such as 5.")
    objective.add_argument("--logit_normal", action="store_true", help="Draw flow matching's noise levels so.")
    objective.add_argument("--shift", type=positive_number, default=1.0, help="Shift of flow matching's noise levels.")
    objective.add_argument("--label_dropout", type=share, default=0.1, help="Share of labels dropped, for guidance.")
    objective.add_argument("--caption_dropout", type=share, default=0.1, help="Share of captions dropped.")
    objective.add_argument(
        "--alignment_encoder", type=model_name, help="Frozen transformers vision encoder to align to (REPA)."
    )
    objective.add_argument("--alignment_weight", type=non_negative_number, default=0.5)
    objective.add_argument(
        "--alignment_layer", type=positive_integer, default=4, help="Block whose output is aligned, from 1."
    )

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub dataset, or files of it: a path, folder or pattern.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="Image folder with metadata.jsonl.")
    data.add_argument("--image_column", default="image")
    data.add_argument("--caption_columns", nargs="*", default=[], help="Wordings, of which one is drawn each time.")
    data.add_argument("--label_column")
    data.add_argument(
        "--resolution", type=positive_integer, help="Pixels of a side; by default what the VQ was trained for."
    )
    add_image_arguments(data, resize_mode=None, default="By default as in the pretrained pipeline, or auto.")
    data.add_argument("--random_flip", action="store_true", help="Mirror half of the pictures.")
    data.add_argument("--latents_file", type=Path, help="safetensors file: read if it is there, else written.")
    data.add_argument(
        "--states_file",
        type=Path,
        help="Arrow file of the captions' states: read if it is there, else written. By default in the output folder.",
    )
    data.add_argument("--max_train_samples", type=positive_integer)
    add_streaming_argument(data)
    data.add_argument("--cache_dir")

    training = add_training_arguments(
        parser,
        output_dir="outputs/latent_dit",
        train_batch_size=64,
        num_train_epochs=100,
        learning_rate=1e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=None,
        adam_beta2=0.999,
        adam_weight_decay=0.0,
        ema_decay=0.9999,
    )
    add_transformer_arguments(training)

    keeping = add_keeping_arguments(parser)
    keeping.add_argument("--validation_prompts", nargs="*", default=[])
    keeping.add_argument("--validation_labels", nargs="*", default=[])

    args = parser.parse_args(input_args)
    if (args.dataset_name is None) == (args.train_data_dir is None):
        parser.error("give one of --dataset_name and --train_data_dir")
    check_streaming(parser, args)
    if (args.pretrained_model_name_or_path is None) == (args.image_vq is None):
        parser.error("give --pretrained_model_name_or_path to finetune, or --image_vq to start anew")
    if args.text_vq is not None and args.text_encoder is not None:
        parser.error("give one of --text_vq and --text_encoder")
    if args.learn_sigma and args.objective != "epsilon":
        parser.error("--learn_sigma needs --objective epsilon")
    if args.snr_gamma is not None and args.objective == "flow":
        parser.error("--snr_gamma is for --objective epsilon and v_prediction")
    if args.validation_prompts and args.validation_labels:
        parser.error("give one of --validation_prompts and --validation_labels")
    refuse_unused_arguments(parser, args)
    return args


def load_components(args: argparse.Namespace) -> dict:
    """The pipeline's parts that are there before training: all of them when finetuning."""
    if args.pretrained_model_name_or_path is not None:
        pipeline = VQDiTLatentPipeline.from_pretrained(args.pretrained_model_name_or_path, cache_dir=args.cache_dir)
        labels = {int(number): name for number, name in pipeline.config.id2label.items()}
        length = pipeline.config.max_sequence_length
        if args.max_sequence_length is not None:
            if pipeline.text_encoder is None:
                raise ValueError(f"max_sequence_length={args.max_sequence_length}: the pipeline has no text encoder")
            length = pipeline.length_of_texts(args.max_sequence_length)
        return {
            **pipeline.components,
            "transformer": as_trainable(pipeline.transformer),
            "id2label": labels,
            "max_sequence_length": length,
            "resize_mode": args.resize_mode or pipeline.config.resize_mode,
        }
    text_encoder, tokenizer, length = None, None, 77
    if args.text_vq is not None:
        text_encoder, tokenizer = load_text_vq(args.text_vq, cache_dir=args.cache_dir)
    elif args.text_encoder is not None:
        text_encoder, tokenizer = load_text_encoder(args.text_encoder, args.cache_dir)
        length = check_sequence_length(args.max_sequence_length, text_encoder, tokenizer)
    return {
        "transformer": None,
        "vae": load_image_vq(args.image_vq, cache_dir=args.cache_dir),
        "scheduler": make_scheduler(args),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "id2label": {},
        "max_sequence_length": length,
        "resize_mode": args.resize_mode or "auto",
    }


def make_scheduler(args: argparse.Namespace):
    """The pipeline's scheduler, for training from scratch: DiT's noise schedule, or flow matching."""
    if args.objective == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=args.shift)
    options = {"beta_schedule": "linear", "beta_end": 0.02, "prediction_type": args.objective, "clip_sample": False}
    # A learned variance is for ancestral sampling; other samplers leave it out.
    return DDPMScheduler(**options, variance_type="learned_range") if args.learn_sigma else DDIMScheduler(**options)


def training_scheduler(args: argparse.Namespace, scheduler):
    """The forward process of the pipeline's scheduler, which must be the objective's."""
    flow = hasattr(scheduler, "scale_noise")
    objective = "flow" if flow else scheduler.config.prediction_type
    if objective != args.objective:
        raise ValueError(f"objective={args.objective!r}, but the pretrained pipeline's is {objective!r}")
    return (FlowMatchEulerDiscreteScheduler if flow else DDPMScheduler).from_config(scheduler.config)


def build_transformer(
    args: argparse.Namespace, parts: dict, id2label: dict[int, str], latents: torch.Tensor
) -> VQDiTTransformer2DModel:
    """The transformer that is trained: a new one for latents (N, variants, C, h, w), or the pretrained one."""
    transformer = parts["transformer"]
    if transformer is None:
        transformer = VQDiTTransformer2DModel(
            num_attention_heads=args.num_attention_heads,
            attention_head_dim=args.attention_head_dim,
            in_channels=latents.shape[2],
            out_channels=latents.shape[2] * (2 if args.learn_sigma else 1),
            num_layers=args.num_layers,
            dropout=args.dropout,
            sample_size=latents.shape[-1],
            patch_size=args.patch_size,
            num_embeds_ada_norm=max(1, len(id2label)),
            norm_eps=1e-6,
            freq_shift=0.0,
            caption_channels=caption_channels(parts["text_encoder"]) if args.caption_columns else None,
        ).share_embedder()
    else:
        known = transformer.config.num_embeds_ada_norm
        if args.label_column is not None and max(id2label) >= known:
            logger.info(f"labels new to the pipeline: {[name for n, name in id2label.items() if n >= known]}")
            transformer = transformer.with_num_embeds_ada_norm(max(id2label) + 1)
        transformer.float()
    transformer.train()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.compile:
        transformer.compile_repeated_blocks()
    return transformer


def validation_inputs(args: argparse.Namespace) -> tuple[str, str, list[str]]:
    """The flag of what is drawn for validation, the argument of the pipeline's call that takes it, and its values."""
    if args.validation_labels:
        return "validation_labels", "class_labels", args.validation_labels
    return "validation_prompts", "prompt", args.validation_prompts


def loss_measures(args: argparse.Namespace, loss: float | None) -> list[Measure]:
    """The loss, for the model card."""
    return [Measure(args.objective, "training loss", loss, "training data")] if loss is not None else []


def main(args: argparse.Namespace) -> None:
    # Without captions in a batch, their projection gets no gradient.
    accelerator = setup.make_accelerator(args, find_unused_parameters=True)
    folders = ["samples", "transformer", "scheduler", "vae", "text_encoder", "tokenizer", LISTED_FOLDER]
    files = ["README.md", "model_index.json", "pipeline.py"]
    files += [STATES_FILE, f"{STATES_FILE}.json", LATENTS_FILE, FEATURES_FILE]
    with setup.open_run(args, accelerator, project=PROJECT, folders=folders, files=files) as run:
        if args.latents_file is not None and accelerator.is_main_process:
            check_latents_file(args.latents_file)
        if args.states_file is not None and accelerator.is_main_process and not args.states_file.is_file():
            check_output_file("states_file", args.states_file)
        train(args, accelerator, run)


def run_identity(
    args: argparse.Namespace, parts: dict, transformer: VQDiTTransformer2DModel, scheduler: Any, data: tuple
) -> dict:
    """What must be as it was where a run is resumed."""
    named = ("objective", "learn_sigma", "snr_gamma", "logit_normal", "label_dropout", "caption_dropout")
    named += ("alignment_encoder", "alignment_weight", "alignment_layer", "random_flip", "use_ema", "streaming")
    return {
        "script": "train_latent_dit",
        **{name: getattr(args, name) for name in named},
        "transformer": plain_config(transformer),
        "scheduler": plain_config(scheduler),
        **data_identity(*data),
        "image_vq": model_fingerprint(parts["vae"]),  # without the latents' statistics, measured at each start
        "text encoder": fingerprint(parts["text_encoder"]),
        "labels": parts["id2label"],
    }


def train(args: argparse.Namespace, accelerator: Accelerator, run: TrainingRun) -> None:
    # 1. Pictures, labels, captions
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    device, parts = accelerator.device, load_components(args)
    scheduler = training_scheduler(args, parts["scheduler"])
    check_layers(args, parts["transformer"])
    alignment_encoder = load_alignment_encoder(args)
    vae = parts["vae"].eval().to(device)
    if parts["text_encoder"] is not None:
        parts["text_encoder"].eval().requires_grad_(False).to(device)
    images, captions, labels, id2label = load_data(args, parts)

    # 2. Latents, normalised by their own statistics unless the VQ's config has some
    cached = cache_latents(args, vae, images, device)
    latents = cached.tensor
    captions, labels = take_rows(cached.rows, captions, labels)
    states = encode_captions_of(args, parts, captions, device)
    mean, deviation = settle_statistics(vae, cached, measure=args.pretrained_model_name_or_path is None)

    # 3. Transformer, optimizer, learning rate
    transformer = build_transformer(args, parts, id2label, latents)
    features = cache_features(
        args, alignment_encoder, images, latents.shape[-1] // transformer.config.patch_size, device
    )
    model = AlignedTransformer(transformer, args.alignment_layer, features.shape[-1] if features is not None else None)
    parts["id2label"] = id2label

    def build_pipeline(whole: AlignedTransformer) -> VQDiTLatentPipeline:
        return VQDiTLatentPipeline(**{**parts, "transformer": whole.transformer})

    model, optimizer, lr_scheduler, max_steps = setup.prepare(
        args, accelerator, model, len(latents), checkpoint=checkpoint, scale_lr=args.scale_lr
    )
    # Of the transformer alone: what aligns it is not kept.
    trained, averaged = list(model.parameters()), list(transformer.parameters())
    ema = setup.make_ema(args, averaged, device)
    flag, argument, wanted = validation_inputs(args)
    with evaluated(accelerator, model) as whole:
        if whole is not None:
            check_drawable(build_pipeline(whole), argument, flag, wanted)

    def publish(step: int | None = None) -> None:
        with evaluated(accelerator, model, ema, averaged) as whole:
            if whole is not None:
                measured = loss_measures(args, smooth)
                publish_pipeline(args, build_pipeline(whole), measured, wanted, argument=argument, step=step)

    # 4. Resume
    identity = run_identity(args, parts, transformer, scheduler, (images, captions, labels))
    smooth = run.begin(checkpoint, identity=identity, args=args, states={"ema": ema}).get("loss")
    setup.start_trackers(args, accelerator, PROJECT)

    # 5. Train
    step, micro_step = run.step, run.step * args.gradient_accumulation_steps
    batches = setup.run_batches(args, accelerator, len(latents), step)
    progress, null_label = setup.progress_bar(accelerator, max_steps, step), transformer.config.num_embeds_ada_norm
    throughput, stop = Throughput(), False
    utilisation = Utilisation(args, accelerator)
    watch = TrainingWatch(accelerator, args)
    while step < max_steps and not stop:
        rows = next(batches)
        # Drawn for each row of the global batch, however many processes share it.
        generator = row_generators(args.seed, micro_step, len(rows), rank=accelerator.process_index)
        variant = (uniform(rows.shape, generator, rows.device) * latents.shape[1]).long()
        clean = ((latents[rows, variant] - mean) / deviation).to(device)
        class_labels, conditions = draw_conditions(args, null_label, states, labels, rows, generator)
        with accelerator.accumulate(model), utilisation.counting():
            loss = latent_diffusion_loss(
                model,
                scheduler,
                clean,
                class_labels.to(device),
                **{name: value.to(device) for name, value in conditions.items()},
                snr_gamma=args.snr_gamma,
                logit_normal=args.logit_normal,
                generator=generator,
            )
            logs = {"loss": loss.detach()}
            if features is not None:
                alignment = alignment_loss(unwrap(model).projected, features[rows, variant].to(device))
                logs["alignment"] = alignment.detach()
                loss = loss + args.alignment_weight * alignment
            norm = run.descend(optimizer, trained, loss, args.max_grad_norm, lr_scheduler, ema, averaged)
        micro_step += 1
        throughput.add(len(rows) * accelerator.num_processes)
        logs = {name: accelerator.reduce(value, "mean").item() for name, value in logs.items()}
        if math.isfinite(logs["loss"]):
            smooth = logs["loss"] if smooth is None else 0.99 * smooth + 0.01 * logs["loss"]
        if not accelerator.sync_gradients:
            continue

        step += 1
        run.end_step(step)
        progress.update(1)
        speed = throughput.end_step()
        progress.set_postfix({"loss": f"{smooth or logs['loss']:.4f}", "images/s": shown_rate(speed)})
        logs |= {"lr": lr_scheduler.get_last_lr()[0], "gradient_norm": norm, "skipped_steps": run.skipped_steps}
        accelerator.log({**logs, "images_per_second": speed, **utilisation.figures()}, step=step)
        if wanted and due(step, args.validation_steps):
            with evaluated(accelerator, model, ema, averaged) as whole:
                if whole is not None:
                    draw_validation(args, accelerator, build_pipeline(whole), wanted, step, argument=argument)
        watch.look(step, logs["loss"], norm)
        stop = run.stop_requested()
        if stop or due(step, args.checkpointing_steps) or step == max_steps:
            kept = run.kept(loss=smooth)
            save_checkpoint(accelerator, args.output_dir, step, total_limit=args.checkpoints_total_limit, **kept)
            if publishes_checkpoints(args) and step < max_steps and not stop:
                publish(step)
        throughput.go_on()
    progress.close()

    # 6. Save the pipeline
    accelerator.wait_for_everyone()
    if not stop or step == max_steps:
        publish()
        logger.info(f"saved the pipeline to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
