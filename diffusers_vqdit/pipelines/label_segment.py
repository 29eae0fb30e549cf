"""Labels as segments, of one code each."""

from collections.abc import Mapping
from typing import Any

import torch

from ..utils.checks import shown
from ..utils.fingerprints import tensor_sha256
from ..utils.labels import encode_labels
from .check_inputs import check_labels
from .segment_base import ColumnReader, SegmentProcessor


def names_by_code(names: Any) -> list[str]:
    """Names of labels in the order of their codes, from a list of them or, as they are saved, a dict by code.

    Raises:
        ValueError: if they are something else, or leave out a code.
    """
    if isinstance(names, dict):
        try:
            by_code = {int(code): name for code, name in names.items()}
        except (TypeError, ValueError):
            raise ValueError(f"the names of labels={shown(names)} must be a list, or a dict by code") from None
        if sorted(by_code) != list(range(len(by_code))):
            raise ValueError(
                f"the names of labels={shown(names)} must be of all codes from 0 on, and are of "
                f"{shown(sorted(by_code))}"
            )
        names = [by_code[code] for code in range(len(by_code))]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the names of labels={shown(names)} must be a list of strings, or a dict of them by code")
    return list(names)


class LabelReader(ColumnReader):
    """A column of labels. Takes ``"names"``, in the order of their codes; and whether others may come after them,
    ``"more_names"``."""

    shape = [1]

    def __init__(
        self,
        dataset: Any,
        column: str,
        tokenizer: Any = None,
        beside: Any = None,
        *,
        names: Any = None,
        more_names: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dataset, column)
        wanted = names_by_code(names or [])
        known = dict(enumerate(wanted))
        self.codes, found = encode_labels(self.values(), column, dataset.features[column], known)
        self.entry = {"names": list(found.values())}
        if known and not more_names and len(found) > len(known):
            unknown = self.entry["names"][len(known) :]
            raise ValueError(f"column {column!r}: the labels {unknown[:5]} are not among {wanted}")

    @property
    def vocab_size(self) -> int:
        return len(self.entry["names"])

    @property
    def reads(self) -> tuple:
        return (*super().reads, *self.entry["names"])

    def read(self, row: int) -> torch.LongTensor:
        return self.codes[row]

    def digest(self, values: list) -> bytes:
        return tensor_sha256(torch.stack(values)).encode()

    def encode(self, values: list, batch_size: int) -> list[torch.LongTensor]:
        return [code.view(1, 1) for code in values]


class LabelSegment(SegmentProcessor):
    """Labels, of one code each."""

    options = ("names",)
    ndims = (1,)
    reader = LabelReader
    any_shape = False
    noun = "label"
    output_field = "labels"
    temperature = 0.0

    @classmethod
    def check_entry(cls, where: str, entry: dict[str, Any], name: str, segments: Mapping[str, Any]) -> dict[str, Any]:
        entry, size = super().check_entry(where, entry, name, segments), segments[name]["vocab_size"]
        if "names" in entry:
            # By code, as `DiffusionPipeline.download` takes lists for components.
            entry["names"] = {str(code): label for code, label in enumerate(names_by_code(entry["names"]))}
            if len(entry["names"]) > size:
                raise ValueError(f"{where}['names'] are {len(entry['names'])}, but the transformer has {size} codes")
        return entry

    @classmethod
    def known_options(cls, entry: Mapping[str, Any], geometry: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        # Names that the pipeline lacks come after its own.
        return {"names": names_by_code(entry.get("names", ())), "more_names": True}

    @property
    def names(self) -> list[str]:
        """The labels' names in the order of their codes; may be fewer than these."""
        return names_by_code(self.entry.get("names", ()))

    def read(self, value: Any) -> list[int]:
        numbers = {name: code for code, name in reversed(list(enumerate(self.names)))}  # of equal names the first
        return check_labels(self.argument, value, numbers, self.vocab_size)

    def encode(self, values: Any) -> torch.LongTensor:
        return torch.tensor(self.read(values), device=self.device())[:, None]

    def decode(self, codes: torch.LongTensor, output_type: str = "pil") -> list[str]:
        """Names of label codes (B, 1); their numbers where the checkpoint has no names."""
        names, codes = self.names, codes[:, 0].tolist()
        if outside := [code for code in codes if not 0 <= code < self.vocab_size]:
            raise ValueError(f"codes must be in [0, {self.vocab_size}), got {shown(outside)}")
        return [names[code] if code < len(names) else str(code) for code in codes]
