"""Model cards of training runs: what was trained, on what, how, how well, and what to mind."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..utils.redaction import HIDDEN, known_secrets, without_paths, without_secrets


# Arguments that say where things are, or are secrets, and not how the model was trained.
_NOT_HYPERPARAMETERS = {
    *("output_dir", "logging_dir", "cache_dir", "latents_file", "report_to"),
    *("hub_token", "hub_model_id", "hub_strategy", "push_to_hub", "license", "data_license", "language"),
    *("resume_from_checkpoint", "checkpoints_total_limit", "checkpointing_steps"),
    *("validation_prompts", "validation_labels"),
}

_TEMPLATE = """\
---
{metadata}
---

# {title}

{summary}

{gallery}## Use

```python
{usage}
```

## Intended use

{intended_use}

## Limits

{limits}

## Risks

{risks}

## Evaluation

{evaluation}

## Training

```bash
{command}
```

{hyperparameters}

## Data and licences

{licences}
"""

_GENERATOR_RISKS = """\
* **Forgery.** What it draws and writes is synthetic and may pass for genuine. Say so where you show it. The demo's
  pictures carry metadata that say it (IPTC digital source type `trainedAlgorithmicMedia`), which editing may remove.
* **Privacy.** A model of a small dataset can give its training pictures and captions back. Whoever appears in them
  must have agreed, and so must the owner of confidential data.
* **Bias.** It reproduces what is frequent in its training data, with its stereotypes and its gaps."""

_TOKENIZER_RISKS = """\
* **Forgery.** It reconstructs pictures or texts with changes that look or read naturally: a reconstruction is no
  evidence of what the original shows.
