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

from ..models.image_vq import QUANTIZER_OPTIONS
from ..utils.cards import CARD_TEMPLATE, describe_model
from ..utils.redaction import HIDDEN, known_secrets, without_paths, without_secrets
from .quantizer_arguments import quantizer_options


# Arguments that say where things are, or are secrets, and not how the model was trained.
_NOT_HYPERPARAMETERS = {
    *("output_dir", "logging_dir", "cache_dir", "latents_file", "states_file", "report_to"),
    *("hub_token", "hub_model_id", "hub_strategy", "push_to_hub", "license", "data_license", "language"),
    *("resume_from_checkpoint", "checkpoints_total_limit", "checkpointing_steps"),
    *("validation_prompts", "validation_images", "validation_labels"),
}

# Arguments that make a new model, which a pretrained one has no use for.
_OF_NEW_MODELS = {
    *("num_layers", "num_attention_heads", "attention_head_dim", "patch", "patch_size", "masking", "shift"),
    *("image_vq", "text_vq", "text_encoder", "image_encoder"),
    *("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_attention", "encoder_norm_type"),
    "latent_channels",
    *("num_vq_embeddings", "vq_embed_dim", "fsq_levels", "quantizer_type", *sum(QUANTIZER_OPTIONS.values(), ())),
    *("tokenizer_vocab_size", "max_length", "downsample_factor", "num_codebooks", "num_codes", "code_dim"),
    *("hidden_size", "kernel_size", "codebook_norm", "restart_threshold"),
    *("sampling_rate", "n_fft", "hop_length", "num_mel_bins", "min_frequency", "max_frequency", "log_mel_range"),
} - {"ema_decay"}
# Arguments that do something only where another is given and not 0, by that one's name.
_DEPENDENT = {
    "rank": ("lora_alpha", "lora_dropout", "lora_layers"),
    "use_ema": ("ema_decay",),
    "alignment_encoder": ("alignment_weight", "alignment_layer"),
    "caption_columns": ("caption_dropout",),
    "label_column": ("label_dropout",),
    "perceptual_weight": ("perceptual_backbone", "perceptual_image_size", "lpips_weights"),
    "adversarial_weight": (
        *("adversarial_loss", "adversarial_start", "discriminator_warmup", "adaptive_weight", "lecam_weight"),
        *("discriminator_channels", "discriminator_layers", "discriminator_learning_rate"),
        "discriminator_max_grad_norm",
    ),
}
# Arguments that say how data are read and encoded, which codes are already.
_OF_DATA = {
    *("image_column", "caption_column", "prompt_columns", "label_column", "image_augmentations"),
    *("lowres_factor", "resize_mode", "max_train_samples"),
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
        samples: pictures for the gallery: path in the repository, and what it shows, such as the prompt.
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
        eval_results=[_eval_result(measure, kind["pipeline_tag"]) for measure in measures] or None,
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
    kind, base = describe_model(model), getattr(args, "pretrained_model_name_or_path", None)
    if (steps := getattr(args, "num_student_steps", None)) is not None:
        return {
            **kind,
            "tags": ["distillation", *kind["tags"]],
            "summary": f"{kind['summary']} Distilled from `{base}` (self-distillation through time, "
            f"{args.num_teacher_steps} steps to {steps}).",
            "usage": f"{kind['usage']}\n\n# Pass num_inference_steps={steps} to all that it generates",
        }
    if getattr(args, "rank", None) is None:
        return kind
    return {
        **kind,
        "tags": ["lora", *kind["tags"]],
        "summary": f"A LoRA of rank {args.rank} for the diffusion transformer of `{base}`, by diffusers_vqdit.",
        "usage": "import diffusers_vqdit\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base}")\npipe.load_lora_weights("{{name}}")',
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
    keys = ("pretrained_model_name_or_path", "image_vq", "text_vq", "text_encoder", "image_encoder")
    names = [getattr(args, key, None) for key in keys]
    names += [flag.tokenizer for flag in getattr(args, "segment", ())]
    return [name for name in names if name is not None and _is_hub_id(name)]


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


def _unused(args: argparse.Namespace) -> set[str]:
    """The arguments that had no say in a training, as others overruled them or they go with others."""
    given, unused = vars(args), set()
    for name, dependents in _DEPENDENT.items():
        if name in given and not given[name]:
            unused |= set(dependents)
    if given.get("pretrained_model_name_or_path") is not None:
        unused |= _OF_NEW_MODELS | ({"dropout"} if "objective" in given else set())  # of latents: never changed
    elif "fsq_levels" in given:  # an image tokenizer
        unused |= set(sum(QUANTIZER_OPTIONS.values(), ())) - {"ema_decay"} - set(quantizer_options(args))
        unused |= {"num_vq_embeddings", "vq_embed_dim"} if given["fsq_levels"] else {"fsq_levels"}
    elif given.get("quantizer_type", "rvq") != "rvq":
        unused.add("num_quantizers")
    if given.get("codes_dir") is not None:
        unused |= _OF_DATA
    if "objective" in given:
        unused |= {"learn_sigma"} if given["objective"] != "epsilon" else set()
        unused |= {"shift", "logit_normal"} if given["objective"] != "flow" else set()
    if given.get("max_train_steps") is not None:
        unused.add("num_train_epochs")
    if given.get("lr_scheduler") == "constant":
        unused.add("lr_warmup_steps")
    return unused


def _hyperparameters(args: argparse.Namespace, unused: set[str]) -> str:
    hidden = _NOT_HYPERPARAMETERS | unused
    chosen = {key: value for key, value in vars(args).items() if key not in hidden and value is not None}
    return "\n".join(["| argument | value |", "|---|---|", *(f"| `{k}` | `{v}` |" for k, v in chosen.items())])
