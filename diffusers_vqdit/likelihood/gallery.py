"""A gallery to search: items as codes, with their features, in one file."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..models.transformer_vqdit import VQDiTTransformer2DModel
from ..tasks import Task
from ..utils.checks import check_integer, shown
from ..utils.fingerprints import tensor_sha256, tokenizer_fingerprint
from ..utils.weight_files import check_finite, replacing_file


SEARCH_CHUNK = 8_192  # items of the gallery a matrix product: in float32 they stay in a CPU's cache
# A gallery's fields, and what they may be.
GALLERY_STRINGS = ("segment", "query", "way", "model")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
GALLERY_TENSORS = {
    "codes": (torch.int16, torch.int32, torch.int64),
    "features": _FLOATS,
    "bias": _FLOATS,
    "basis": _FLOATS,
}
_OPTIONAL = ("lengths", "places")


def transformer_digest(transformer: VQDiTTransformer2DModel) -> str:
    """A digest of the segments, of the first weights of each layer, which any training changes, and of the scales of
    LoRAs that are active.

    Raises:
        ValueError: if weights are offloaded layer by layer: then they are not there.
    """
    digest = hashlib.sha256(json.dumps(transformer.config.segments, sort_keys=True).encode())
    _add_first_weights(digest, transformer)
    for name, module in transformer.named_modules():
        if isinstance(scales := getattr(module, "scaling", None), dict):  # a layer of peft's
            active = [] if module.disable_adapters else module.active_adapters
            digest.update(f"{name} {sorted((one, scales[one]) for one in active if one in scales)}".encode())
    return digest.hexdigest()


def tokenizers_digest(tokenizers: list[Any]) -> str:
    """A digest of the first weights of each layer of the tokenizers that a gallery's and its queries' codes are of, or
    of what one without weights makes of a text.

    Raises:
        ValueError: as [`transformer_digest`].
    """
    digest = hashlib.sha256()
    for tokenizer in tokenizers:
        if isinstance(tokenizer, torch.nn.Module):
            _add_first_weights(digest, tokenizer)
        else:
            digest.update(tokenizer_fingerprint(tokenizer).encode())
    return digest.hexdigest()


def _add_first_weights(digest: Any, model: torch.nn.Module) -> None:
    for name, value in sorted(model.state_dict().items()):
        if value.is_meta:
            raise ValueError(
                f"a gallery is told by the weights of its models, and those of {type(model).__name__} are offloaded "
                "layer by layer: index and search without that, such as after pipe.enable_model_cpu_offload()"
            )
        digest.update(name.encode() + value.flatten()[:16].float().cpu().numpy().tobytes())


@dataclass
class GalleryIndex:
    """The items of a gallery as codes, and their features for the search. Made by [`VQDiTPipeline.index`].

    Args:
        segment, query: the segment of the items and that of the queries.
        way: the task whose PMI the features stand for.
        model: [`transformer_digest`] of the transformer.
        tokenizers: [`tokenizers_digest`]; empty where it isn't known.
        codes (`torch.Tensor` of shape `(G, *shape)`): int16, or int32 where the codebook needs it.
        features (`torch.Tensor` of shape `(G, R)`): float16.
        bias (`torch.Tensor` of shape `(G,)`): float32, the normaliser of an item that is given, else 0.
        basis (`torch.Tensor` of shape `(N * D, R)`): float16, orthonormal columns.
        lengths (`torch.Tensor` of shape `(G,)`, *optional*): int32, the codes of each item that is a text by blocks;
            those after them are padding. None for other items.
        query_shape (`tuple[int, ...]`, *optional*): of the queries' codes, where these are not on the grid that is the
            segment's own.
        places (`torch.Tensor` of shape `(G,)`, *optional*): int64, of each item in the whole gallery, where this is a
            part of one; None for all of it, in order.
        others (`list[GalleryIndex]`): the other parts, where items or queries have several grids: one for each.

    Raises:
        ValueError: if a field has another type, dtype or shape, isn't finite, or doesn't fit the others.
    """

    segment: str
    query: str
    way: str
    model: str
    codes: torch.Tensor
    features: torch.Tensor
    bias: torch.Tensor
    basis: torch.Tensor
    tokenizers: str = ""
    lengths: torch.Tensor | None = None
    query_shape: tuple[int, ...] | None = None
    places: torch.Tensor | None = None
    others: "list[GalleryIndex]" = field(default_factory=list)

    def __post_init__(self) -> None:
        self._faiss: Any = None
        self._marginals: dict[tuple, Any] = {}  # of the model, by `retrieve`
        for name in GALLERY_STRINGS:
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={shown(getattr(self, name))} must be a string that isn't empty")
        ways = [str(Task(one, other)) for one, other in self._sides()] if self.segment != self.query else []
        if self.way not in ways:
            raise ValueError(
                f"way={self.way!r} must be a task between segment={self.segment!r} and query={self.query!r}: "
                f"{' or '.join(ways) or 'they must differ'}"
            )
        for name, dtypes in GALLERY_TENSORS.items():
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
                found = value.dtype if isinstance(value, torch.Tensor) else shown(value)
                raise ValueError(f"{name} must be a tensor of one of {list(dtypes)}, got {found}")
        if self.codes.ndim < 2 or not self.codes.numel():
            raise ValueError(f"codes must have shape (G, *shape) with one item or more, got {tuple(self.codes.shape)}")
        if self.codes.min() < 0:
            raise ValueError(f"codes must not be negative, got {int(self.codes.min())}")
        size, rank = len(self.codes), self.features.shape[-1] if self.features.ndim else 0
        for name, shape in (("features", (size, rank)), ("bias", (size,)), ("basis", ("N * D", rank))):
            found = tuple(getattr(self, name).shape)
            if len(found) != len(shape) or any(b not in (a, "N * D") for a, b in zip(found, shape, strict=True)):
                raise ValueError(
                    f"{name} must have shape {shape} beside codes {tuple(self.codes.shape)} and features "
                    f"{tuple(self.features.shape)}, got {found}"
                )
        if self.lengths is not None:
            found = self.lengths
            fits = isinstance(found, torch.Tensor) and found.dtype in GALLERY_TENSORS["codes"] and self.codes.ndim == 2
            if not fits or found.shape != (size,) or found.min() < 1 or found.max() > self.codes.shape[1]:
                raise ValueError(f"lengths={shown(found)} must be integers ({size},) in [1, {self.codes.shape[1]}]")
        if self.places is not None:
            found = self.places
            fits = isinstance(found, torch.Tensor) and found.dtype == torch.int64 and found.shape == (size,)
            if not fits or found.min() < 0 or len(found.unique()) < size:
                raise ValueError(f"places={shown(found)} must be different integers of at least 0, int64 ({size},)")
        check_finite({name: getattr(self, name) for name in ("features", "bias", "basis")}, "the gallery")

    def _sides(self) -> list[tuple[tuple[str], tuple[str]]]:
        return [((self.segment,), (self.query,)), ((self.query,), (self.segment,))]

    def __len__(self) -> int:
        found = [len(part.codes) if part.places is None else int(part.places.max()) + 1 for part in self.parts]
        return max(found)

    @property
    def parts(self) -> "list[GalleryIndex]":
        """This and the others."""
        return [self, *self.others]

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, under a temporary name until it is complete and on the disk.

        Raises:
            ValueError: if `path` isn't one of a file in a folder that is there.
        """
        path = _path(path)
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"path={str(path)!r} must be a file in a folder that exists")
        tensors: dict[str, torch.Tensor] = {}
        metadata = {name: getattr(self, name) for name in (*GALLERY_STRINGS, "tokenizers")}
        for number, part in enumerate(self.parts):
            before = f"{number}." if number else ""
            found = {name: getattr(part, name) for name in (*GALLERY_TENSORS, *_OPTIONAL)}
            tensors |= {before + name: value.contiguous() for name, value in found.items() if value is not None}
            metadata |= {before + name: getattr(part, name) for name in GALLERY_STRINGS} if number else {}
            if part.query_shape is not None:
                metadata[f"{before}query_shape"] = json.dumps(part.query_shape)
        with replacing_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={**metadata, "sha256": _digest(metadata, tensors)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "GalleryIndex":
        """Read what [`save`] wrote.

        Raises:
            ValueError: if there is no such file, or it is no gallery's index, not whole, or doesn't fit together.
        """
        path = _path(path)
        if not path.is_file():
            raise ValueError(f"path={str(path)!r} is no file; give one that GalleryIndex.save wrote")
        try:
            with safe_open(path, framework="pt") as file:
                found = {**(file.metadata() or {}), **{name: file.get_tensor(name) for name in file.keys()}}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(path)!r} is no whole safetensors file ({error})") from error
        names = (*GALLERY_STRINGS, *GALLERY_TENSORS)
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"{str(path)!r} is no index of a gallery, it lacks {', '.join(missing)}; write one with "
                "GalleryIndex.save"
            )
        digest = found.get("sha256")  # version 0.1 wrote none
        tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        if digest is not None and digest != _digest(found, tensors):
            raise ValueError(f"{str(path)!r} is damaged: its content has another SHA-256 than when it was written")
        try:
            first, *others = (cls._part(found, before) for before in _prefixes(found))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r}: {error}") from error
        first.others = others
        return first

    @classmethod
    def _part(cls, found: dict[str, Any], before: str) -> "GalleryIndex":
        """The part of a file whose names begin so."""
        fields = {name: found[before + name] for name in (*GALLERY_STRINGS, *GALLERY_TENSORS)}
        fields |= {name: found[before + name] for name in _OPTIONAL if before + name in found}
        shape = found.get(f"{before}query_shape")
        query_shape = None if shape is None else tuple(json.loads(shape))
        return cls(**fields, query_shape=query_shape, tokenizers=found.get("tokenizers", ""))

    def search(self, queries: torch.Tensor, count: int) -> torch.LongTensor:
        """The `count` items of this part (B, count) with the largest inner products with `queries` (B, R), best first.

        By faiss's exact inner-product index where faiss is installed, else by matrix products a chunk at a time.

        Raises:
            ValueError: if `queries` has another shape or isn't finite, or `count` isn't in [1, G].
        """
        rank = self.features.shape[1]
        if not isinstance(queries, torch.Tensor) or queries.ndim != 2 or queries.shape[1] != rank:
            found = tuple(queries.shape) if isinstance(queries, torch.Tensor) else shown(queries)
            raise ValueError(f"queries must be a tensor (B, {rank}), got {found}")
        check_finite({"queries": queries}, "the search")
        count = check_integer("count", count, 1, len(self.codes))
        queries = queries.float().cpu()
        if find_spec("faiss") is not None:
            # No import statement: diffusers would warn of a repository's pipeline.py that it isn't installed.
            faiss = import_module("faiss")
            if self._faiss is None:
                # The bias is one more feature, whose counterpart in a query is 1.
                self._faiss = faiss.IndexFlatIP(self.features.shape[1] + 1)
                self._faiss.add(torch.cat([self.features.float(), self.bias[:, None]], dim=1).numpy())
            queries = torch.cat([queries, torch.ones(len(queries), 1)], dim=1)
            return torch.from_numpy(self._faiss.search(queries.numpy(), count)[1])
        best = torch.empty(len(queries), 0)
        places = torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, len(self.codes), SEARCH_CHUNK):
            rows = slice(start, start + SEARCH_CHUNK)
            scores = torch.addmm(self.bias[rows], queries, self.features[rows].float().T)  # (B, chunk)
            numbers = torch.arange(start, start + scores.shape[1]).expand(len(queries), -1)
            best, places = torch.cat([best, scores], dim=1), torch.cat([places, numbers], dim=1)
            best, order = best.topk(min(count, best.shape[1]))
            places = places.gather(1, order)
        return places


def _prefixes(found: dict[str, Any]) -> list[str]:
    """What the names of each part's fields begin with in a file, in order."""
    numbers = {int(name.partition(".")[0]) for name in found if name.partition(".")[0].isdecimal()}
    return ["", *(f"{number}." for number in sorted(numbers))]


def _digest(strings: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    names = [before + name for before in _prefixes(tensors) for name in (*GALLERY_STRINGS, "query_shape")]
    kinds = [before + name for before in _prefixes(tensors) for name in (*GALLERY_TENSORS, *_OPTIONAL)]
    parts = [*(strings[name] for name in names if name in strings)]
    parts += [tensor_sha256(tensors[name]) for name in kinds if name in tensors]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _path(path: str | os.PathLike) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"path={shown(path)} must be a path to a file")
    return Path(path)
