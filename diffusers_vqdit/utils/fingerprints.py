"""Digests that tell whether data, weights or files are still the same ones."""

import hashlib
import inspect
import json
from pathlib import Path

import torch


# Of a VAE's config: what its codes and raw latents don't depend on.
_NOT_ENCODING = ("sample_size", "latents_mean", "latents_std", "scaling_factor", "shift_factor", "force_upcast")


def model_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over all weights of a model of diffusers or transformers, and what its config has beside the defaults.

    The same for a model and for a copy that was saved and loaded, in whatever folder. A tokenizer's sample size and
    latent statistics are left out, as it encodes the same whatever they are.
    """
    defaults = {n: p.default for n, p in inspect.signature(type(model).__init__).parameters.items()}
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)  # transformers', ours
    config = json.loads(json.dumps(config, default=str))
    if hasattr(model.config, "to_dict"):
        # What is added when a model is saved for the first time.
        saved = {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
        config |= {name: value for name, value in saved.items() if config.get(name) is None}
    kept = {
        name: value
        for name, value in config.items()
        if not name.startswith("_")
        and name not in _NOT_ENCODING
        and value != json.loads(json.dumps(defaults.get(name), default=str))
    }
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_raw(value))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 over what a transformers tokenizer makes of a text, but for its length; or over what a feature extractor
    is configured to."""
    if not hasattr(tokenizer, "get_vocab"):
        return hashlib.sha256(tokenizer.to_json_string().encode()).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for name in ("version", "truncation", "padding"):  # the last two are those of the last call
            content.pop(name, None)
    else:
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps([content, tokenizer.pad_token_id], sort_keys=True).encode()).hexdigest()


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 over a tensor's dtype, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(_raw(tensor))
    return digest.hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
