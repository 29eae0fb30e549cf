"""Model cards of training runs: what was trained, on what, how, how well, and what to mind."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..tasks import Task, parse_tasks
from ..utils.cards import CARD_TEMPLATE, describe_model
from ..utils.redaction import HIDDEN, known_secrets, without_paths, without_secrets
from .unused_arguments import unused_arguments


# Arguments that say where things are, or are secrets, and not how the model was trained.
_NOT_HYPERPARAMETERS = {
    *("output_dir", "logging_dir", "cache_dir", "latents_file", "states_file", "report_to"),
    *("hub_token", "hub_model_id", "hub_strategy", "push_to_hub", "license", "data_license", "language"),
    *("resume_from_checkpoint", "checkpoints_total_limit", "checkpointing_steps"),
    *("validation_prompts", "validation_images", "validation_labels"),
}


@dataclass(frozen=True)
class Measure:
    """A figure that was measured.

    Args:
        what: of which part, or which task such as ``"text->image"``.
        metric: its name, such as ``"PSNR"``.
        value: the figure.
        dataset: what it was measured on.
        unit: such as ``"dB"``.
    """

    what: str
    metric: str
    value: float
    dataset: str
    unit: str = ""


def training_card(
    args: argparse.Namespace,
    model: Any,
    *,
    measures: Sequence[Measure] = (),
    samples: dict[str, str] | None = None,
    command: Sequence[str] | None = None,
) -> ModelCard:
    """The model card of a training script's run.

    Args:
        args: the script's arguments, with those of [`add_publishing_arguments`]. The Hub's tokens are never shown,
            and of paths that leave the working directory only their last part is.
        model: what was trained: a pipeline with a ``transformer``, an [`ImageVQModel`] or a [`TextVQModel`].
        measures: what was measured at the end.
        samples: pictures or sounds for the gallery: path in the repository, and what it shows, such as the prompt.
        command: the program's arguments; by default this process's.

    Returns:
        a `huggingface_hub.ModelCard`, to be written with its ``save``.
    """
    name, secrets = published_name(args), known_secrets(args.hub_token)
    data_is_public, base_models = _is_hub_id(args.dataset_name), _base_models(args)
    shown = argparse.Namespace(**{key: _shown(value, secrets) for key, value in vars(args).items()})
    kind = _describe(shown, model)
    dataset = shown.dataset_name or shown.train_data_dir or getattr(shown, "codes_dir", None)
    data = ModelCardData(
        license=shown.license or "unknown",
        library_name=kind.get("library_name", "diffusers"),
        pipeline_tag=kind["pipeline_tag"],
        language=shown.language or None,
        tags=["diffusers_vqdit", "vq-vae", *kind["tags"]],
        datasets=[shown.dataset_name] if data_is_public else None,
        base_model=base_models or None,
        widget=[dict(text=text, output={"url": path}) for path, text in (samples or {}).items()] or None,
        model_name=name.split("/")[-1],
        eval_results=_eval_results(measures, model, kind["pipeline_tag"]) or None,
    )
    content = CARD_TEMPLATE.format(
        metadata=data.to_yaml(),
        title=name.split("/")[-1],
        summary=kind["summary"],
        gallery="<Gallery />\n\n" if samples else "",
        usage=kind["usage"].format(name=name),
        intended_use=kind["intended_use"],
        limits=kind["limits"],
        risks=kind["risks"],
        evaluation=_table(measures) if measures else "Nothing was measured in this run.",
        training=f"```bash\n{shown_command(sys.argv if command is None else command, secrets)}\n```\n\n"
        + _hyperparameters(shown, _unused(args)),
        licences="\n".join(
            (
                f"* Weights: {shown.license or 'no licence was stated.'}",
                f"* Training data: {dataset}; {shown.data_license or 'its licence was not stated.'}",
            )
        ),
    )
    return ModelCard(without_secrets(content, secrets))


def shown_command(command: Sequence[str], secrets: Sequence[str] = ()) -> str:
    """A program's arguments as a shell takes them, without secrets and without paths that leave the working directory.

    Args:
        command: the arguments, the program's own name first.
        secrets: what is struck out wherever it stands, besides what follows ``--hub_token``.
    """
    words, hidden = [], False
    for word in command:
        flag, equals, value = word.partition("=")
        if hidden:
            word, hidden = HIDDEN, False
        elif equals and flag.startswith("-"):
            word = f"{flag}={HIDDEN if flag == '--hub_token' else without_paths(value)}"
        else:
            word = without_paths(word)
        hidden = word == "--hub_token"
        words.append(shlex.quote(without_secrets(word, secrets)))
    return " ".join(["accelerate", "launch", *words])


def published_name(args: argparse.Namespace) -> str:
    """The repository that a run is published in; without ``--hub_model_id`` it has the name of the run's folder."""
    return args.hub_model_id or Path(os.path.abspath(args.output_dir)).name


def _shown(value: Any, secrets: Sequence[str]) -> Any:
    """An argument's value as a card shows it."""
    if isinstance(value, list | tuple):
        return [_shown(one, secrets) for one in value]
    return without_secrets(without_paths(str(value)), secrets) if isinstance(value, str | Path) else value


