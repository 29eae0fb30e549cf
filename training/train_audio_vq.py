#!/usr/bin/env python
"""Train an audio tokenizer: waveforms to codes of their spectrograms and back.

    accelerate launch training/train_audio_vq.py \
        --dataset_name outputs/speech.parquet --max_train_steps 1000 --use_ema --output_dir outputs/audio_vq

on any data that `datasets` reads with a column of sounds, a folder of recordings too. What is learned is an image
VQ-VAE of log-mel spectrograms; waveforms are made of these by the Griffin-Lim algorithm, which learns nothing, or by a
vocoder of transformers that was trained for such spectrograms.

On the English captions of ``prepare_speech.py --languages en --voices_per_caption 1`` this command, some 14 minutes of
one CPU core, reached a PSNR of 25.7 dB on the log-mel spectrograms of 256 sounds of the test split, with 99.8 % of the
codes in use there. Of 60 of these, all captions that training never saw, pocketsphinx recognised 59 after it, and 60
as they were and after Griffin-Lim alone.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import EncodecFeatureExtractor

from diffusers_vqdit import SpectrogramVQModel
from diffusers_vqdit.training import setup
from diffusers_vqdit.training.arguments import add_keeping_arguments, add_training_arguments
from diffusers_vqdit.training.audio_data import SoundDataset, as_waveform, crop_sounds, load_sounds
from diffusers_vqdit.training.checkpoints import find_checkpoint, plain_config, save_checkpoint
from diffusers_vqdit.training.files import save_pretrained_atomically
from diffusers_vqdit.training.metrics import code_usage, psnr
from diffusers_vqdit.training.model_card import Measure
from diffusers_vqdit.training.optimization import averaged_weights, unwrap
from diffusers_vqdit.training.publish import publish_run, publishes_checkpoints
from diffusers_vqdit.training.run import TrainingRun, due
from diffusers_vqdit.training.sharding import check_unsharded, evaluated
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.training.utilisation import Utilisation
from diffusers_vqdit.training.watch import TrainingWatch
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    non_negative_number,
    number,
    positive_integer,
    positive_number,
)
from diffusers_vqdit.utils.wav_files import write_wav


logger = get_logger(__name__)

PROJECT = "audio_vq"  # of the trackers
SPECTROGRAM = ("sampling_rate", "n_fft", "hop_length", "num_mel_bins", "min_frequency", "max_frequency")
SIZES = ("block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels")
CODEBOOK = ("num_vq_embeddings", "vq_embed_dim", "beta", "restart_threshold")
KEPT = 4  # sounds that are kept to be listened to


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Train an audio tokenizer.")

    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", type=model_name, help="SpectrogramVQModel to finetune.")
    model.add_argument("--sampling_rate", type=positive_integer, default=11025, help="In Hz; sounds are resampled.")
    model.add_argument("--n_fft", type=positive_integer, default=512)
    model.add_argument("--hop_length", type=positive_integer, default=128)
    model.add_argument("--num_mel_bins", type=positive_integer, default=64)
    model.add_argument("--min_frequency", type=non_negative_number, default=40.0)
    model.add_argument("--max_frequency", type=positive_number, help="By default half the sampling rate.")
    model.add_argument(
        "--log_mel_range",
        type=number(),
        nargs=2,
        default=[-4.0, 0.5],
        metavar=("LOW", "HIGH"),
        help="log10 of the lowest mel amplitude that is told from silence, and of the highest.",
    )
    model.add_argument("--block_out_channels", type=positive_integer, nargs="+", default=[24, 48, 96, 128])
    model.add_argument("--layers_per_block", type=positive_integer, default=1)
    model.add_argument("--norm_num_groups", type=positive_integer, default=8)
    model.add_argument("--latent_channels", type=positive_integer, default=64)
    model.add_argument("--num_vq_embeddings", type=positive_integer, default=2048)
    model.add_argument("--vq_embed_dim", type=positive_integer, default=8)
    model.add_argument("--beta", type=non_negative_number, default=0.25, help="Weight of the commitment term.")
    model.add_argument("--restart_threshold", type=non_negative_number, default=0.1)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub dataset, or path of a parquet file.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="Folder of sounds.")
    data.add_argument("--audio_column", default="audio")
    data.add_argument(
        "--validation_split",
        help="Split for the PSNR, by default test if there is one; 'none' takes training sounds.",
    )
    data.add_argument(
        "--crop_length",
        type=positive_number,
        default=1.5,
        help="Seconds of the part of a sound that a step sees.",
    )
    data.add_argument("--max_train_samples", type=positive_integer)
    data.add_argument("--cache_dir")

    add_training_arguments(
        parser,
        output_dir="outputs/audio_vq",
        train_batch_size=4,
        num_train_epochs=5,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=50,
        adam_beta2=0.99,
        adam_weight_decay=0.0,
        ema_decay=0.99,
    ).add_argument("--reconstruction_loss", choices=["l1", "l2"], default="l2", help="Of log-mel spectrograms.")

    add_keeping_arguments(parser)
    args = parser.parse_args(input_args)
    refuse_unused_arguments(parser, args)
    return args


def build_model(args: argparse.Namespace) -> SpectrogramVQModel:
    if args.pretrained_model_name_or_path is not None:
        place = {"cache_dir": args.cache_dir, "torch_dtype": torch.float32}
        model = SpectrogramVQModel.from_pretrained(args.pretrained_model_name_or_path, **place)
    else:
        options = {name: getattr(args, name) for name in (*SPECTROGRAM, *SIZES, *CODEBOOK)}
        model = SpectrogramVQModel(**options, log_mel_range=tuple(args.log_mel_range))
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.compile:
        # The quantizer, whose statistics and restarts break graphs, stays as it is.
        for part in (model.vq.encoder, model.vq.decoder):
            part.compile()
    return model


@torch.no_grad()
def validate(model: SpectrogramVQModel, sounds: SoundDataset, args: argparse.Namespace, step: int) -> dict[str, float]:
    """PSNR of log-mel spectrograms and codebook usage on `sounds`; what the first ones decode to is kept as WAV files.

    These tell what the data are, which may be private: they are never published.
    """
    model.eval()
    rate, values, codes = model.config.sampling_rate, [], []
    (args.output_dir / "samples").mkdir(parents=True, exist_ok=True)
    for index in range(len(sounds)):
        spectrogram = model.spectrogram(as_waveform(sounds[index])[None].to(model.device))
        found = model.vq.encode_codes(spectrogram)
        values.append(psnr(model.vq.decode_codes(found).sample, spectrogram).cpu())
        codes.append(found.flatten().cpu())
        if index < KEPT:
            decoded = model.decode_codes(found.transpose(1, 2)).sample[0].cpu().numpy()
            write_wav(args.output_dir / "samples" / f"step-{step:06d}-{index}.wav", decoded, rate)
    model.train()
    usage, perplexity = code_usage(torch.cat(codes), model.num_codes)
    figures = {"psnr": float(torch.cat(values).mean()), "usage": usage, "perplexity": perplexity}
    return {f"validation/{name}": value for name, value in figures.items()}


def publish(
    args: argparse.Namespace, model: SpectrogramVQModel, measured: dict[str, float], step: int | None = None
) -> None:
    """Save the model, with the feature extractor that every codec of a pipeline has, and its card; push them where
    that is asked for."""
    extractor = EncodecFeatureExtractor(sampling_rate=model.config.sampling_rate)
    files = [*save_pretrained_atomically(model, args.output_dir), "preprocessor_config.json"]
    extractor.save_pretrained(args.output_dir)
    split = "training sounds" if args.validation_split == "none" else f"{args.validation_split} split"
    dataset = f"{Path(args.dataset_name or args.train_data_dir).stem}, {split}"
    measures = [
        Measure("audio tokenizer", name.removeprefix("validation/"), measured[name], dataset) for name in measured
    ]
    publish_run(args, model, files=files, measures=measures, step=step)


def main(args: argparse.Namespace) -> None:
    accelerator = setup.make_accelerator(args)
    check_unsharded(accelerator)
    files = ["README.md", "config.json", "preprocessor_config.json"]
    with setup.open_run(args, accelerator, project=PROJECT, folders=["samples"], files=files) as run:
        train(args, accelerator, run)


def train(args: argparse.Namespace, accelerator: Accelerator, run: TrainingRun) -> None:
    # 1. The model, the sounds
    model = build_model(args)
    sounds, held_out = load_sounds(args, model.config.sampling_rate)
    frames = max(1, round(args.crop_length * model.config.sampling_rate / model.downsample_factor))
    length = frames * model.downsample_factor

    # 2. Optimizer and learning rate
    ema = setup.make_ema(args, model.parameters(), accelerator.device)
    model, optimizer, lr_scheduler, max_steps = setup.prepare(args, accelerator, model, len(sounds))

    # 3. Resume
    identity = {
        "script": "train_audio_vq",
        **{name: getattr(args, name) for name in ("reconstruction_loss", "crop_length", "use_ema")},
        "model": plain_config(unwrap(model)),
        **sounds.identity(),
    }
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    measured = run.begin(checkpoint, identity=identity, args=args, states={"ema": ema}).get("validation", {})
    setup.start_trackers(args, accelerator, PROJECT)

    # 4. Train
    step, micro_step = run.step, run.step * args.gradient_accumulation_steps
    batches = setup.run_batches(args, accelerator, len(sounds), step)
    progress = setup.progress_bar(accelerator, max_steps, step)
    trained, difference = list(model.parameters()), F.l1_loss if args.reconstruction_loss == "l1" else F.mse_loss
    utilisation = Utilisation(args, accelerator)
    watch = TrainingWatch(accelerator, max_grad_norm=args.max_grad_norm, quantizer=unwrap(model).vq.quantize)
    started, seen, stop = time.time(), 0, False
    while step < max_steps and not stop:
        part = {"seed": args.seed, "step": micro_step, "rank": accelerator.process_index}
        waveforms = crop_sounds(sounds, next(batches), length, **part)
        with accelerator.accumulate(model), utilisation.counting():
            output = model(waveforms.to(accelerator.device))
            reconstruction = difference(output.sample.float(), output.spectrogram.float())
            loss = reconstruction + output.commit_loss
            norm = run.descend(optimizer, trained, loss, args.max_grad_norm, lr_scheduler, ema)
        micro_step += 1
        seen += len(waveforms) * accelerator.num_processes
        if not accelerator.sync_gradients:
            continue

        step += 1
        run.end_step(step)
        means = accelerator.reduce(torch.stack([reconstruction, output.commit_loss]).detach(), "mean").tolist()
        logs = {"reconstruction": means[0], "commitment": means[1], "usage": output.usage.item()}
        progress.update(1)
        progress.set_postfix({**{name: f"{value:.4f}" for name, value in logs.items()}, **measured})
        logs |= {"perplexity": output.perplexity.item(), "gradient_norm": norm, "lr": lr_scheduler.get_last_lr()[0]}
        speed = {"skipped_steps": run.skipped_steps, "sounds_per_second": seen / (time.time() - started)}
        accelerator.log({**logs, **speed, **utilisation.figures()}, step=step)
        watch.look(step, logs["reconstruction"], norm, output.codes, logs["usage"])
        last = step == max_steps
        if accelerator.is_main_process and (last or due(step, args.validation_steps)):
            with averaged_weights(ema, trained):
                measured = validate(unwrap(model), held_out, args, step)
            accelerator.log(measured, step=step)
            logger.info(f"step {step}: {measured}")
        stop = run.stop_requested()
        if last or stop or due(step, args.checkpointing_steps):
            kept = {"total_limit": args.checkpoints_total_limit, **run.kept(validation=measured)}
            save_checkpoint(accelerator, args.output_dir, step, **kept)
            if accelerator.is_main_process and publishes_checkpoints(args) and not last and not stop:
                with evaluated(accelerator, model, ema, trained) as whole:
                    publish(args, whole, measured, step)
    progress.close()

    # 5. Save
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and (step == max_steps or not stop):
        with evaluated(accelerator, model, ema, trained) as whole:
            publish(args, whole, measured)
        logger.info(f"saved to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
