#!/usr/bin/env python
"""Train an audio tokenizer: waveforms to codes of their spectrograms and back; or finetune an audio codec.

    accelerate launch training/train_audio_vq.py \
        --dataset_name outputs/speech.parquet --max_train_steps 1000 --use_ema --output_dir outputs/audio_vq

on any data that `datasets` reads with a column of sounds, a folder of recordings too. What is learned is an image
VQ-VAE of log-mel spectrograms; waveforms are made of these by the Griffin-Lim algorithm, which learns nothing, or by a
vocoder of transformers that was trained for such spectrograms. ``--pretrained_model_name_or_path`` finetunes such a
model, or a codec of transformers, waveform in and waveform out: `DacModel`, the decoders of `EncodecModel` and
`MimiModel` (docs/audio.md).

On the English captions of ``prepare_speech.py --languages en --voices_per_caption 1`` this command, some 14 minutes of
one CPU core, reached a PSNR of 25.7 dB on the log-mel spectrograms of 256 sounds of the test split, with 99.8 % of the
codes in use there. Of 60 of these, all captions that training never saw, pocketsphinx recognised 59 after it, and 60
as they were and after Griffin-Lim alone.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import EncodecFeatureExtractor

from diffusers_vqdit import SpectrogramVQModel
from diffusers_vqdit.pipelines.audio_codecs import decode_waveform
from diffusers_vqdit.training import setup
from diffusers_vqdit.training.adversarial import ADVERSARIAL_IDENTITY, Adversary, add_adversarial_arguments
from diffusers_vqdit.training.arguments import add_keeping_arguments, add_training_arguments
from diffusers_vqdit.training.audio_data import SoundDataset, as_waveform, load_sounds
from diffusers_vqdit.training.audio_objectives import AudioObjective, audio_objective
from diffusers_vqdit.training.checkpoints import find_checkpoint, plain_config, save_checkpoint
from diffusers_vqdit.training.files import save_pretrained_atomically
from diffusers_vqdit.training.model_card import Measure
from diffusers_vqdit.training.optimization import averaged_weights, unwrap
from diffusers_vqdit.training.publish import publish_run, publishes_checkpoints
from diffusers_vqdit.training.run import TrainingRun, due
from diffusers_vqdit.training.sharding import check_unsharded, evaluated
from diffusers_vqdit.training.streaming_arguments import add_streaming_argument, check_streaming
from diffusers_vqdit.training.throughput import Throughput, shown_rate
from diffusers_vqdit.training.tokenizers import load_codec
from diffusers_vqdit.training.unused_arguments import refuse_unused_arguments
from diffusers_vqdit.training.utilisation import Utilisation
from diffusers_vqdit.training.watch import TrainingWatch
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    model_name,
    non_negative_integer,
    non_negative_number,
    number,
    positive_integer,
    positive_number,
)
from diffusers_vqdit.utils.told_errors import told_errors
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
    model.add_argument(
        "--pretrained_model_name_or_path",
        type=model_name,
        help="Codec to finetune: a SpectrogramVQModel, or one of transformers with its feature extractor.",
    )
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
    data.add_argument("--dataset_name", help="Hub dataset, or files of it: a path, folder or pattern.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="Folder of sounds.")
    data.add_argument("--audio_column", default="audio")
    data.add_argument(
        "--validation_split",
        help="Split to measure on, by default test if there is one; 'none' takes training sounds.",
    )
    data.add_argument(
        "--crop_length",
        type=positive_number,
        default=1.5,
        help="Seconds of the part of a sound that a step sees.",
    )
    data.add_argument("--max_train_samples", type=positive_integer)
    add_streaming_argument(data, encoded=False)
    data.add_argument(
        "--dataloader_num_workers",
        type=non_negative_integer,
        default=0,
        help="Processes that decode sounds ahead of time; 0: the main process does.",
    )
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
    ).add_argument(
        "--reconstruction_loss",
        choices=["l1", "l2"],
        help="Of log-mel spectrograms: by default l2, and l1 where a codec makes waveforms.",
    )
    add_adversarial_arguments(parser.add_argument_group("losses"))

    add_keeping_arguments(parser)
    args = parser.parse_args(input_args)
    check_streaming(parser, args, encoded=False)
    refuse_unused_arguments(parser, args)
    return args


def build_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The codec that is trained, a new one or a pretrained one, and its feature extractor."""
    if args.pretrained_model_name_or_path is not None:
        name, argument = args.pretrained_model_name_or_path, "pretrained_model_name_or_path"
        return load_codec(name, argument=argument, cache_dir=args.cache_dir, frozen=False)
    options = {name: getattr(args, name) for name in (*SPECTROGRAM, *SIZES, *CODEBOOK)}
    model = SpectrogramVQModel(**options, log_mel_range=tuple(args.log_mel_range))
    return model, EncodecFeatureExtractor(sampling_rate=args.sampling_rate)