def _describe(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What the card says of a kind of model, of a LoRA of it, or of one that was distilled."""
    weights = parse_tasks(args.tasks) if getattr(args, "tasks", None) else []
    most = [str(task) for task, _ in sorted(weights, key=lambda one: -one[1])]
    kind, base = describe_model(model, most), getattr(args, "pretrained_model_name_or_path", None)
    if (steps := getattr(args, "num_student_steps", None)) is not None:
        return {
            **kind,
            "tags": ["distillation", *kind["tags"]],
            "summary": f"{kind['summary']} Distilled from `{base}` (self-distillation through time, "
            f"{args.num_teacher_steps} steps to {steps}).",
            "usage": f"{kind['usage']}\n\n# Pass num_inference_steps={steps} to all that it generates",
        }
    trained = _trained_tasks(args, model, base)
    if (rank := getattr(args, "rank", None)) is None:
        return {**kind, "summary": kind["summary"] + trained}
    said = {name: getattr(args, name) for name in ("revision", "variant") if getattr(args, name, None) is not None}
    words = [json.dumps(base, ensure_ascii=False), *(f"{name}={json.dumps(value)}" for name, value in said.items())]
    quoted = ", ".join(words).replace("{", "{{").replace("}", "}}")
    return {
        **kind,
        "tags": ["lora", *kind["tags"]],
        "summary": f"A LoRA of rank {rank} for the diffusion transformer of `{base}`, by diffusers_vqdit.{trained}",
        "usage": f"{kind['imports']}\npipe = DiffusionPipeline.from_pretrained({quoted})\n"
        f'pipe.load_lora_weights("{{name}}")\n{kind["calls"].rstrip()}',
    }


def _trained_tasks(args: argparse.Namespace, model: Any, base: str | None) -> str:
    """Of a pretrained pipeline's tasks, those that a run trained, and those that are the pretrained one's alone."""
    if base is None or getattr(args, "tasks", None) is None:
        return ""
    trained = [str(task) for task, _ in parse_tasks(args.tasks)]
    others = [f"`{task}`" for task in model.transformer.config.tasks if task not in trained]
    told = f" This run trained {', '.join(f'`{task}`' for task in trained)}."
    if not others:
        return told
    return f"{told} It did not train {', '.join(others)}: these are of `{base}`, and may have become worse."


def _is_hub_id(name: str | None) -> bool:
    """Whether a name of a model or dataset means the Hub's, not a path."""
    if name is None or Path(name).exists() or name.endswith(".parquet"):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_models(args: argparse.Namespace) -> list[str]:
    keys = ("pretrained_model_name_or_path", "image_vq", "text_vq", "text_encoder", "image_encoder")
    names = [getattr(args, key, None) for key in keys]
    names += [flag.tokenizer for flag in getattr(args, "segment", ())]
    return [name for name in names if name is not None and _is_hub_id(name)]


def _eval_results(measures: Sequence[Measure], model: Any, pipeline_tag: str) -> list[EvalResult]:
    """The entries of ``model-index``, where those of one type of the Hub's tasks, and one dataset, become one."""
    known = model.transformer.config.tasks or [] if hasattr(model, "hub_task") else []
    types = {one.what: _task_type(model, one.what) if one.what in known else pipeline_tag for one in measures}
    names: dict[str, list[str]] = {}
    for what, task_type in types.items():
        names.setdefault(task_type, []).append(what)
    return [_eval_result(one, types[one.what], ", ".join(names[types[one.what]])) for one in measures]


def _task_type(model: Any, task: str) -> str:
    """The Hub's name of one task of a pipeline."""
    found = model._hub_task_of([task])
    return "unconditional-image-generation" if not Task.parse(task).given and found == "text-to-image" else found


def _eval_result(measure: Measure, task_type: str, task_name: str) -> EvalResult:
    return EvalResult(
        task_type=task_type,
        task_name=task_name,
        dataset_type=measure.dataset,
        dataset_name=measure.dataset,
        metric_type=measure.metric.lower().replace(" ", "_"),
        metric_name=f"{measure.metric} ({measure.what})",
        metric_value=round(measure.value, 6),
    )


def _table(measures: Sequence[Measure]) -> str:
    lines = ["| what | data | measure | value |", "|---|---|---|---|"]
    for one in measures:
        lines.append(
            f"| {one.what} | {one.dataset} | {one.metric} | {one.value:.4g}{' ' * bool(one.unit)}{one.unit} |"
        )
    return "\n".join(lines)


def _unused(args: argparse.Namespace) -> set[str]:
    """The arguments that had no say in a training, as others overruled them or they go with others."""
    unused = set(unused_arguments(args))
    if getattr(args, "codes_dir", None) is not None:
        unused |= {"lowres_factor", "resize_mode"}  # which must be the codes' own
    if getattr(args, "max_train_steps", None) is not None:
        unused.add("num_train_epochs")
    return unused


def _hyperparameters(args: argparse.Namespace, unused: set[str]) -> str:
    hidden = _NOT_HYPERPARAMETERS | unused
    chosen = {key: value for key, value in vars(args).items() if key not in hidden and value is not None}
    return "\n".join(["| argument | value |", "|---|---|", *(f"| `{k}` | `{v}` |" for k, v in chosen.items())])
