#!/usr/bin/env python
"""Train the same image tokenizer with each quantizer for the same number of steps, and write a table.

    python benchmarks/quantizers.py --max_train_steps 3000 --output_dir outputs/quantizers

Beside the package's own, those of vector-quantize-pytorch are dropped into the same model and loop where it is
installed (pip install vector-quantize-pytorch), with options that match. All have about as many codes: `--num_codes`
must be a power of two, and FSQ takes levels whose product is near it. All have the same seed and see the same batches.
Speed is that of a training step of the whole model, relative to the first row's, all taking turns. What
``quantizers.json`` in the output folder has already is kept, so that a run that was cut short goes on.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid

from diffusers_vqdit import ImageVQModel
from diffusers_vqdit.models.quantizers.vector import Quantizer, QuantizerOutput, perplexity
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.row_order import shuffled_batches
from diffusers_vqdit.training.tokenizer_metrics import measure_image_tokenizer
from diffusers_vqdit.utils.arguments import (
    argument_parser,
    output_path,
    positive_integer,
    positive_number,
    random_seed,
    torch_device,
)
from diffusers_vqdit.utils.decoding import to_pixels


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser("Compare quantizers in the same image tokenizer.")
    parser.add_argument("--dataset_name", default="training/data/emoji.parquet")
    parser.add_argument("--resolution", type=positive_integer, default=32)
    parser.add_argument("--num_codes", type=positive_integer, default=1024)
    parser.add_argument("--code_dim", type=positive_integer, default=8, help="Of the quantizers with a codebook.")
    parser.add_argument("--block_out_channels", type=positive_integer, nargs="+", default=[24, 48, 96])
    parser.add_argument("--train_batch_size", type=positive_integer, default=32)
    parser.add_argument("--max_train_steps", type=positive_integer, default=3000)
    parser.add_argument("--learning_rate", type=positive_number, default=2e-3)
    parser.add_argument("--speed_rounds", type=positive_integer, default=20)
    parser.add_argument("--seeds", type=random_seed, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="Names of rows to compute; by default all.")
    parser.add_argument("--device", type=torch_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=output_path, default=Path("outputs/quantizers"))
    return parser.parse_args(input_args)


# FSQ levels near a power of two (Mentzer et al. 2023, table 1).
FSQ_LEVELS = {64: [4, 4, 4], 256: [8, 6, 5], 1024: [8, 5, 5, 5], 4096: [7, 5, 5, 5, 5], 16384: [8, 8, 8, 6, 5]}


def candidates(args: argparse.Namespace) -> dict[str, tuple[dict, Callable[[], Quantizer] | None]]:
    """Name -> options of `ImageVQModel`, and what makes the quantizer to put in its place, if not the model."""
    bits = round(math.log2(args.num_codes))
    if 2**bits != args.num_codes or args.num_codes not in FSQ_LEVELS:
        raise ValueError(f"--num_codes {args.num_codes} must be one of {list(FSQ_LEVELS)}")
    levels = FSQ_LEVELS[args.num_codes]
    codebook = {"num_vq_embeddings": args.num_codes, "vq_embed_dim": args.code_dim}
    scalar = {"num_vq_embeddings": math.prod(levels), "vq_embed_dim": len(levels)}
    binary = {"num_vq_embeddings": args.num_codes, "vq_embed_dim": bits}
    ema = {"codebook_norm": "l2", "codebook_update": "ema", "codebook_init": "kmeans", "restart_threshold": 0.1}
    entropy = {"entropy_weight": 0.1}
    ours = {
        "vq": {**codebook, **ema},
        "vq, rotation trick": {**codebook, **ema, "gradient_estimator": "rotation"},
        # Theirs restarts all codes that fewer than two vectors a batch have on average, as its README advises: at
        # batch 16 twice the uniform share; ours takes shares below 1, and by default a tenth.
        "rvq, two codes": {
            **{**codebook, **ema, "codebook_norm": "none", "restart_threshold": 0.5},
            **{"quantizer_type": "rvq", "num_quantizers": 2},
        },
        "simvq": {**codebook, "quantizer_type": "simvq", "gradient_estimator": "rotation"},
        "ibq": {**codebook, "quantizer_type": "ibq", **entropy},
        "ibq, unit length": {**codebook, "quantizer_type": "ibq", "codebook_norm": "l2", **entropy},
        "fsq": {**scalar, "quantizer_type": "fsq", "fsq_levels": levels},
        "lfq": {**binary, "quantizer_type": "lfq", **entropy},
        "bsq": {**binary, "quantizer_type": "lfq", "codebook_norm": "l2", **entropy},
    }
    rows: dict[str, tuple[dict, Callable[[], Quantizer] | None]] = {name: (o, None) for name, o in ours.items()}
    try:
        import vector_quantize_pytorch as theirs
    except ImportError:
        print("vector-quantize-pytorch is not installed: its quantizers are left out")
        return rows

    def vq(**options) -> Quantizer:
        module = theirs.VectorQuantize(
            args.code_dim,
            args.num_codes,
            commitment_weight=0.25,
            decay=0.99,
            use_cosine_sim=True,
            kmeans_init=True,
            threshold_ema_dead_code=2,
            **options,
        )
        return Foreign(module, args.num_codes, args.code_dim)

    def residual_vq() -> Quantizer:
        module = theirs.ResidualVQ(
            dim=args.code_dim,
            num_quantizers=2,
            codebook_size=args.num_codes,
            commitment_weight=0.25,
            decay=0.99,
            kmeans_init=True,
            threshold_ema_dead_code=2,
        )
        return Foreign(module, args.num_codes, args.code_dim, levels=(2,))

    def lfq(**options) -> Quantizer:
        module = theirs.LFQ(
            dim=bits, codebook_size=args.num_codes, entropy_loss_weight=0.1, commitment_loss_weight=0.25, **options
        )
        return Foreign(module, args.num_codes, bits)

    return rows | {
        "vector-quantize-pytorch VectorQuantize": (codebook, lambda: vq(rotation_trick=False)),
        "vector-quantize-pytorch VectorQuantize, rotation trick": (codebook, lambda: vq(rotation_trick=True)),
        "vector-quantize-pytorch ResidualVQ, two codes": (
            {**codebook, "quantizer_type": "rvq", "num_quantizers": 2},
            residual_vq,
        ),
        "vector-quantize-pytorch SimVQ": (
            codebook,
            lambda: Foreign(
                theirs.SimVQ(dim=args.code_dim, codebook_size=args.num_codes), args.num_codes, args.code_dim
            ),
        ),
        "vector-quantize-pytorch FSQ": (
            scalar,
            lambda: Foreign(theirs.FSQ(levels), math.prod(levels), len(levels)),
        ),
        "vector-quantize-pytorch LFQ": (binary, lfq),
        "vector-quantize-pytorch LFQ, spherical": (binary, lambda: lfq(spherical=True)),
    }


class Foreign(Quantizer):
    """A quantizer of vector-quantize-pytorch behind our interface; residual codes have `levels`, (q,)."""

    def __init__(self, module: torch.nn.Module, num_codes: int, code_dim: int, levels: tuple[int, ...] = ()) -> None:
        super().__init__(num_codes, code_dim)
        self.module, self.levels = module, levels

    def _call(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        output = tuple(self.module(vectors.reshape(1, -1, self.code_dim).float()))
        loss = output[2] if len(output) > 2 else vectors.new_zeros(())
        codes = output[1].view(*vectors.shape[:-1], *self.levels).long()
        return output[0].view(vectors.shape), codes, loss.sum()

    def encode(self, vectors: torch.Tensor) -> torch.LongTensor:
        return self._call(vectors)[1]

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        names = ("get_output_from_indices", "get_codes_from_indices", "indices_to_codes")  # the first: of all levels
        name = next(name for name in names if hasattr(self.module, name))
        # Flat, because more dimensions are taken for a picture's, with the channels first.
        places = codes.shape[: codes.ndim - len(self.levels)]
        return getattr(self.module, name)(codes.reshape(1, -1, *self.levels)).view(*places, self.code_dim)

    def forward(self, vectors: torch.Tensor) -> QuantizerOutput:
        quantized, codes, loss = self._call(vectors)
        share = self.use_of_codes(codes)
        return QuantizerOutput(
            quantized=quantized,
            codes=codes,
            loss=loss,
            entropy_loss=loss.new_zeros(()),
            usage=(share > 0).float().mean(),
            perplexity=perplexity(share),
        )


class Training:
    """A model with one of the quantizers, and its training."""

    def __init__(
        self,
        options: dict,
        make: Callable[[], Quantizer] | None,
        pictures: torch.Tensor,
        seed: int,
        args: argparse.Namespace,
    ) -> None:
        torch.manual_seed(seed)
        levels = len(args.block_out_channels)
        self.model = ImageVQModel(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=args.block_out_channels,
            norm_num_groups=8,
            mid_block_add_attention=False,
            latent_channels=64,
            sample_size=args.resolution,
            **options,
        )
        if make is not None:
            self.model.quantize = make()
        self.model.train().to(args.device, memory_format=torch.channels_last)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.scheduler = get_scheduler(
            "cosine",
            self.optimizer,
            num_warmup_steps=min(100, args.max_train_steps),
            num_training_steps=args.max_train_steps,
        )
        self.pictures = pictures
        self.batches = shuffled_batches(len(pictures), args.train_batch_size, seed=seed)

    def step(self) -> None:
        sample = to_pixels(self.pictures[next(self.batches)]).to(self.model.device)
        output = self.model(sample)
        (F.mse_loss(output.sample, sample) + output.commit_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


def measure_speed(trainings: dict[str, Training], rounds: int) -> dict[str, float]:
    """How many steps each takes in the time of one of the first: the median over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for turn in range(rounds + 2):
        for name, training in trainings.items():
            start = time.perf_counter()
            training.step()
            if training.model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # the first ones initialise codebooks
                times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    return {name: statistics.median(a / b for a, b in zip(first, own, strict=True)) for name, own in times.items()}


