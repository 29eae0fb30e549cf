"""What a model card says: of a kind of model, and on a card of one whose training isn't known."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers.utils import logging
from huggingface_hub import ModelCard, ModelCardData, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .fingerprints import file_sha256
from .hub import is_transient
from .weight_files import weight_file_of


_card_logger = logging.get_logger(__name__)

CARD_TEMPLATE = """\
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

{training}

## Data and licences

{licences}
"""

_GENERATOR_RISKS = """\
* **Forgery.** What it draws and writes is synthetic and may pass for genuine. Say so where you show it. Files
  that `save_generated` and the demo write have metadata that say it (IPTC digital source type
  `trainedAlgorithmicMedia`), which editing may remove.
* **Privacy.** A model of a small dataset can give its training pictures and captions back. Whoever appears in them
  must have agreed, and so must the owner of confidential data.
* **Bias.** It reproduces what is frequent in its training data, with its stereotypes and its gaps."""

_TOKENIZER_RISKS = """\
* **Forgery.** It reconstructs pictures, texts or sounds with changes that look, read or sound naturally: a
  reconstruction is no evidence of what the original shows.
* **Privacy.** Codes are no encryption: whoever has the model can decode them.
* **Bias.** What is rare in its training data is reconstructed worst."""


def describe_model(model: Any, tasks: Sequence[str] = ()) -> dict[str, Any]:
    """What a card says of a kind of model or pipeline; ``{name}`` stands for the repository.

    Args:
        tasks: those of a pipeline that are shown first; by default in the order of its own.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if "ImageVQModel" in kinds:
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
    if "SpectrogramVQModel" in kinds:
        return {
            "pipeline_tag": "audio-to-audio",
            "tags": ["audio-tokenizer"],
            "summary": f"An audio tokenizer: waveforms to frames of codes of {model.num_codes}, and back, by "
            "diffusers_vqdit.",
            "usage": "from diffusers_vqdit import SpectrogramVQModel\n\n"
            'model = SpectrogramVQModel.from_pretrained("{name}")\n'
            f"codes = model.encode_codes(waveform)  # (B, T) at {model.config.sampling_rate} Hz to (B, n, q)\n"
            "waveform = model.decode_codes(codes).sample",
            "intended_use": "Codes of sounds like those it was trained on, for generation and recognition.",
            "limits": "It keeps amplitudes and makes phases up: voices sound hollow, and music worse. What is above "
            f"{model.config.sampling_rate // 2} Hz is lost.",
            "risks": _TOKENIZER_RISKS,
        }
    if "PreTrainedModel" in kinds and hasattr(model, "decode"):
        return {
            "pipeline_tag": "audio-to-audio",
            "library_name": "transformers",
            "tags": ["audio-tokenizer"],
            "summary": f"An audio codec, a `{type(model).__name__}` of transformers, finetuned by diffusers_vqdit.",
            "usage": "from transformers import AutoFeatureExtractor, AutoModel\n\n"
            'codec = AutoModel.from_pretrained("{name}")\n'
            'feature_extractor = AutoFeatureExtractor.from_pretrained("{name}")',
            "intended_use": "Codes of sounds like those it was trained on, for generation and recognition.",
            "limits": "Sounds unlike its training data may have become worse than they were before it was finetuned.",
            "risks": _TOKENIZER_RISKS,
        }
    if "TextVQModel" in kinds:
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
    if not hasattr(model, "components"):
        return {
            "pipeline_tag": None,
            "tags": [],
            "summary": f"A `{type(model).__name__}`, a part of the pipelines of diffusers_vqdit.",
            "usage": f"from diffusers_vqdit import {type(model).__name__}\n\n"
            f'part = {type(model).__name__}.from_pretrained("{{name}}")',
            "intended_use": "As a part of a pipeline with the other parts that it was trained with.",
            "limits": "Alone it draws and writes nothing.",
            "risks": _GENERATOR_RISKS,
        }
    if model.transformer.config.get("segments") is None:
        captions = model.transformer.config.get("caption_channels") is not None
        flow = hasattr(model.scheduler, "scale_noise")
        call = 'pipe("a caption")' if captions else "pipe(class_labels=0)"
        return {
            "pipeline_tag": "text-to-image" if captions else "unconditional-image-generation",
            "tags": [
                "latent-diffusion",
                "flow-matching" if flow else "gaussian-diffusion",
            ],
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
    known = list(model.transformer.config.tasks or [])
    calls = "".join(f"{call}\n" for call in model._example_calls(tasks or known))
    calls = "print(pipe.tasks)  # what it can do, and what to pass\n" + calls.replace("{", "{{").replace("}", "}}")
    imports = "import diffusers_vqdit\nfrom diffusers import DiffusionPipeline\n"
    imports += "from diffusers.utils import load_image\n" * ("load_image" in calls)
    return {
        "pipeline_tag": model.hub_task,
        "tags": ["masked-diffusion", *(task.replace("->", "-to-").strip("-") for task in known)],
        "summary": "A diffusion transformer over codes, by diffusers_vqdit."
        + (f" Tasks: {', '.join(f'`{task}`' for task in known)}." if known else ""),
        "imports": imports,
        "calls": calls,
        "usage": f'{imports}\npipe = DiffusionPipeline.from_pretrained("{{name}}")\n{calls}\n'
        "# Without the package, after reading pipeline.py:\n"
        'pipe = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="pipeline", trust_remote_code=True)',
        "intended_use": "These tasks on data like those it was trained on, and further training. Not for decisions "
        "about people, and not as evidence of what a picture shows or a text says.",
        "limits": "It knows its training data and nothing else: what lies outside of it is generated wrongly, and "
        "with no sign of doubt.",
        "risks": _GENERATOR_RISKS,
    }


# Of a gallery's files, which alone are taken along with a card.
_MEDIA = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".wav", ".flac", ".mp3"}

