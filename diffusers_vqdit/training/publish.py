"""What a training run publishes: a gallery, the model card, and the upload, at its end or with each checkpoint."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..pipelines.segment_base import ARGUMENTS, IMAGE
from ..utils.arguments import hub_token as hub_token_type
from ..utils.arguments import repository
from ..utils.hub import is_transient, push_folder, saved_files
from ..utils.provenance import save_generated
from ..utils.redaction import known_secrets, without_secrets
from .files import save_pretrained_atomically
from .lora import save_lora
from .model_card import Measure, published_name, training_card
from .validation import passing, steps_of


_run_logger = logging.get_logger(__name__)


def add_publishing_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of uploads, and of what a model card says and a run can't know."""
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument(
        "--hub_model_id", type=repository, help="Repository to push to; by default the name of output_dir."
    )
    group.add_argument("--hub_token", type=hub_token_type)
    group.add_argument(
        "--hub_strategy",
        choices=["end", "every_save"],
        default="end",
        help="When to push: at the end, or with every checkpoint too.",
    )
    group.add_argument("--license", help="Licence of the weights, for the model card, such as apache-2.0.")
    group.add_argument("--data_license", help="Licence and origin of the training data, for the model card.")
    group.add_argument("--language", nargs="*", default=[], help="Languages of the captions, for the model card.")


def create_repository(args: argparse.Namespace) -> None:
    """Make the repository that a run with ``--push_to_hub`` publishes in, if it isn't there: a name that the Hub
    refuses, or a token that may not make it or write to it, is told before the work."""
    if not args.push_to_hub:
        return
    try:
        hub = HfApi(token=args.hub_token)
        repo_id = hub.create_repo(published_name(args), exist_ok=True).repo_id
        try:
            hub.auth_check(repo_id, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:  # The repository is there: a mirror that can't be asked for rights.
                raise
    except Exception as error:
        if not is_transient(error):
            raise
        _run_logger.warning(f"the Hub was not reached, and is asked again when there is something to push: {error}")


def draw_gallery(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    folder: Path,
    model_id: str,
    seed: int = 0,
    argument: str = "prompt",
    hub_token: str | None = None,
    **options: Any,
) -> dict[str, str]:
    """Draw prompts into ``samples/`` of a folder, with metadata that say that they are generated.

    Args:
        argument: of the pipeline's call, that takes them: ``"prompt"`` or ``"class_labels"``.
        hub_token: a secret that no metadata shows.
        options: other arguments of the pipeline's call.

    Returns:
        the prompts by the path of their picture or sound in the folder, for [`training_card`].
    """
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    gallery: dict[str, str] = {}
    secrets = known_secrets(hub_token)
    if prompts:
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
        drawn = pipeline(**passing(pipeline, argument, prompts), **options, generator=generators)
        suffix, rate = (".png", None) if drawn.images is not None else (".wav", drawn.get("sampling_rate"))
        made = drawn.images if drawn.images is not None else drawn.get("audios")
        if made is None:  # texts, which a gallery doesn't show
            return gallery
        named = [Path(prompt).name for prompt in prompts] if ARGUMENTS.get(argument) == IMAGE else prompts
        for index, (one, prompt) in enumerate(zip(made, named, strict=True)):
            path = f"samples/{index}{suffix}"
            shown_id, shown_prompt = (without_secrets(text, secrets) for text in (model_id, prompt))
            save_generated(one, folder / path, model_id=shown_id, description=shown_prompt, sampling_rate=rate)
            gallery[path] = prompt
    return gallery


def publish_pipeline(
    args: argparse.Namespace,
    pipeline: DiffusionPipeline,
    measures: Sequence[Measure],
    wanted: Sequence[str],
    *,
    argument: str = "prompt",
    step: int | None = None,
) -> None:
    """Save a run's pipeline, or with ``--rank`` its LoRA alone, with samples and a card; push where asked for.

    Args:
        measures, step: as in [`publish_run`].
        wanted, argument: the samples, as in [`draw_gallery`].
    """
    if getattr(args, "rank", None) is not None:
        files = save_lora(pipeline.transformer, args.output_dir)
    else:
        files = save_pretrained_atomically(pipeline, args.output_dir)
    name = published_name(args)
    samples = draw_gallery(
        pipeline, wanted, args.output_dir, name, args.seed, argument, args.hub_token, **steps_of(args)
    )
    publish_run(args, pipeline, files=files, measures=measures, samples=samples, step=step)


def publish_run(
    args: argparse.Namespace,
    model: torch.nn.Module | DiffusionPipeline,
    *,
    files: Sequence[str] | None = None,
    measures: Sequence[Measure] = (),
    samples: dict[str, str] | None = None,
    step: int | None = None,
) -> None:
    """Write a run's model card; with ``--push_to_hub`` upload its weights, card and samples in one commit.

    Nothing else of ``args.output_dir`` is uploaded, which also has checkpoints, logs, encoded data, and whatever its
    owner keeps there.

    Args:
        args: the training script's arguments, with those of [`add_publishing_arguments`].
        model, measures, samples: see [`training_card`]; the weights and samples are in ``args.output_dir`` already.
        files: paths in ``args.output_dir`` of what was saved; by default those that the model's ``save_pretrained``
            writes.
        step: of a run that isn't at its end. It goes on where the upload fails, with a warning.
    """
    training_card(args, model, measures=measures, samples=samples).save(args.output_dir / "README.md")
    if not args.push_to_hub:
        return
    try:
        commit = push_folder(
            args.output_dir,
            published_name(args),
            token=args.hub_token,
            commit_message="End of training" if step is None else f"Training, step {step}",
            files=["README.md", *(saved_files(model, args.output_dir) if files is None else files), *(samples or {})],
        )
    except Exception as error:
        if step is None:
            raise
        _run_logger.warning(f"step {step} was not published: {error}")
    else:
        if step is None:
            _run_logger.info(f"pushed to {commit.repo_url}")


def publishes_checkpoints(args: argparse.Namespace) -> bool:
    """Whether a run publishes with each of its checkpoints."""
    return args.push_to_hub and args.hub_strategy == "every_save"