def as_table(quality: dict[str, list[dict]], speed: dict[str, float]) -> str:
    """The means over the seeds, and the speeds, as a Markdown table."""
    columns = {"codes": "{:.0f}", "psnr": "{:.2f}", "ssim": "{:.3f}", "usage": "{:.3f}", "perplexity": "{:.0f}"}
    lines = ["| quantizer | codes | PSNR (dB) | SSIM | usage | perplexity | speed |", "|---" + "|---:" * 6 + "|"]
    for name, runs in quality.items():
        means = {column: sum(run[column] for run in runs) / len(runs) for column in columns}
        cells = [form.format(means[column]) for column, form in columns.items()]
        lines.append(f"| {' | '.join([name, *cells, f'{speed[name]:.2f}x'])} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    pictures, held_out = (
        decode_images(
            load_training_dataset(dataset_name=args.dataset_name, split=split, image_column="image"),
            "image",
            args.resolution,
        )[0]
        for split in ("train", "test")
    )
    rows = candidates(args)
    if args.only and (unknown := set(args.only) - set(rows)):
        raise ValueError(f"--only {sorted(unknown)} must be among {list(rows)}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    figures_file = args.output_dir / "quantizers.json"
    unlike = ("only", "seeds", "speed_rounds", "device", "output_dir")  # what may differ between runs that go together
    settings = {name: value for name, value in vars(args).items() if name not in unlike}
    kept = json.loads(figures_file.read_text()) if figures_file.is_file() else {"settings": settings, "quality": {}}
    if kept["settings"] != settings:
        raise ValueError(
            f"--output_dir {args.output_dir} has figures of the settings {kept['settings']}, not of {settings}; "
            "name another folder"
        )
    quality: dict[str, list[dict]] = kept["quality"]
    chosen = {name: row for name, row in rows.items() if not args.only or name in args.only}
    for name, (options, make) in chosen.items():
        for seed in args.seeds:
            if seed in (run["seed"] for run in quality.get(name, [])):
                continue
            training = Training(options, make, pictures, seed, args)
            for _ in range(args.max_train_steps):
                training.step()
            model = training.model.eval()
            figures = measure_image_tokenizer(model, held_out.split(64))
            quality.setdefault(name, []).append({**figures, "codes": options["num_vq_embeddings"], "seed": seed})
            print(name, json.dumps(figures))
            figures_file.write_text(json.dumps(kept, indent=2) + "\n")
            shown = to_pixels(held_out[:16]).to(args.device)
            with torch.no_grad():
                decoded = model.decode_codes(model.encode_codes(shown)).sample
            grid = make_image_grid(
                VaeImageProcessor().postprocess(torch.cat([shown, decoded]).cpu()), rows=2, cols=len(shown)
            )
            grid.save(args.output_dir / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    trainings = {
        name: Training(options, make, pictures, args.seeds[0], args) for name, (options, make) in chosen.items()
    }
    speed = measure_speed(trainings, args.speed_rounds)
    table = as_table({name: quality[name] for name in chosen}, speed)
    (args.output_dir / "quantizers.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main(parse_args())
