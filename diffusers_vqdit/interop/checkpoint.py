"""Reading foreign checkpoints without running code that they may hold."""

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# What training frameworks pickle beside the weights, by the beginning of its name: callbacks, arguments, scores. None
# of it is needed, so its classes are replaced by one that does nothing.
_BOOKKEEPING = ("pytorch_lightning.", "lightning.", "omegaconf.", "argparse.", "typing.", "numpy.")
_BOOKKEEPING_TYPES = tuple(
    f"builtins.{name}" for name in ("dict", "list", "tuple", "set", "int", "float", "str", "bool")
)
# Where the weights may be, in the order in which they are looked for; the second list is of their moving averages.
_WEIGHTS, _AVERAGES = ("state_dict", "model", "module"), ("ema", "model_ema", "state_dict_ema")


class _Ignored:
    """Stands in for a pickled object that isn't needed: takes anything and keeps nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


def read_checkpoint(path: str | Path) -> Mapping:
    """What a checkpoint file holds, at its top level.

    Raises:
        ValueError: if there is no such file, it is of another kind, truncated, or needs code to be run.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path} is not a file; give a .safetensors, {', '.join(PICKLES)} file or a state dict")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    if path.suffix not in PICKLES:
        raise ValueError(f"{path} must be a .safetensors, {', '.join(PICKLES)} file")
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        unsafe = []  # an older file, or a broken one: torch.load tells
    ignored = [name for name in unsafe if name.startswith(_BOOKKEEPING) or name in _BOOKKEEPING_TYPES]
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in ignored]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = sorted(set(unsafe) - set(ignored))
        raise ValueError(
            f"{path} holds more than weights{': it would load ' + ', '.join(refused[:5]) if refused else ''}. Only "
            "tensors in dictionaries are read, because unpickling anything else can run code; save the state dict "
            "alone, best as .safetensors"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole checkpoint of torch.save ({str(error).splitlines()[0]}); download it again"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; a dictionary with the weights was expected")
    return content


def state_dicts(content: Mapping) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """The weights in what a checkpoint holds, and their moving averages if it has them.

    Raises:
        ValueError: if there are no weights of an image tokenizer.
    """
    weights = _tensors(next((content[name] for name in _WEIGHTS if isinstance(content.get(name), Mapping)), content))
    averages = next((_tensors(content[name]) for name in _AVERAGES if isinstance(content.get(name), Mapping)), None)
    if not weights and averages is not None:
        weights = averages
    if averages is None and any(name.startswith("model_ema.") for name in weights):
        # LitEma drops the dots of the names.
        named = {name.replace(".", ""): name for name in weights if not name.startswith(("model_ema.", "loss."))}
        stored = {name.removeprefix("model_ema."): value for name, value in weights.items() if "model_ema." in name}
        known = {named[name]: value for name, value in stored.items() if name in named}
        averages = {**weights, **known} if known else None  # latent diffusion's are of its U-Net alone
    return _without_prefix(weights), None if averages is None else _without_prefix(averages)


def _tensors(content: Mapping) -> dict[str, torch.Tensor]:
    return {name: value for name, value in content.items() if isinstance(name, str) and torch.is_tensor(value)}


def _without_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tokenizer's weights alone: those beside ``encoder.``, without what stands before it, such as
    ``first_stage_model.`` in a latent diffusion model's checkpoint."""
    mark = "encoder.conv_in.weight"
    prefixes = [name.removesuffix(mark) for name in weights if name.endswith(mark)]
    if len(prefixes) != 1:
        raise ValueError(
            f"the weights must have one '{mark}', as image tokenizers of the VQGAN family have; got {len(prefixes)} "
            f"among {len(weights)} tensors{': ' + ', '.join(list(weights)[:4]) + ', ...' if weights else ''}"
        )
    parts = tuple(prefixes[0] + part for part in ("encoder.", "decoder.", "quant"))
    others = tuple(prefixes[0] + part for part in ("post_quant_conv.",))
    kept = {name: value for name, value in weights.items() if name.startswith(parts + others)}
    return {name.removeprefix(prefixes[0]): value for name, value in kept.items()}


def read_config(config: str | Path | Mapping | None) -> dict:
    """The original's constructor arguments, flat: those of ``model.params`` and ``ddconfig`` side by side."""
    if config is None:
        return {}
    if isinstance(config, str | Path):
        path = Path(config)
        if not path.is_file():
            raise ValueError(f"config={str(config)!r} is not a file; give a YAML or JSON file, or a mapping")
        if path.suffix == ".json":
            config = json.loads(path.read_text())
        else:
            import yaml  # comes with huggingface_hub

            config = yaml.safe_load(path.read_text())
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a mapping of the original's arguments, got {type(config).__name__}")
    flat = dict(config)
    for name in ("model", "params", "init_args", "ddconfig"):
        if isinstance(flat.get(name), Mapping):
            flat = {**flat, **flat[name]}
    return flat