@torch.no_grad()
def validate(
    model: Any, objective: AudioObjective, sounds: SoundDataset, args: argparse.Namespace, step: int
) -> dict[str, float]:
    """The objective's metric and codebook usage on `sounds`; what the first ones decode to is kept as WAV files.

    These tell what the data are, which may be private: they are never published.
    """
    model.eval()
    values, codes = [], []
    (args.output_dir / "samples").mkdir(parents=True, exist_ok=True)
    for index in range(len(sounds)):
        value, found = objective.measure(model, as_waveform(sounds[index]).to(model.device))
        values.append(value)
        codes.append(found)
        if index < KEPT:
            decoded = decode_waveform(model, found).cpu().numpy()
            path = args.output_dir / "samples" / f"step-{step:06d}-{index}.wav"
            write_wav(path, decoded, objective.sampling_rate)
    objective.train(model)
    figures = {objective.metric: sum(values) / len(values), **objective.usage(torch.cat(codes))}
    return {f"validation/{name}": value for name, value in figures.items()}


def publish(
    args: argparse.Namespace,
    model: Any,
    objective: AudioObjective,
    measured: dict[str, float],
    step: int | None = None,
) -> None:
    """Save the model, with the feature extractor that every codec of a pipeline has, and its card; push them where
    that is asked for."""
    files = [*save_pretrained_atomically(model, args.output_dir), "preprocessor_config.json"]
    objective.feature_extractor.save_pretrained(args.output_dir)
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
    # 1. The codec, the sounds
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    model, extractor = build_model(args)
    objective = audio_objective(model.to(accelerator.device), extractor, args)
    length = max(1, round(args.crop_length * objective.sampling_rate / objective.hop)) * objective.hop
    sounds, held_out = load_sounds(args, objective.sampling_rate, length)

    # 2. Optimizers and learning rate
    ema = setup.make_ema(args, model.parameters(), accelerator.device)
    model, optimizer, lr_scheduler, max_steps = setup.prepare(
        args, accelerator, model, 0 if args.streaming else len(sounds)
    )
    adversary = Adversary.wanted(args, accelerator, (1, *objective.picture_size(length)))

    # 3. Resume
    named = ("reconstruction_loss", "crop_length", "use_ema", "streaming", *ADVERSARIAL_IDENTITY)
    identity = {
        "script": "train_audio_vq",
        **{name: getattr(args, name) for name in named},
        "model": plain_config(unwrap(model)),
        **sounds.identity(),
    }
    states = {"ema": ema, "lecam": adversary and adversary.lecam, "stream": sounds if args.streaming else None}
    measured = run.begin(checkpoint, identity=identity, args=args, states=states).get("validation", {})
    setup.start_trackers(args, accelerator, PROJECT)

    # 4. Train
    step = run.step
    waveforms = setup.sound_batches(args, accelerator, sounds, length, step)
    progress = setup.progress_bar(accelerator, max_steps, step)
    trained = list(model.parameters())
    utilisation = Utilisation(args, accelerator)
    watch = TrainingWatch(accelerator, args, quantizer=objective.quantizer)
    throughput, stop = Throughput(), False
    while step < max_steps and not stop:
        sample = next(waveforms).to(accelerator.device, non_blocking=True)
        with accelerator.accumulate(model, *([adversary.discriminator] if adversary else [])), utilisation.counting():
            output = objective.step(model, sample)
            loss, logs = output.loss, {"reconstruction": output.reconstruction, "commitment": output.commitment}
            if adversary:
                fooling, more = adversary.generator_loss(step, output.made, output.reconstruction)
                loss, logs = loss + fooling, logs | more
            norm = run.descend(optimizer, trained, loss, args.max_grad_norm, lr_scheduler, ema)
            if adversary:
                logs |= adversary.descend(run, step, output.real, output.made)
        throughput.add(len(sample) * accelerator.num_processes)
        if not accelerator.sync_gradients:
            continue

        step += 1
        run.end_step(step)
        means = accelerator.reduce(torch.stack([value.detach().float() for value in logs.values()]), "mean").tolist()
        logs = dict(zip(logs, means, strict=True)) | output.figures
        progress.update(1)
        shown = {name: f"{logs[name]:.4f}" for name in ("reconstruction", "commitment", "usage")}
        logs |= {"gradient_norm": norm, "lr": lr_scheduler.get_last_lr()[0], "skipped_steps": run.skipped_steps}
        logs["sounds_per_second"] = throughput.end_step()
        progress.set_postfix({**shown, **measured, "sounds/s": shown_rate(logs["sounds_per_second"])})
        accelerator.log({**logs, **utilisation.figures()}, step=step)
        watch.look(step, logs["reconstruction"], norm, output.codes, logs["usage"])
        last = step == max_steps
        if accelerator.is_main_process and (last or due(step, args.validation_steps)):
            with averaged_weights(ema, trained):
                measured = validate(unwrap(model), objective, held_out, args, step)
            accelerator.log(measured, step=step)
            logger.info(f"step {step}: {measured}")
        stop = run.stop_requested()
        if last or stop or due(step, args.checkpointing_steps):
            kept = {"total_limit": args.checkpoints_total_limit, **run.kept(validation=measured)}
            save_checkpoint(accelerator, args.output_dir, step, **kept)
            if accelerator.is_main_process and publishes_checkpoints(args) and not last and not stop:
                with evaluated(accelerator, model, ema, trained) as whole:
                    publish(args, whole, objective, measured, step)
                objective.train(unwrap(model))
        throughput.go_on()
    progress.close()

    # 5. Save
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and (step == max_steps or not stop):
        with evaluated(accelerator, model, ema, trained) as whole:
            publish(args, whole, objective, measured)
        logger.info(f"saved to {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    with told_errors():
        main(parse_args())
