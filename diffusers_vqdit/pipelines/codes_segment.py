"""Segments without a tokenizer: codes go in, and codes come out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..models.config_checks import MAX_CODES
from ..utils.checks import shown
from ..utils.fingerprints import tensor_sha256
from .segment_base import ColumnReader, SegmentProcessor


class CodesReader(ColumnReader):
    """A column of ready codes: nested lists of integers of one shape, or flat ones. Takes ``"grid"``, their shape,
    which flat ones need unless they are on a line, and ``"num_codes"``, by default one more than the largest."""

    def __init__(
        self,
        dataset: Any,
        column: str,
        tokenizer: Any = None,
        beside: Any = None,
        *,
        grid: Sequence[int] | None = None,
        num_codes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, column)
        self.dataset, self.grid = self.dataset.with_format("numpy"), None if grid is None else tuple(grid)
        low = high = (0, 0)  # a code, and minus the first row that has it
        for row in range(len(self.dataset)):
            codes = self._codes(row)
            self.grid = codes.shape
            low, high = min(low, (int(codes.min()), row)), max(high, (int(codes.max()), -row))
        if self.grid is None:
            raise ValueError(f"column {column!r} has no rows")
        self.shape = list(self.grid)
        self.size = min(high[0] + 1, MAX_CODES) if num_codes is None else num_codes
        if self.size > MAX_CODES:
            raise ValueError(f"column {column!r}: num_codes={num_codes} must be at most {MAX_CODES}")
        for code, row in (low, high):
            if not 0 <= code < self.size:
                larger = (
                    "give a larger num_codes (SIZE of --code_columns), or " if self.size <= code < MAX_CODES else ""
                )
                raise ValueError(
                    f"column {column!r}, row {abs(row)}: the code {code} must be in [0, {self.size}): {larger}number "
                    "the codes anew, from 0 on"
                )

    def _codes(self, row: int) -> np.ndarray:
        """A row's codes, of the grid; of the first row any."""
        value, grid = self.dataset[row][self.column], self.grid
        codes = np.asarray(value)
        if grid is not None and codes.ndim == 1 and codes.size == math.prod(grid):
            codes = codes.reshape(grid)
        whole = np.issubdtype(codes.dtype, np.integer) and codes.size > 0 and codes.ndim in CodesSegment.ndims
        if not whole or codes.shape != (grid or codes.shape):
            wanted = "of 1 to 3 axes" if grid is None else f"of shape {list(grid)}"
            raise ValueError(
                f"column {self.column!r}, row {row}: must be lists of whole codes {wanted}, got {codes.dtype} of "
                f"shape {list(codes.shape)}"
            )
        return codes

    @property
    def vocab_size(self) -> int:
        return self.size

    def read(self, row: int) -> torch.LongTensor:
        return torch.from_numpy(self._codes(row).astype(np.int64))

    def digest(self, values: list) -> bytes:
        return tensor_sha256(torch.stack(values)).encode()

    def encode(self, values: list, batch_size: int) -> list[torch.LongTensor]:
        return [codes[None] for codes in values]


class CodesSegment(SegmentProcessor):
    """Codes on a line or a grid of two or three axes, such as those of a tokenizer of videos that the caller has."""

    ndims = (1, 2, 3)
    reader = CodesReader
    noun = "tensor of codes"

    @classmethod
    def known_options(cls, entry: Mapping[str, Any], geometry: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        return {"grid": geometry["shape"], "num_codes": geometry["vocab_size"]}

    def read(self, value: Any) -> list:
        raise ValueError(
            f"{self.argument}={shown(value)} must be an int64 tensor of codes of shape {('B', *self.shape)}: the "
            "segment has no tokenizer"
        )

    def encode(self, values: Any) -> torch.LongTensor:
        return torch.stack(values).to(self.device())

    def decode(self, codes: torch.LongTensor, output_type: str = "pil") -> torch.LongTensor:
        """The codes themselves."""
        return codes