# What a card says that tells nothing of the weights.
_PLAIN = "How it was trained isn't known here."

# What diffusers writes on the card of a new repository.
_BLANK = ("# Model Card for Model ID", "This model card has been automatically generated.")


def plain_card(model: Any, repo_id: str, known: dict[str, Any]) -> ModelCard:
    """The card of a model, or pipeline, that is published without its training.

    Args:
        known: entries of the card's metadata that are kept, such as the licence.
    """
    kind = describe_model(model)
    tags = ["diffusers_vqdit", *kind["tags"]]
    data = ModelCardData(**{"library_name": "diffusers", "pipeline_tag": kind["pipeline_tag"], "tags": tags, **known})
    content = CARD_TEMPLATE.format(
        metadata=data.to_yaml(),
        title=repo_id.split("/")[-1],
        gallery="",
        **{name: kind[name] for name in ("summary", "intended_use", "limits", "risks")},
        usage=kind["usage"].format(name=repo_id),
        evaluation="No figures came with it.",
        training=_PLAIN,
        licences=f"* Weights: {known.get('license') or 'no licence was stated.'}\n* Training data: not stated.",
    )
    return ModelCard(content)


def fill_blank_card(model: Any, path: Path, repo_id: str, saved: Sequence[str], token: str | None = None) -> list[str]:
    """Replace the card with nothing filled in that diffusers writes for new repositories: by the card beside the
    weights that the model was loaded from, with the pictures of its gallery, if what was saved has these weights; else
    by [`plain_card`].

    Args:
        saved: the files of the card's folder that the model was saved in.

    Returns:
        the paths of these pictures in the card's folder.
    """
    if not path.is_file() or not _is_blank(card := ModelCard(path.read_text(encoding="utf-8"))):
        return []
    source = str(model.config.get("_name_or_path") or "")
    try:
        loaded = _loaded_card(source, model.config_name, token)
        if loaded is not None and not _is_as_loaded(model, source, path.parent, saved, token):
            _card_logger.warning(
                f"the weights are not those of {source} any more: its card is not published with them"
            )
            loaded = None
    except _HubFails as error:
        _card_logger.warning(f"{error}: a card that tells nothing of the weights is published in place of that one's")
        loaded = None
    if loaded is None:
        plain_card(model, repo_id, card.data.to_dict()).save(path)
        return []
    content, loaded_card = loaded
    if os.path.isdir(source):  # by whose name a run's card loads it, where it wasn't pushed
        content = content.replace(f'from_pretrained("{Path(source).resolve().name}"', f'from_pretrained("{repo_id}"')
    path.write_text(content, encoding="utf-8")
    widget = loaded_card.data.to_dict().get("widget")
    entries = widget if isinstance(widget, list) else []
    outputs = [one.get("output") for one in entries if isinstance(one, dict)]
    names = [str(output.get("url")) for output in outputs if isinstance(output, dict)]
    return [name for name in dict.fromkeys(names) if _copy_from(source, name, path.parent, token)]


