"""The end of a training run: a gallery, the model card, and the upload."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..provenance import save_generated
from .model_card import Measure, training_card
from .push import push_folder


# What a run's folder has to publish; besides it has checkpoints to resume from, logs and encoded data.
_PUBLISHED = [
    *("README.md", "model_index.json", "pipeline.py", "*config.json", "*.safetensors", "*.safetensors.index.json"),
    *("samples/*", "tokenizer/*"),
]
_KEPT = ["checkpoint-*", "codes/*", "logs/*", "tmp-*"]


def draw_gallery(
    pipeline: DiffusionPipeline, prompts: Sequence[str], folder: Path, model_id: str, seed: int = 0
) -> dict[str, str]:
    """Draw prompts into ``samples/`` of a folder, with metadata that say that they are generated.

    Returns:
        the prompts by the path of their picture in the folder, for [`training_card`].
    """
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    gallery = {}
    if prompts:
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
        images = pipeline(list(prompts), generator=generators).images
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            path = f"samples/{index}.png"
            save_generated(image, folder / path, model_id=model_id, description=prompt)
            gallery[path] = prompt
    return gallery


def publish_run(
    args: argparse.Namespace,
    model: torch.nn.Module | DiffusionPipeline,
    *,
    measures: Sequence[Measure] = (),
    samples: dict[str, str] | None = None,
) -> None:
    """Write a run's model card; with ``--push_to_hub`` upload its weights, card and samples in one commit.

    Args:
        args: the training script's arguments.
        model, measures, samples: see [`training_card`]; the weights and samples are in ``args.output_dir`` already.
    """
    training_card(args, model, measures=measures, samples=samples).save(args.output_dir / "README.md")
    if args.push_to_hub:
        push_folder(
            args.output_dir,
            args.hub_model_id or args.output_dir.name,
            token=args.hub_token,
            commit_message="End of training",
            allow_patterns=_PUBLISHED,
            ignore_patterns=_KEPT,
        )
