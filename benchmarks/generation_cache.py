#!/usr/bin/env python
"""The approximate cache of the generated side: CPU time against exactness, on the emoji dataset.

    python -m benchmarks.generation_cache --num_samples 64

Each line draws the same captions with the same seeds. Equal codes: the share of codes that are those of the first
line, without a cache. Right: the nearest picture of the whole set is the one that the caption names, as in
``benchmarks/samplers.py``. The CPU time is that of the sampling alone, without decoding, as a ratio to the first
line's; all take turns. A second table has a model of 1,024 codes with random weights, guided, batch 1.
"""

import argparse
import statistics
import time

import torch

from diffusers_vqdit import GenerationCacheConfig, MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.training import evaluation
from diffusers_vqdit.utils.arguments import argument_parser, model_name, number, positive_integer, random_seed


CACHES = [None, (2, 0.0), (4, 0.0), (4, 0.5), (4, 0.9), (8, 0.9), (16, 0.9)]


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Compare caches of the generated side.")
    parser.add_argument("--pretrained_model_name_or_path", type=model_name, default="model_cards/vqdit-emoji-32")
    parser.add_argument("--dataset_name", default="training/data/emoji.parquet")
    parser.set_defaults(image_column="image", caption_columns={"text": "English"}, label_column="label")
    parser.add_argument("--num_samples", type=positive_integer, default=64, help="Captions of each kind.")
    parser.add_argument("--batch_size", type=positive_integer, default=32)
    parser.add_argument("--num_inference_steps", type=positive_integer, default=16)
    parser.add_argument("--guidance_scale", type=number(), default=3.0)
    parser.add_argument("--rounds", type=positive_integer, default=3, help="Of the larger model.")
    parser.add_argument("--seed", type=random_seed, default=0)
    return parser.parse_args(input_args)


def choose(model: VQDiTTransformer2DModel, cache: tuple[int, float] | None) -> None:
    if model.is_cache_enabled:
        model.disable_cache()
    if cache is not None:
        model.enable_cache(GenerationCacheConfig(*cache))


def title(cache: tuple[int, float] | None) -> str:
    return "none" if cache is None else f"{cache[0]}, {cache[1]:g}"


def starter(args: argparse.Namespace) -> None:
    pipeline = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.transformer.config.segments["image"]["shape"][0]
    resolution = side * pipeline.image_vq.downsample_factor
    data = evaluation.EmojiData.load(pipeline.image_vq, resolution, args, resize_mode=pipeline.config.resize_mode)
    kinds = {"training captions": data.train, "held-out compositions": data.composition}
    found = {cache: {"seconds": 0.0, "codes": [], "right": []} for cache in CACHES}
    for rows in kinds.values():
        hits = {cache: [] for cache in CACHES}
        for start in range(0, len(rows), args.batch_size):
            part = rows[start : start + args.batch_size]
            for cache in CACHES:
                choose(pipeline.transformer, cache)
                generators = [torch.Generator().manual_seed(args.seed * 1_000_003 + row) for row in part]
                began = time.process_time()
                codes = pipeline(
                    data.texts(part),
                    generator=generators,
                    guidance_scale=args.guidance_scale,
                    num_inference_steps=args.num_inference_steps,
                    output_type="latent",
                ).images
                found[cache]["seconds"] += time.process_time() - began
                found[cache]["codes"].append(codes)
                with torch.no_grad():
                    pixels = pipeline.image_vq.decode_codes(codes).sample.clamp(-1, 1) / 2 + 0.5
                hits[cache] += data.nearest(pixels, part)
        for cache in CACHES:
            found[cache]["right"].append(evaluation.share(hits[cache]))
    print(f"| interval, ratio | CPU time | equal codes | {' | '.join(kinds)} |\n|{'---|' * (3 + len(kinds))}")
    plain = found[None]
    for cache, one in found.items():
        equal = (torch.cat(one["codes"]) == torch.cat(plain["codes"])).double().mean().item()
        right = [f"{100 * x['value']:.1f} ± {100 * x['standard_error']:.1f} %" for x in one["right"]]
        time_ratio = one["seconds"] / plain["seconds"]
        print(f"| {title(cache)} | {time_ratio:.2f} | {100 * equal:.1f} % | {' | '.join(right)} |", flush=True)


@torch.no_grad()
def larger(args: argparse.Namespace) -> None:
    segments = {"image": {"vocab_size": 4096, "shape": [32, 32]}, "text": {"vocab_size": 512, "shape": [77]}}
    model = VQDiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, num_layers=6, segments=segments)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model.eval()
    prefix = model.encode_prefix({"text": torch.randint(512, (1, 77))})
    modulation = model.encode_modulation({"image": torch.zeros(1, 32, 32, dtype=torch.int64)})

    def run(cache: tuple[int, float] | None) -> float:
        choose(model, cache)
        scheduler, codes, own = MaskedDiffusionScheduler(), torch.full((1, 32, 32), 4096), model.new_cache()
        scheduler.set_timesteps(args.num_inference_steps)
        generator, began = torch.Generator().manual_seed(args.seed), time.process_time()
        for timestep in scheduler.timesteps:
            options = {"prefix": prefix, "modulation": modulation, "with_unconditional": True, "cache": own}
            conditional, free = model({"image": codes}, **options).sample["image"].chunk(2)
            logits = torch.lerp(free, conditional, args.guidance_scale)
            codes = scheduler.step(logits, timestep, codes.flatten(1), generator=generator).prev_sample.view_as(codes)
        return time.process_time() - began

    seconds = {cache: [] for cache in CACHES}
    for _ in range(args.rounds):
        for cache in CACHES:
            seconds[cache].append(run(cache))
    print("| interval, ratio | CPU time, 1,024 codes |\n|---|---|")
    for cache in CACHES:
        ratios = [own / plain for own, plain in zip(seconds[cache], seconds[None], strict=True)]
        print(f"| {title(cache)} | {statistics.median(ratios):.2f} |", flush=True)


def main(args: argparse.Namespace) -> None:
    starter(args)
    larger(args)


if __name__ == "__main__":
    main(parse_args())
