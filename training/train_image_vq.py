#!/usr/bin/env python
"""Train an image VQ-VAE: pictures to a grid of codes and back.

    accelerate launch training/train_image_vq.py \
        --dataset_name training/data/emoji.parquet --use_ema --output_dir outputs/image_vq

trains a tokenizer for 32 px pictures and 8 x 8 codes. With ``--num_vq_embeddings 2048 --train_batch_size 16`` and
3,300 steps, about 20 minutes of a 2-core AVX2 CPU that was busy with other work too, the 32 px starter's tokenizer
reached a PSNR of 27.6 dB on the 307 pictures of the test split, the mean of each picture's own (26.5 dB for the error
pooled over all pictures), and used 99 % of its codes there. Its first 2,500 steps followed the learning rate schedule
of a 5,000-step run, the others that of a 3,300-step one.

By default the loss is the squared error of the pixels, which is what PSNR measures, and the quantizer's own loss. For
sharp pictures rather than the highest PSNR, add a perceptual and an adversarial loss (VQGAN, Esser et al. 2021):

    --reconstruction_loss l1 --perceptual_backbone microsoft/resnet-50 --perceptual_weight 1.0 \
    --adversarial_weight 0.5 --adversarial_start 2000 --discriminator_warmup 500
"""

import argparse
from pathlib import Path

import torch
import torch._functorch.config
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.training import setup
from diffusers_vqdit.training.adversarial import ADVERSARIAL_IDENTITY, Adversary, add_adversarial_arguments
from diffusers_vqdit.training.arguments import add_keeping_arguments, add_training_arguments
from diffusers_vqdit.training.checkpoints import find_checkpoint, plain_config, save_checkpoint
from diffusers_vqdit.training.files import save_pretrained_atomically
from diffusers_vqdit.training.image_arguments import add_image_arguments
from diffusers_vqdit.training.image_dataset import ImageDataset, first_batches, load_batches, load_images
from diffusers_vqdit.training.image_losses import BackboneFeatures, PerceptualLoss
from diffusers_vqdit.training.metrics import counts_by_level, level_figures, psnr, usage_of_counts
from diffusers_vqdit.training.model_card import Measure
from diffusers_vqdit.training.optimization import averaged_weights, tokenizer_learning_rate, unwrap
from diffusers_vqdit.training.publish import publish_run, publishes_checkpoints
from diffusers_vqdit.training.quantizer_arguments import add_quantizer_arguments, quantizer_options
from diffusers_vqdit.training.run import TrainingRun, due
from diffusers_vqdit.training.sharding import check_unsharded, evaluated
from diffusers_vqdit.training.streaming_arguments import add_streaming_argument, check_streaming
from diffusers_vqdit.training.throughput import Throughput, shown_rate
from diffusers_vqdit.training.tokenizers import load_image_vq
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.training.utilisation import Utilisation
from diffusers_vqdit.training.validation import columns_of_grid, log_images, save_grid
from diffusers_vqdit.training.watch import TrainingWatch
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    non_negative_number,
    positive_integer,
)
from diffusers_vqdit.utils.buckets import check_resolution
from diffusers_vqdit.utils.decoding import to_pixels
from diffusers_vqdit.utils.told_errors import told_errors


logger = get_logger(__name__)

