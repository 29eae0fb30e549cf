#!/usr/bin/env python
"""Train an image VQ-VAE: pictures to a grid of codes and back.

    accelerate launch training/train_image_vq.py \
        --dataset_name training/data/emoji.parquet --use_ema --output_dir outputs/image_vq

trains a tokenizer for 32 px pictures and 8 x 8 codes. With ``--num_vq_embeddings 2048 --train_batch_size 16`` and
3,300 steps, about 20 minutes of a 2-core AVX2 CPU that was busy with other work too, the starter's tokenizer reached a
PSNR of 27.6 dB on the 307 pictures of the test split, the mean of each picture's own (26.5 dB for the error pooled
over all pictures), and used 99 % of its codes there. Its first 2,500 steps followed the learning rate schedule of a
5,000-step run, the others that of a 3,300-step one.

By default the loss is the squared error of the pixels, which is what PSNR measures, and the quantizer's own loss. For
sharp pictures rather than the highest PSNR, add a perceptual and an adversarial loss (VQGAN, Esser et al. 2021):

    --reconstruction_loss l1 --perceptual_backbone microsoft/resnet-50 --perceptual_weight 1.0 \
    --adversarial_weight 0.5 --adversarial_start 2000 --discriminator_warmup 500
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm.auto import tqdm

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.models.image_vq import QUANTIZER_OPTIONS
from diffusers_vqdit.training.arguments import add_keeping_arguments, add_training_arguments, tracker_config
from diffusers_vqdit.training.checkpoints import find_checkpoint, fingerprint, plain_config
from diffusers_vqdit.training.data import (
    choose_validation_split,
    decode_images,
    load_splits,
    shuffled_batches,
    take_split,
    to_pixels,
)
from diffusers_vqdit.training.files import save_pretrained_atomically
from diffusers_vqdit.training.image_losses import (
    ADVERSARIAL_LOSSES,
    BackboneFeatures,
    LeCam,
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from diffusers_vqdit.training.launch import make_accelerator
from diffusers_vqdit.training.metrics import code_usage, psnr
from diffusers_vqdit.training.model_card import Measure
from diffusers_vqdit.training.optimization import averaged_weights, parameter_groups, unwrap
from diffusers_vqdit.training.publish import publish_run, publishes_checkpoints
from diffusers_vqdit.training.run import TrainingRun, due, training_run
from diffusers_vqdit.training.tokenizers import load_image_vq
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    integer,
    model_name,
    non_negative_integer,
    non_negative_number,
    positive_integer,
    positive_number,
)


logger = get_logger(__name__)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train an image VQ-VAE.")

    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", type=model_name, help="ImageVQModel or VQModel to finetune.")
    model.add_argument("--block_out_channels", type=positive_integer, nargs="+", default=[24, 48, 96])
    model.add_argument("--layers_per_block", type=positive_integer, default=1)
    model.add_argument("--norm_num_groups", type=positive_integer, default=8)
    model.add_argument("--mid_block_attention", action="store_true")
    model.add_argument("--latent_channels", type=positive_integer, default=64)
    model.add_argument("--num_vq_embeddings", type=positive_integer, default=1024)
    model.add_argument("--vq_embed_dim", type=positive_integer, default=8)
    model.add_argument("--quantizer_type", choices=list(QUANTIZER_OPTIONS), default="vq")
    model.add_argument("--fsq_levels", type=integer(2), nargs="+", help="Of FSQ; they give the number of codes.")
    model.add_argument("--codebook_norm", choices=["none", "l2"], default="l2", help="Of vq, ibq and lfq (l2: BSQ).")
    model.add_argument("--codebook_update", choices=["gradient", "ema"], default="ema")
    model.add_argument("--codebook_init", choices=["uniform", "data", "kmeans"], default="kmeans")
    model.add_argument("--restart_threshold", type=non_negative_number, default=0.1)
    estimators = ["straight_through", "rotation"]
    model.add_argument("--gradient_estimator", choices=estimators, default=estimators[0], help="Of vq and simvq.")
    model.add_argument("--beta", type=non_negative_number, default=0.25, help="Weight of the commitment term.")
    model.add_argument("--entropy_weight", type=non_negative_number, default=0.0)
    model.add_argument("--entropy_temperature", type=positive_number, default=0.01)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub dataset, or path of a parquet file.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="Image folder.")
    data.add_argument("--image_column", default="image")
    data.add_argument(
        "--validation_split",
        help="Split for the PSNR, by default test if there is one; 'none' takes training pictures.",
    )
    data.add_argument("--resolution", type=positive_integer, default=32)
    data.add_argument(
        "--resize_mode", choices=["crop", "pad"], default="crop", help="How pictures that are not square become so."
    )
    data.add_argument("--max_train_samples", type=positive_integer)
    data.add_argument("--cache_dir")

    add_training_arguments(
        parser,
        output_dir="outputs/image_vq",
        train_batch_size=32,
        num_train_epochs=20,
        learning_rate=2e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        adam_beta2=0.99,
        adam_weight_decay=0.0,
        ema_decay=0.998,
    )

    losses = parser.add_argument_group("losses")
    losses.add_argument("--reconstruction_loss", choices=["l1", "l2"], default="l2")
    losses.add_argument("--perceptual_weight", type=non_negative_number, default=0.0)
    losses.add_argument(
        "--perceptual_backbone", type=model_name, help="Vision model of transformers: a Hub id or a folder."
    )
    losses.add_argument(
        "--perceptual_image_size", type=positive_integer, help="Side that pictures are resized to for it."
    )
    losses.add_argument(
        "--lpips_weights",
        nargs=2,
        metavar=("VGG16", "LPIPS"),
        help="For LPIPS instead.",
    )
    losses.add_argument("--adversarial_weight", type=non_negative_number, default=0.0)
    losses.add_argument("--adversarial_loss", choices=ADVERSARIAL_LOSSES, default="hinge")
    losses.add_argument("--adversarial_start", type=non_negative_integer, default=0, help="Step from which it counts.")
    losses.add_argument(
        "--discriminator_warmup", type=non_negative_integer, default=0, help="Steps it is trained before that."
    )
    losses.add_argument(
        "--adaptive_weight", action="store_true", help="Multiply the weight by VQGAN's gradient ratio."
    )
    losses.add_argument("--lecam_weight", type=non_negative_number, default=0.0)
    losses.add_argument("--discriminator_channels", type=positive_integer, default=64)
    losses.add_argument("--discriminator_layers", type=positive_integer, default=3)
    losses.add_argument("--discriminator_learning_rate", type=positive_number, default=1e-4)
    losses.add_argument("--discriminator_max_grad_norm", type=non_negative_number, default=1.0)

    add_keeping_arguments(parser)
    return parser.parse_args(input_args)


def quantizer_options(args: argparse.Namespace) -> dict:
    """The arguments of `ImageVQModel` that the type of the quantizer takes."""
    # The codebook's own ema_decay keeps its default; --ema_decay is that of the weights.
    taken = [name for name in QUANTIZER_OPTIONS[args.quantizer_type] if name != "ema_decay"]
    options = {"quantizer_type": args.quantizer_type, **{name: getattr(args, name) for name in taken}}
    sizes = {"num_vq_embeddings": args.num_vq_embeddings, "vq_embed_dim": args.vq_embed_dim}
    if args.fsq_levels:
        sizes = {"num_vq_embeddings": math.prod(args.fsq_levels), "vq_embed_dim": len(args.fsq_levels)}
    elif args.quantizer_type == "lfq":
        sizes["num_vq_embeddings"] = 2**args.vq_embed_dim
    return {**options, **sizes}


def perceptual_loss(args: argparse.Namespace) -> PerceptualLoss | None:
    if args.perceptual_weight == 0:
        return None
    if args.lpips_weights is not None:
        return PerceptualLoss.from_lpips(*args.lpips_weights)
    if args.perceptual_backbone is None:
        raise ValueError("--perceptual_weight needs --perceptual_backbone or --lpips_weights")
    return PerceptualLoss(BackboneFeatures.from_pretrained(args.perceptual_backbone, args.perceptual_image_size))


@torch.no_grad()
def validate(
    model: ImageVQModel, pictures: torch.Tensor, args: argparse.Namespace, step: int
) -> tuple[dict[str, float], Image.Image]:
    """PSNR and codebook usage on `pictures`, and the first ones over their reconstructions, kept as a PNG too.

    The PNG shows the data, which may be private: it is never published.
    """
    model.eval()
    device = model.device
    values, codes, drawn = [], [], []
    for batch in pictures.split(64):
        original = to_pixels(batch).to(device)
        batch_codes = model.encode_codes(original)
        decoded = model.decode_codes(batch_codes).sample
        values.append(psnr(decoded, original).cpu())
        codes.append(batch_codes.cpu())
        if not drawn:
            drawn = [original[:16].cpu(), decoded[:16].float().cpu()]
    model.train()
    rows = VaeImageProcessor().postprocess(torch.cat(drawn))
    folder = args.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    grid = make_image_grid(rows, rows=2, cols=len(drawn[0]))
    grid.save(folder / f"step-{step:06d}.png")
    usage, perplexity = code_usage(torch.cat(codes), model.num_codes)
    figures = {
        "validation/psnr": float(torch.cat(values).mean()),
        "validation/usage": usage,
        "validation/perplexity": perplexity,
    }
    return figures, grid


def log_picture(accelerator: Accelerator, grid: Image.Image, step: int) -> None:
    """Show the reconstructions in those trackers that can."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation/reconstructions", np.asarray(grid), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation/reconstructions": wandb.Image(grid)}, step=step)


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    with training_run(
        accelerator,
        args.output_dir,
        folders=["samples"],
        files=["README.md", "config.json"],
        max_skipped_steps=args.max_skipped_steps,
    ) as run:
        train(args, accelerator, run)