def warn_of_older_card(model: Any, saved: Path, folder: Path) -> None:
    """Warn where the card in a folder is of other weights, or of another model, than what is going to be saved there:
    it is published as it stands, for someone may have written it.

    Args:
        saved: a folder with what is going to replace the files of `folder`.
    """
    path = folder / "README.md"
    if not path.is_file() or not any((folder / name).is_file() for name in (model.config_name, "model_index.json")):
        return  # nothing that it could be of
    names = [file.relative_to(saved).as_posix() for file in saved.rglob("*") if weight_file_of(file.name)]
    if _PLAIN in path.read_text(encoding="utf-8", errors="replace"):
        return
    try:
        same = _is_as_loaded(model, str(folder), saved, names, None)
    except ValueError:  # what is replaced is no JSON
        same = False
    if not same:
        _card_logger.warning(
            f"{path} was there with other weights than those that are saved now, and is published with them as it "
            "stands: see whether it holds for them, or remove it, and a new one is written"
        )


def _is_blank(card: ModelCard) -> bool:
    return all(said in card.text for said in _BLANK)


def _loaded_card(source: str, config_name: str, token: str | None) -> tuple[str, ModelCard] | None:
    """The card beside the config that a model was loaded with, as it is written and as it is read: of a folder, or of
    a repository if it is ours."""
    if not source or _find_file(source, config_name, token) is None:
        return None
    if (found := _find_file(source, "README.md", token)) is None:
        return None
    try:
        content = found.read_text(encoding="utf-8")
        card = ModelCard(content)
    except Exception:  # whatever YAML's reader raises: no text, or its metadata can't be read
        return None
    ours = os.path.isdir(source) or "diffusers_vqdit" in (card.data.to_dict().get("tags") or [])
    return (content, card) if ours and not _is_blank(card) else None


class _HubFails(Exception):
    """What a repository has can't be told now."""


def _find_file(source: str, name: str, token: str | None) -> Path | None:
    """A file of a folder or Hub repository, here; None where there is none."""
    if os.path.isdir(source):
        return path if (path := Path(source, name)).is_file() else None
    try:
        return Path(hf_hub_download(source, name, token=token))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        # The second is what huggingface_hub makes of errors that it has tried in vain to get over.
        if is_transient(error) or isinstance(error, LocalEntryNotFoundError):
            raise _HubFails(f"{name} of {source} can't be read now ({error})") from error
        return None


def _is_as_loaded(model: Any, source: str, folder: Path, saved: Sequence[str], token: str | None) -> bool:
    """Whether what was saved in a folder has the weights of a source, byte by byte, and components of its classes."""
    if (config := _find_file(source, model.config_name, token)) is None:
        return False
    read = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / model.config_name, config)]
    own, other = ({name: (one.get(name) or [None])[-1] for name in getattr(model, "components", {})} for one in read)
    names = [name for name in saved if weight_file_of(PurePosixPath(name).name) and not name.endswith(".json")]
    return own == other and all(_sha256_of(source, name, token) == file_sha256(folder / name) for name in names)


def _sha256_of(source: str, name: str, token: str | None) -> str | None:
    """The SHA-256 of a weight file of a folder or Hub repository, which isn't downloaded."""
    if os.path.isdir(source):
        return None if (found := _find_file(source, name, token)) is None else file_sha256(found)
    try:
        return get_hf_file_metadata(hf_hub_url(source, name), token=token).etag
    except HfHubHTTPError as error:
        if is_transient(error):
            raise _HubFails(f"{name} of {source} can't be read now ({error})") from error
        return None


def _copy_from(source: str, name: str, folder: Path, token: str | None) -> bool:
    """Copy a picture of a card, unless its path leaves the folder, by a link too, or another file is there."""
    target = folder / name
    if PurePosixPath(name).suffix.lower() not in _MEDIA or target.exists():
        return False
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return False
    try:
        found = _find_file(source, name, token)
    except _HubFails as error:
        _card_logger.warning(f"{error}: the card is published without it")
        return False
    if found is None:
        return False
    if os.path.isdir(source) and not found.resolve().is_relative_to(Path(source).resolve()):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, target)
    return True
