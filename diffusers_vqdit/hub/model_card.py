"""Model cards of training runs: what was trained, on what, how, how well, and what to mind."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel


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
        args: the script's arguments, with those of [`add_publishing_arguments`]. The Hub's token is never shown.
        model: what was trained: a pipeline with a ``transformer``, an [`ImageVQModel`] or a [`TextVQModel`].
        measures: what was measured at the end.
        samples: pictures for the gallery: path in the repository, and what it shows, such as the prompt.
        command: the program's arguments; by default this process's.

    Returns:
        a `huggingface_hub.ModelCard`, to be written with its ``save``.
    """
    name = args.hub_model_id or args.output_dir.name
    kind = _kind(args, model)
    dataset = args.dataset_name or args.train_data_dir or getattr(args, "codes_dir", None)
    data = ModelCardData(
        license=args.license or "unknown",
        library_name="diffusers",
        pipeline_tag=kind["pipeline_tag"],
        language=args.language or None,
        tags=["diffusers_vqdit", "vq-vae", *kind["tags"]],
        datasets=[args.dataset_name] if _is_hub_id(args.dataset_name) else None,
        base_model=_base_models(args) or None,
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
        command=shown_command(sys.argv if command is None else command),
        hyperparameters=_hyperparameters(args),
        licences="\n".join(
            (
                f"* Weights: {args.license or 'no licence was stated.'}",
                f"* Training data: {dataset}; {args.data_license or 'its licence was not stated.'}",
            )
        ),
    )
    return ModelCard(content)


def shown_command(command: Sequence[str]) -> str:
    """A program's arguments as a shell takes them, without the Hub's token."""
    words, hidden = [], False
    for word in command:
        if hidden:
            word, hidden = "...", False
        elif word.startswith("--hub_token="):
            word = "--hub_token=..."
        hidden = word == "--hub_token"
        words.append(word if word == "..." else shlex.quote(word))
    return " ".join(["accelerate", "launch", *words])


def _kind(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What the card says of a kind of model."""
    if isinstance(model, ImageVQModel):
        return {
            "pipeline_tag": "image-feature-extraction",
            "tags": ["image-tokenizer"],
            "summary": f"An image tokenizer: pictures to a grid of codes of {model.num_codes}, and back, by "
            "diffusers_vqdit.",
            "usage": 'from diffusers_vqdit import ImageVQModel\n\nmodel = ImageVQModel.from_pretrained("{name}")\n'
            "codes = model.encode_codes(sample)  # (B, C, H, W) in [-1, 1] to (B, h, w)\n"
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
    return name is not None and not Path(name).exists() and name.count("/") <= 1 and not name.endswith(".parquet")


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