def train(args: argparse.Namespace, accelerator: Accelerator, run: TrainingRun) -> None:
    set_seed(args.seed)

    # 1. Pictures, decoded once and kept as bytes
    splits = load_splits(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        cache_dir=args.cache_dir,
        output_dir=args.output_dir,
    )
    args.validation_split = choose_validation_split(splits, args.validation_split)
    names = ["train"] if args.validation_split == "none" else ["train", args.validation_split]
    datasets = [
        take_split(splits, name, image_column=args.image_column, max_samples=args.max_train_samples) for name in names
    ]
    pictures, *others = (
        decode_images(dataset, args.image_column, args.resolution, resize_mode=args.resize_mode)[0]
        for dataset in datasets
    )
    held_out = others[0] if others else pictures[:256]

    # 2. Model
    if args.pretrained_model_name_or_path is not None:
        model = load_image_vq(args.pretrained_model_name_or_path, cache_dir=args.cache_dir, torch_dtype=torch.float32)
    else:
        levels = len(args.block_out_channels)
        model = ImageVQModel(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=args.block_out_channels,
            layers_per_block=args.layers_per_block,
            norm_num_groups=args.norm_num_groups,
            mid_block_add_attention=args.mid_block_attention,
            latent_channels=args.latent_channels,
            sample_size=args.resolution,
            **quantizer_options(args),
        )
    # Convolutions run faster with the channels last: by 10 % on CPUs, more on GPUs with mixed precision.
    model.train().to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.compile:
        # The quantizer, whose statistics and restarts break graphs, stays as it is.
        model.encoder.compile()
        model.decoder.compile()
    ema = EMAModel(model.parameters(), decay=args.ema_decay, foreach=True) if args.use_ema else None
    perceptual = perceptual_loss(args)
    adversarial = args.adversarial_weight > 0
    discriminator = PatchDiscriminator(
        model.config.out_channels, args.discriminator_channels, args.discriminator_layers
    ).train()
    lecam = LeCam()

    # 3. Optimizers and learning rates
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "fused": True}
    optimizer = torch.optim.AdamW(parameter_groups(model, args.adam_weight_decay), lr=args.learning_rate, **adam)
    discriminator_optimizer = torch.optim.AdamW(
        parameter_groups(discriminator, args.adam_weight_decay), lr=args.discriminator_learning_rate, **adam
    )
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    max_steps = args.max_train_steps or math.ceil(len(pictures) / global_batch) * args.num_train_epochs
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_steps
    )
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    if perceptual is not None:
        perceptual.to(accelerator.device)
    if adversarial:
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
        lecam.to(accelerator.device)
    if ema is not None:
        ema.to(accelerator.device)

    # 4. Resume
    more_states = {"ema": ema} if ema is not None else {}
    if adversarial:
        more_states["lecam"] = lecam
    named = ("reconstruction_loss", "perceptual_weight", "perceptual_backbone", "perceptual_image_size")
    named += ("adversarial_weight", "adversarial_loss", "adversarial_start", "discriminator_warmup", "adaptive_weight")
    named += ("lecam_weight", "discriminator_channels", "discriminator_layers", "resolution", "use_ema")
    identity = {
        "script": "train_image_vq",
        **{name: getattr(args, name) for name in named},
        "model": plain_config(unwrap(model)),
        "training data": fingerprint(pictures),
    }
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    measures = run.begin(checkpoint, identity=identity, args=args, states=more_states)
    step = run.step
    if accelerator.is_main_process and accelerator.log_with:
        accelerator.init_trackers("image_vq", config=tracker_config(args))
    parameters = sum(p.numel() for p in unwrap(model).parameters())
    logger.info(f"{len(pictures)} pictures, {parameters / 1e6:.1f} M parameters, {max_steps} steps of {global_batch}")

    # 5. Train
    batches = shuffled_batches(
        len(pictures),
        args.train_batch_size,
        seed=args.seed,
        start=step * args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    progress = tqdm(total=max_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)
    started, seen, stop = time.time(), 0, False
    measured = measures.get("validation", {})

    def publish(step: int | None = None) -> None:
        """Save the model and its card, and push them where that is asked for."""
        trained = unwrap(model).eval()
        with averaged_weights(ema, trained.parameters()):
            files = save_pretrained_atomically(trained, args.output_dir)
            split = "training pictures" if args.validation_split == "none" else f"{args.validation_split} split"
            dataset = f"{Path(args.dataset_name or args.train_data_dir).stem}, {split}"
            publish_run(
                args,
                trained,
                files=files,
                measures=[
                    Measure("image tokenizer", name.removeprefix("validation/"), value, dataset)
                    for name, value in measured.items()
                ],
                step=step,
            )
        trained.train()

    while step < max_steps:
        sample = to_pixels(pictures[next(batches)]).to(accelerator.device)
        logs = {}
        with accelerator.accumulate(model, *([discriminator] if adversarial else [])):
            # The tokenizer
            output = model(sample)
            made = output.sample.float()
            difference = F.l1_loss if args.reconstruction_loss == "l1" else F.mse_loss
            reconstruction = difference(made, sample)
            logs |= {"reconstruction": reconstruction, "mse": F.mse_loss(made, sample).detach()}
            if perceptual is not None:
                with accelerator.autocast():
                    logs["perceptual"] = perceptual(made, sample)
                reconstruction = reconstruction + args.perceptual_weight * logs["perceptual"]
            loss = reconstruction + output.commit_loss
            logs |= {"commitment": output.commit_loss - output.entropy_loss, "entropy": output.entropy_loss}
            if adversarial and step >= args.adversarial_start:
                # Not through DistributedDataParallel, and without gradients of the discriminator's own.
                unwrap(discriminator).requires_grad_(False)
                with accelerator.autocast():
                    logs["generator"] = generator_loss(unwrap(discriminator)(made), args.adversarial_loss)
                unwrap(discriminator).requires_grad_(True)
                weight = args.adversarial_weight
                if args.adaptive_weight:
                    last_layer = unwrap(model).decoder.conv_out.weight
                    logs["adaptive_weight"] = adaptive_weight(reconstruction, logs["generator"], last_layer)
                    weight = weight * logs["adaptive_weight"]
                loss = loss + weight * logs["generator"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm, stepped = run.optimizer_step(optimizer, model.parameters(), loss, args.max_grad_norm)
                logs["gradient_norm"] = norm
                if stepped:
                    lr_scheduler.step()
            optimizer.zero_grad()

            # The discriminator, which starts earlier, so that its first advice is worth something
            if adversarial and step >= args.adversarial_start - args.discriminator_warmup:
                real_logits, made_logits = discriminator(torch.cat([sample, made.detach()])).chunk(2)
                told = discriminator_loss(real_logits, made_logits, args.adversarial_loss)
                logs |= {"discriminator": told, "logits_real": real_logits.mean(), "logits_made": made_logits.mean()}
                if args.lecam_weight > 0:
                    logs["lecam"] = lecam(real_logits, made_logits)
                    told = told + args.lecam_weight * logs["lecam"]
                accelerator.backward(told)
                if accelerator.sync_gradients:
                    logs["discriminator_gradient_norm"], _ = run.optimizer_step(
                        discriminator_optimizer, discriminator.parameters(), told, args.discriminator_max_grad_norm
                    )
                discriminator_optimizer.zero_grad()
        seen += len(sample) * accelerator.num_processes
        if not accelerator.sync_gradients:
            continue

        step += 1
        run.end_step(step)
        if ema is not None and stepped:
            ema.step(model.parameters())
        values = torch.stack([torch.as_tensor(v, device=loss.device).detach().float() for v in logs.values()])
        logs = dict(zip(logs, accelerator.reduce(values, "mean").tolist(), strict=True))
        logs |= {
            "usage": output.usage.item(),
            "perplexity": output.perplexity.item(),
            "skipped_steps": run.skipped_steps,
            "images_per_second": seen / (time.time() - started),
        }
        progress.update(1)
        progress.set_postfix(
            {
                "mse": f"{logs['mse']:.4f}",
                "vq": f"{logs['commitment']:.4f}",
                "usage": f"{logs['usage']:.2f}",
                "images/s": f"{logs['images_per_second']:.0f}",
                **{name.removeprefix("validation/"): f"{value:.2f}" for name, value in measured.items()},
            }
        )
        accelerator.log({**logs, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
        if accelerator.is_main_process and (due(step, args.validation_steps) or step == max_steps):
            with averaged_weights(ema, model.parameters()):
                measured, grid = validate(unwrap(model), held_out, args, step)
            accelerator.log(measured, step=step)
            log_picture(accelerator, grid, step)
            logger.info(f"step {step}: {measured}")
        stop = run.stop_requested()
        if stop or due(step, args.checkpointing_steps) or step == max_steps:
            run.save(step, {"validation": measured}, total_limit=args.checkpoints_total_limit)
            if stop:
                break
            if accelerator.is_main_process and publishes_checkpoints(args) and step < max_steps:
                publish(step)
    progress.close()

    # 6. Save
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not stop:
        publish()
        logger.info(f"saved the model to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