PROJECT = "image_vq"  # of the trackers


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train an image VQ-VAE.")

    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", type=model_name, help="ImageVQModel or VQModel to finetune.")
    model.add_argument("--block_out_channels", type=positive_integer, nargs="+", default=[24, 48, 96])
    model.add_argument("--layers_per_block", type=positive_integer, default=1)
    model.add_argument("--norm_num_groups", type=positive_integer, default=8)
    model.add_argument("--mid_block_attention", action="store_true")
    model.add_argument(
        "--encoder_norm_type",
        choices=("group", "position"),
        default="group",
        help="position: without attention, codes depend on what is near them alone, not on the whole picture.",
    )
    model.add_argument("--latent_channels", type=positive_integer, default=64)
    add_quantizer_arguments(model)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub dataset, or files of it: a path, folder or pattern.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="Image folder.")
    data.add_argument("--image_column", default="image")
    data.add_argument(
        "--validation_split",
        help="Split for the PSNR, by default test if there is one; 'none' takes training pictures.",
    )
    data.add_argument("--resolution", type=positive_integer, default=32)
    add_image_arguments(data, resize_mode="auto", default="The default.", augmented=True)
    data.add_argument("--max_train_samples", type=positive_integer)
    add_streaming_argument(data, encoded=False)
    data.add_argument("--cache_dir")

    add_training_arguments(
        parser,
        output_dir="outputs/image_vq",
        train_batch_size=32,
        num_train_epochs=20,
        learning_rate=None,
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
    add_adversarial_arguments(losses)
    losses.add_argument(
        "--adaptive_weight", action="store_true", help="Multiply the weight by VQGAN's gradient ratio."
    )

    add_keeping_arguments(parser)
    args = parser.parse_args(input_args)
    check_streaming(parser, args, encoded=False)
    if args.perceptual_weight > 0 and args.perceptual_backbone is None and args.lpips_weights is None:
        parser.error("--perceptual_weight needs --perceptual_backbone or --lpips_weights")
    refuse_unused_arguments(parser, args)
    return args


def perceptual_loss(args: argparse.Namespace) -> PerceptualLoss | None:
    if args.perceptual_weight == 0:
        return None
    if args.lpips_weights is not None:
        return PerceptualLoss.from_lpips(*args.lpips_weights)
    name, size = args.perceptual_backbone, args.perceptual_image_size
    return PerceptualLoss(BackboneFeatures.from_pretrained(name, size, cache_dir=args.cache_dir))


def build_model(args: argparse.Namespace) -> ImageVQModel:
    if args.pretrained_model_name_or_path is not None:
        options = {"argument": "pretrained_model_name_or_path", "cache_dir": args.cache_dir}
        model = load_image_vq(args.pretrained_model_name_or_path, **options, torch_dtype=torch.float32)
    else:
        levels = len(args.block_out_channels)
        model = ImageVQModel(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=args.block_out_channels,
            layers_per_block=args.layers_per_block,
            norm_num_groups=args.norm_num_groups,
            mid_block_add_attention=args.mid_block_attention,
            encoder_norm_type=args.encoder_norm_type,
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
        if args.adaptive_weight:
            # It takes gradients of the graph that the loss's are taken of later, which must not be freed by then.
            torch._functorch.config.donated_buffer = False
    return model


def reconstruction_loss(
    args: argparse.Namespace,
    accelerator: Accelerator,
    perceptual: PerceptualLoss | None,
    made: torch.Tensor,
    sample: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """How far reconstructions are from the pictures, both (B, C, H, W) in [-1, 1], and what is logged of it."""
    loss = (F.l1_loss if args.reconstruction_loss == "l1" else F.mse_loss)(made, sample)
    logs = {"reconstruction": loss, "mse": F.mse_loss(made, sample).detach()}
    if perceptual is not None:
        with accelerator.autocast():
            logs["perceptual"] = perceptual(made, sample)
        loss = loss + args.perceptual_weight * logs["perceptual"]
    return loss, logs


@torch.no_grad()
def validate(
    model: ImageVQModel, pictures: ImageDataset, args: argparse.Namespace, step: int
) -> tuple[dict[str, float], Image.Image]:
    """PSNR and codebook usage on `pictures`, and the first ones over their reconstructions, kept as a PNG too.

    The PNG shows the data, which may be private: it is never published.
    """
    model.eval()
    device = model.device
    values, codes, drawn = [], [], []
    for batch in load_batches(pictures, first_batches(len(pictures), 64)):
        original = to_pixels(batch).to(device)
        batch_codes = model.encode_codes(original)
        decoded = model.decode_codes(batch_codes).sample
        values.append(psnr(decoded, original).cpu())
        codes.append(batch_codes.cpu())
        if not drawn:
            columns = columns_of_grid(original.shape[-1], 16)
            drawn = [original[:columns].cpu(), decoded[:columns].float().cpu()]
    model.train()
    grid = save_grid(VaeImageProcessor().postprocess(torch.cat(drawn)), len(drawn[0]), args.output_dir, step)
    usage = level_figures(*usage_of_counts(counts_by_level(torch.cat(codes), model.num_codes)))
    figures = {"psnr": float(torch.cat(values).mean()), **usage}
    return {f"validation/{name}": value for name, value in figures.items()}, grid


def publish(
    args: argparse.Namespace, model: ImageVQModel, measured: dict[str, float], step: int | None = None
) -> None:
    """Save the model and its card, and push them where that is asked for."""
    files = save_pretrained_atomically(model, args.output_dir)
    split = "training pictures" if args.validation_split == "none" else f"{args.validation_split} split"
    dataset = f"{Path(args.dataset_name or args.train_data_dir).stem}, {split}"
    measures = [
        Measure("image tokenizer", name.removeprefix("validation/"), value, dataset)
        for name, value in measured.items()
    ]
    publish_run(args, model, files=files, measures=measures, step=step)


def main(args: argparse.Namespace) -> None:
    accelerator = setup.make_accelerator(args)
    check_unsharded(accelerator)
    with setup.open_run(
        args, accelerator, project=PROJECT, folders=["samples"], files=["README.md", "config.json"]
    ) as run:
        train(args, accelerator, run)


def train(args: argparse.Namespace, accelerator: Accelerator, run: TrainingRun) -> None:
    # 1. Models, pictures
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    model = build_model(args)
    check_resolution(args.resolution, model.downsample_factor)
    pictures, held_out = load_images(args, model.config.in_channels)
    ema = setup.make_ema(args, model.parameters(), accelerator.device)
    perceptual = perceptual_loss(args)

    # 2. Optimizers and learning rates
    default = tokenizer_learning_rate(model.config.block_out_channels, model.num_codes)
    setup.set_default(args, "learning_rate", checkpoint, default)
    model, optimizer, lr_scheduler, max_steps = setup.prepare(
        args, accelerator, model, 0 if args.streaming else len(pictures)
    )
    if perceptual is not None:
        perceptual.to(accelerator.device)
    size = (args.resolution, args.resolution)
    adversary = Adversary.wanted(args, accelerator, (unwrap(model).config.out_channels, *size))

    # 3. Resume
    named = ("reconstruction_loss", "perceptual_weight", "perceptual_backbone", "perceptual_image_size")
    named += (*ADVERSARIAL_IDENTITY, "adaptive_weight", "resolution", "use_ema")
    named += ("random_crop", "random_flip", "streaming")
    identity = {
        "script": "train_image_vq",
        **{name: getattr(args, name) for name in named},
        "model": plain_config(unwrap(model)),
        **pictures.identity(),
    }
    states = {"ema": ema, "lecam": adversary and adversary.lecam, "stream": pictures if args.streaming else None}
    measured = run.begin(checkpoint, identity=identity, args=args, states=states).get("validation", {})
    setup.start_trackers(args, accelerator, PROJECT)

    # 4. Train
    step = run.step
    batches = setup.image_batches(args, accelerator, pictures, step)
    progress = setup.progress_bar(accelerator, max_steps, step)
    utilisation = Utilisation(args, accelerator)
    watch = TrainingWatch(accelerator, args, quantizer=unwrap(model).quantize)
    throughput, stop = Throughput(), False
    while step < max_steps and not stop:
        sample = to_pixels(next(batches).to(accelerator.device, non_blocking=True))
        with accelerator.accumulate(model, *([adversary.discriminator] if adversary else [])), utilisation.counting():
            output = model(sample)
            made = output.sample.float()
            reconstruction, logs = reconstruction_loss(args, accelerator, perceptual, made, sample)
            loss = reconstruction + output.commit_loss
            logs |= {"commitment": output.commit_loss - output.entropy_loss, "entropy": output.entropy_loss}
            if adversary:
                last_layer = unwrap(model).decoder.conv_out.weight if args.adaptive_weight else None
                fooling, more = adversary.generator_loss(step, made, reconstruction, last_layer)
                loss, logs = loss + fooling, logs | more
            norm = run.descend(optimizer, list(model.parameters()), loss, args.max_grad_norm, lr_scheduler, ema)
            if norm is not None:
                logs["gradient_norm"] = norm
            if adversary:
                logs |= adversary.descend(run, step, sample, made)
        throughput.add(len(sample) * accelerator.num_processes)
        if not accelerator.sync_gradients:
            continue

        step += 1
        run.end_step(step)
        values = torch.stack([torch.as_tensor(v, device=loss.device).detach().float() for v in logs.values()])
        logs = dict(zip(logs, accelerator.reduce(values, "mean").tolist(), strict=True))
        logs |= level_figures(output.usage, output.perplexity)
        speed = throughput.end_step()
        progress.update(1)
        shown = {"mse": f"{logs['mse']:.4f}", "vq": f"{logs['commitment']:.4f}", "usage": f"{logs['usage']:.2f}"}
        shown["images/s"] = shown_rate(speed)
        shown |= {name.removeprefix("validation/"): f"{value:.2f}" for name, value in measured.items()}
        progress.set_postfix(shown)
        logs |= {"skipped_steps": run.skipped_steps, "images_per_second": speed, **utilisation.figures()}
        accelerator.log({**logs, "lr": lr_scheduler.get_last_lr()[0]}, step=step)
        if accelerator.is_main_process and (due(step, args.validation_steps) or step == max_steps):
            with averaged_weights(ema, model.parameters()):
                measured, grid = validate(unwrap(model), held_out, args, step)
            accelerator.log(measured, step=step)
            log_images(accelerator, "validation/reconstructions", [grid], step)
            logger.info(f"step {step}: {measured}")
        watch.look(step, logs["reconstruction"], logs["gradient_norm"], output.codes, logs["usage"])
        stop = run.stop_requested()
        if stop or due(step, args.checkpointing_steps) or step == max_steps:
            kept = run.kept(validation=measured)
            save_checkpoint(accelerator, args.output_dir, step, total_limit=args.checkpoints_total_limit, **kept)
            if accelerator.is_main_process and publishes_checkpoints(args) and step < max_steps and not stop:
                with evaluated(accelerator, model, ema, model.parameters()) as whole:
                    publish(args, whole, measured, step)
        throughput.go_on()
    progress.close()

    # 5. Save
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and (not stop or step == max_steps):
        with evaluated(accelerator, model, ema, model.parameters()) as whole:
            publish(args, whole, measured)
        logger.info(f"saved the model to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
