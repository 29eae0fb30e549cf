"""What every figure of ``evaluate.py`` needs: the emoji dataset, a pipeline's samples, shares and means."""

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from ..models.image_vq import ImageVQModel
from ..pipelines.pipeline_vqdit import VQDiTPipeline
from .data import decode_images, load_training_dataset, to_pixels


COLUMNS = ["text", "text_zh", "keywords", "label", "emoji", "held_out"]


@dataclass
class EmojiData:
    """The dataset and the sets of rows that are measured.

    Args:
        pictures: (N, 3, H, W) uint8, the training split first.
        columns: each column's N values.
        train, composition, test: rows: some of the training split, the held-out compositions, the whole test split.
        codes, decoded: codes (N, h, w) of all pictures, and what they decode to, in [-1, 1].
    """

    pictures: torch.Tensor
    columns: dict[str, list[str]]
    train: list[int]
    composition: list[int]
    test: list[int]
    codes: torch.Tensor
    decoded: torch.Tensor

    @classmethod
    def load(cls, image_vq: ImageVQModel, resolution: int, args: argparse.Namespace) -> "EmojiData":
        train, test = (
            load_training_dataset(dataset_name=args.dataset_name, split=split, image_column="image", columns=COLUMNS)
            for split in ("train", "test")
        )
        pictures = torch.cat([decode_images(part, "image", resolution)[0] for part in (train, test)])
        columns = {name: [*train[name], *test[name]] for name in COLUMNS}
        test_rows = list(range(len(train), len(pictures)))
        composition = [row for row in test_rows if columns["held_out"][row] == "composition"]
        random.Random(args.seed).shuffle(composition)
        chosen = random.Random(args.seed).sample(range(len(train)), min(args.num_samples, len(train)))
        codes, decoded = reconstruct(image_vq, pictures, args.batch_size)
        return cls(pictures, columns, chosen, composition[: args.num_samples], test_rows, codes, decoded)

    def real(self, rows: list[int]) -> torch.Tensor:
        """Pictures in [0, 1], as pipelines take tensors."""
        return self.pictures[rows].float() / 255

    def texts(self, rows: list[int], column: str = "text") -> list[str]:
        return [self.columns[column][row] for row in rows]

    def distances(self, samples: torch.Tensor) -> torch.Tensor:
        """(S, N) from samples, in [0, 1], to all pictures of the set."""
        return torch.cdist((samples * 2 - 1).flatten(1).float().cpu(), self.decoded.flatten(1))

    def nearest_rows(self, samples: torch.Tensor) -> list[int]:
        return self.distances(samples).argmin(1).tolist()

    def nearest(self, samples: torch.Tensor, rows: list[int]) -> list[bool]:
        """Whether no picture of the set is nearer to a sample, in [0, 1], than its row's."""
        distance = self.distances(samples)
        named = distance.gather(1, torch.tensor(rows)[:, None])[:, 0]
        # Two emoji may look the same: the named one must be as near as the nearest.
        return (named <= distance.min(1).values + 1e-4).tolist()


def share(hits: list[bool]) -> dict[str, Any]:
    value = sum(hits) / len(hits)
    return {"value": value, "standard_error": math.sqrt(value * (1 - value) / len(hits)), "count": len(hits)}


def mean(values: torch.Tensor, unit: str) -> dict[str, Any]:
    error = values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"value": values.double().mean().item(), "standard_error": error, "count": len(values), "unit": unit}


def batched(size: int, batch_size: int, description: str) -> Iterator[slice]:
    for start in tqdm(range(0, size, batch_size), desc=description):
        yield slice(start, min(start + batch_size, size))


def sample(
    pipeline: VQDiTPipeline, args: argparse.Namespace, count: int, description: str, **inputs: Any
) -> list[Any]:
    """What the pipeline makes of `count` inputs, lists or tensors in batches, each with a seed of its own.

    Pictures come as one tensor in [0, 1].
    """
    if args.num_inference_steps is not None:
        inputs["num_inference_steps"] = args.num_inference_steps
    if args.guidance_scale is not None and "image" in inputs["output"]:
        inputs["guidance_scale"] = args.guidance_scale
    generators = [torch.Generator().manual_seed(args.seed * 1_000_003 + i) for i in range(count)]
    results: dict[str, list] = {}
    for part in batched(count, args.batch_size, description):

        def cut(value: Any, part: slice = part) -> Any:
            if isinstance(value, dict):
                return {name: cut(item) for name, item in value.items()}
            return value[part] if isinstance(value, list | torch.Tensor) else value

        options = {name: cut(value) for name, value in inputs.items()}
        given = any(name in inputs for name in ("prompt", "image", "class_label", "inputs"))
        if not given:
            options["num_images_per_prompt"] = part.stop - part.start
        output = pipeline(generator=generators[part], output_type="pt", **options)
        for name, value in output.segments.items():
            results.setdefault(name, []).append(value)
    joined = {n: torch.cat(v) if isinstance(v[0], torch.Tensor) else sum(v, []) for n, v in results.items()}
    return joined if len(joined) > 1 else next(iter(joined.values()))


@torch.no_grad()
def reconstruct(image_vq: ImageVQModel, pictures: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of all pictures, and the pictures they decode to, in [-1, 1]."""
    codes, decoded = [], []
    for part in batched(len(pictures), batch_size, "Reconstructing"):
        batch = image_vq.encode_codes(to_pixels(pictures[part]).to(image_vq.device))
        codes.append(batch.cpu())
        decoded.append(image_vq.decode_codes(batch).sample.clamp(-1, 1).cpu())
    return torch.cat(codes), torch.cat(decoded)