* **Privacy.** Codes are no encryption: whoever has the model can decode them.
* **Bias.** What is rare in its training data is reconstructed worst."""


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
        samples: pictures for the gallery: path in the repository, and what it shows, such as the prompt.
        command: the program's arguments; by default this process's.

    Returns:
        a `huggingface_hub.ModelCard`, to be written with its ``save``.
    """
    name, secrets = published_name(args), known_secrets(args.hub_token)
    data_is_public, base_models = _is_hub_id(args.dataset_name), _base_models(args)
    shown = argparse.Namespace(**{key: _shown(value, secrets) for key, value in vars(args).items()})
    kind = _kind(shown, model)
    dataset = shown.dataset_name or shown.train_data_dir or getattr(shown, "codes_dir", None)
    data = ModelCardData(
        license=shown.license or "unknown",
        library_name="diffusers",
        pipeline_tag=kind["pipeline_tag"],
        language=shown.language or None,
        tags=["diffusers_vqdit", "vq-vae", *kind["tags"]],
        datasets=[shown.dataset_name] if data_is_public else None,
        base_model=base_models or None,
        widget=[{"text": text, "output": {"url": path}} for path, text in (samples or {}).items()] or None,
        model_name=name.split("/")[-1],
        eval_results=[_eval_result(measure, kind["pipeline_tag"]) for measure in measures] or None,
    )
    content = _TEMPLATE.format(
        metadata=data.to_yaml(),
        title=name.split("/")[-1],
        summary=kind["summary"],
        gallery="<Gallery />\n\n" if samples else "",
        usage=kind["usage"].format(name=name),
        intended_use=kind["intended_use"],
        limits=kind["limits"],
        risks=kind["risks"],
        evaluation=_table(measures) if measures else "Nothing was measured in this run.",
        command=shown_command(sys.argv if command is None else command, secrets),
        hyperparameters=_hyperparameters(shown),
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


def _kind(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What the card says of a kind of model."""
    if isinstance(model, ImageVQModel):
        return {
            "pipeline_tag": "image-feature-extraction",
            "tags": ["image-tokenizer"],
            "summary": f"An image tokenizer: pictures to a grid of codes of {model.num_codes}, and back, by "
            "diffusers_vqdit.",
            "usage": 'from diffusers_vqdit import ImageVQModel\n\nmodel = ImageVQModel.from_pretrained("{name}")\n'
            "codes = model.encode_codes(sample)  # (B, C, H, W) in [-1, 1] to "
            f"{'(B, h, w, q)' if model.config.quantizer_type == 'rvq' else '(B, h, w)'}\n"
            "sample = model.decode_codes(codes).sample",
            "intended_use": "Codes of pictures like those it was trained on, for generation, retrieval or "
            "compression where losses do no harm.",
            "limits": "It loses detail, and more of it on pictures unlike its training data.",
            "risks": _TOKENIZER_RISKS,
        }
    if isinstance(model, TextVQModel):
        return {
            "pipeline_tag": "feature-extraction",
            "tags": ["text-tokenizer"],
            "summary": f"A text tokenizer: captions to a grid of codes of {model.num_codes}, and back, by "
            "diffusers_vqdit.",
            "usage": "from diffusers_vqdit import TextVQModel\nfrom transformers import PreTrainedTokenizerFast\n\n"
            'model = TextVQModel.from_pretrained("{name}")\n'
            'tokenizer = PreTrainedTokenizerFast.from_pretrained("{name}", subfolder="tokenizer")',
            "intended_use": "Codes of captions like those it was trained on, for generation and comparison.",
            "limits": f"Texts of more than {model.config.max_length} tokens are cut.",
            "risks": _TOKENIZER_RISKS,
        }
    if getattr(args, "rank", None) is not None:
        base = args.pretrained_model_name_or_path
        pipeline = _kind(argparse.Namespace(), model)
        return {
            **pipeline,
            "tags": ["lora", *pipeline["tags"]],
            "summary": f"A LoRA of rank {args.rank} for the diffusion transformer of `{base}`, by diffusers_vqdit.",
            "usage": "import diffusers_vqdit\nfrom diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{base}")\npipe.load_lora_weights("{{name}}")',
        }
    if model.transformer.config.segments is None:
        captions = model.transformer.config.caption_channels is not None
        call = 'pipe("a caption")' if captions else "pipe(class_labels=0)"
        return {
            "pipeline_tag": "text-to-image" if captions else "unconditional-image-generation",
            "tags": ["latent-diffusion", "flow-matching" if args.objective == "flow" else "gaussian-diffusion"],
            "summary": "A diffusion transformer over the continuous latents of a VQ model, by diffusers_vqdit.",
            "usage": "import diffusers_vqdit\nfrom diffusers import DiffusionPipeline\n\n"
            'pipe = DiffusionPipeline.from_pretrained("{name}")\n'
            f"image = {call}.images[0]",
            "intended_use": "Drawing pictures like those it was trained on, and further training. Not as evidence of "
            "what a picture shows.",
            "limits": "It knows its training data and nothing else: what lies outside of it is drawn wrongly, and "
            "with no sign of doubt.",
            "risks": _GENERATOR_RISKS,
        }
    tasks = list(model.transformer.config.tasks or [])
    draws = not tasks or any("image" in task.split("->")[1].split("+") for task in tasks)
    return {
        "pipeline_tag": "text-to-image" if draws else "image-to-text",
        "tags": ["masked-diffusion", *(task.replace("->", "-to-").strip("-") for task in tasks)],
        "summary": "A diffusion transformer over codes, by diffusers_vqdit."
        + (f" Tasks: {', '.join(f'`{task}`' for task in tasks)}." if tasks else ""),
        "usage": "import diffusers_vqdit\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("{name}")\n\n'
        "# Without the package, after reading pipeline.py:\n"
        'pipe = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="pipeline", trust_remote_code=True)',
        "intended_use": "Drawing and describing pictures like those it was trained on, and further training. Not for "
        "decisions about people, and not as evidence of what a picture shows.",
        "limits": "It knows its training data and nothing else: what lies outside of it is drawn or described "
        "wrongly, and with no sign of doubt.",
        "risks": _GENERATOR_RISKS,
    }


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
    keys = ("pretrained_model_name_or_path", "image_vq", "text_vq", "text_encoder")
    names = [getattr(args, key, None) for key in keys]
    return [name for name in names if _is_hub_id(name)]


def _eval_result(measure: Measure, pipeline_tag: str) -> EvalResult:
    return EvalResult(
        task_type=pipeline_tag,
        task_name=measure.what,
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


def _hyperparameters(args: argparse.Namespace) -> str:
    chosen = {key: value for key, value in vars(args).items() if key not in _NOT_HYPERPARAMETERS and value is not None}
    return "\n".join(["| argument | value |", "|---|---|", *(f"| `{k}` | `{v}` |" for k, v in chosen.items())])
