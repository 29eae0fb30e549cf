#!/usr/bin/env python
"""Codes a position: held-out likelihood against training time, for patches of 1 x 1, 2 x 2 and 4 x 4 codes.

    python benchmarks/patches.py --seconds 3600

Text to pictures of 64 px, which are 16 x 16 codes of the starter's tokenizer and so 256, 64 or 16 positions. Every
setting trains the same blocks with the same batches for the same time, by default short: what it shows then is that
the benchmark runs. Time is the process's own on the CPU, evaluation apart, so that a shared machine doesn't count;
compare runs of one number of threads (``OMP_NUM_THREADS``).

At equal intervals the averaged weights' negative ELBO of the test split's pictures is measured, in bits a code, with
the same masks for all. Writes ``patches.json``, and the training's state, from which a killed run goes on, also with
more ``--seconds``.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.likelihood.bounds import negative_elbo, stratified_masks
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.codes import INDEX_FILE, CodeDataset, encode_dataset
from diffusers_vqdit.training.data import load_training_dataset
from diffusers_vqdit.training.draws import step_generator
from diffusers_vqdit.training.masked_loss import masked_diffusion_loss


ROOT = Path(__file__).resolve().parent.parent
TASK = Task(("text",), ("image",))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare numbers of codes a position.")
    parser.add_argument("--pretrained_model_name_or_path", default=str(ROOT / "model_cards/vqdit-emoji"))
    parser.add_argument("--dataset_name", default=str(ROOT / "training/data/emoji.parquet"))
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--patches", type=int, nargs="+", default=[1, 2, 4], help="Sides of the patches, in codes.")
    parser.add_argument("--seconds", type=float, default=120, help="CPU time that each trains for.")
    parser.add_argument("--evaluations", type=int, default=4, help="In these seconds.")
    parser.add_argument("--num_test_samples", type=int, default=64)
    parser.add_argument("--num_masks", type=int, default=8)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--attention_head_dim", type=int, default=64)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=50)
    parser.add_argument("--ema_decay", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/patches"))
    return parser.parse_args(input_args)


def load_codes(args: argparse.Namespace, split: str) -> CodeDataset:
    """A split's pictures and captions as the starter's codes, encoded once."""
    folder = args.output_dir / f"codes-{args.resolution}-{split}"
    if not (folder / INDEX_FILE).is_file():
        pipe = VQDiTPipeline.from_pretrained(args.pretrained_model_name_or_path)
        data = load_training_dataset(
            dataset_name=args.dataset_name, split=split, image_column="image", columns=["text"]
        )
        encode_dataset(
            data,
            folder,
            resolution=args.resolution,
            image_vq=pipe.image_vq,
            text_vq=pipe.text_vq,
            tokenizer=pipe.tokenizer,
            image_column="image",
            caption_column="text",
        )
    return CodeDataset(folder)


@torch.no_grad()
def bits_per_code(model: VQDiTTransformer2DModel, codes: CodeDataset, args: argparse.Namespace) -> float:
    """The mean negative ELBO of the first test samples, masks shared by all."""
    given, generated = codes.batch(torch.arange(min(args.num_test_samples, len(codes))), TASK)
    total = generated["image"][0].numel()
    masks, _ = stratified_masks(total, args.num_masks, torch.Generator().manual_seed(0))
    nll = negative_elbo(model, generated, model.encode_prefix(given), masks).nll
    return float(nll.mean()) / total / math.log(2)


def train(side: int, train_codes: CodeDataset, test_codes: CodeDataset, args: argparse.Namespace) -> list[dict]:
    """The curve of one patch: a point an evaluation."""
    torch.manual_seed(args.seed)
    segments = {name: dict(train_codes.segments[name]) for name in TASK.segments}
    segments["image"]["patch"] = [side, side]
    model = VQDiTTransformer2DModel(
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_layers=args.num_layers,
        segments=segments,
        tasks=[str(TASK)],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    average = EMAModel(model.parameters(), decay=args.ema_decay)
    scheduler = MaskedDiffusionScheduler()
    file = args.output_dir / f"patch-{side}.pt"
    step, seconds, curve = 0, 0.0, []
    if file.is_file():
        state = torch.load(file, weights_only=True)
        step, seconds, curve = state["step"], state["seconds"], state["curve"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
    interval = args.seconds / args.evaluations
    while seconds < args.seconds:
        due = min((math.floor(seconds / interval) + 1) * interval, args.seconds)
        model.train()
        while seconds < due:
            start = time.process_time()
            generator = step_generator(args.seed, step)
            rows = torch.randint(len(train_codes), (args.train_batch_size,), generator=generator)
            given, generated = train_codes.batch(rows, TASK, generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * min(1.0, (step + 1) / args.lr_warmup_steps)
            loss = masked_diffusion_loss(model, scheduler, given, generated, generator=generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(model.parameters())
            step += 1
            seconds += time.process_time() - start
        model.eval()
        average.store(model.parameters())
        average.copy_to(model.parameters())
        curve.append({"seconds": seconds, "steps": step, "bits_per_code": bits_per_code(model, test_codes, args)})
        average.restore(model.parameters())
        print(json.dumps({"patch": side, "loss": loss.item(), **curve[-1]}), flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state_dict()}
        torch.save({**state, "step": step, "seconds": seconds, "curve": curve}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return curve


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train_codes, test_codes = (load_codes(args, split) for split in ("train", "test"))
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "patches")}
    results = {"settings": settings, "threads": torch.get_num_threads(), "curves": {}}
    for side in args.patches:
        results["curves"][f"{side}x{side}"] = train(side, train_codes, test_codes, args)
        (args.output_dir / "patches.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
