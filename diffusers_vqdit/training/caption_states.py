"""The states of a dataset's captions, encoded once, into a file that says what they were made of."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models.text_vq import TextVQModel
from ..pipelines.frozen_encoders import encode_captions, state_channels
from ..pipelines.padded_states import PaddedStates, join_states, to_halves
from ..schedulers.samplers import Generators, uniform
from ..utils.fingerprints import file_sha256, model_fingerprint, tokenizer_fingerprint
from ..utils.texts import in_parts
from ..utils.weight_files import replacing_file
from .columns import number_texts, texts_in_order
from .state_files import StateRows, StatesColumn, read_states, write_states
from .verified_files import changed_files


COLUMN = "captions"


class CaptionStates:
    """States of columns of captions, on disk.

    Args:
        column: one row for each text.
        numbers: for each column of captions the rows of its texts' states, and where each of its rows begins and ends
            in these, as [`~training.columns.number_texts`] gives them.
    """

    def __init__(self, column: StatesColumn, numbers: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self.column, self.numbers = column, numbers

    def draw(self, rows: torch.LongTensor, generator: Generators = None) -> PaddedStates:
        """Those of one caption for each of `rows`, filled up to the longest of them, float16: a column drawn evenly,
        then one of its texts there.

        `generator` may be a list with one a row.
        """
        columns = (uniform(rows.shape, generator, rows.device) * len(self.numbers)).long().tolist()
        shares = uniform(rows.shape, generator, rows.device).tolist()
        drawn = []
        for column, row, share in zip(columns, rows.tolist(), shares, strict=True):
            numbers, bounds = self.numbers[column]
            number = numbers[bounds[row] + int(share * (bounds[row + 1] - bounds[row]))]
            drawn.append(PaddedStates(self.column.variants(int(number))[0][None]))
        return join_states(drawn)


def caption_channels(encoder: torch.nn.Module) -> int:
    """Channels of a text encoder's states."""
    return encoder.config.code_dim if isinstance(encoder, TextVQModel) else state_channels(encoder)


def cache_captions(
    encoder: torch.nn.Module,
    tokenizer,
    captions: Sequence[Iterable[list[str]]],
    length: int,
    path: Path,
    *,
    kept: bool,
    device: torch.device,
    batch_size: int = 64,
) -> CaptionStates:
    """The states of captions, read from a file if it is there and theirs, else encoded into it.

    Args:
        captions: columns of them, one or several texts a row, which are read several times. Each text is encoded once.
        length: tokens of a text, at most.
        path: of the file; beside it a ``.json`` says what it was made of.
        kept: whether it is the user's own file, which isn't replaced by one of other captions or another encoder.

    Raises:
        ValueError: if it is to be kept and is damaged, or of others; or a caption has no tokens.
    """
    numbers, is_first = number_texts(captions)
    count = int(is_first.sum())

    def texts() -> Iterator[str]:
        return itertools.compress(texts_in_order(captions), is_first)

    channels, index_path = {COLUMN: caption_channels(encoder)}, path.with_name(f"{path.name}.json")
    identity = {
        "captions": _digest(texts()),
        "text encoder": model_fingerprint(encoder),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_sequence_length": str(length),
    }
    if path.exists():
        reason = _differing(path, index_path, identity)
        if reason is None:
            return CaptionStates(StatesColumn(read_states(path, channels, count)[COLUMN], channels[COLUMN]), numbers)
        if kept:
            raise ValueError(f"states_file={str(path)!r} {reason}; delete it or name another")

    def batches() -> Iterator[dict[str, StateRows]]:
        for part in tqdm(in_parts(texts(), batch_size), total=-(-count // batch_size), desc="Captions"):
            states, mask, counts = encode_captions(encoder, tokenizer, part, length, device)
            if empty := [text for text, count in zip(part, counts, strict=True) if not count]:
                raise ValueError(f"the caption {empty[0]!r} has nothing to read")
            halves = to_halves(states, "captions")
            yield {COLUMN: [[one[own]] for one, own in zip(halves, mask.cpu(), strict=True)]}

    path.parent.mkdir(parents=True, exist_ok=True)
    index_path.unlink(missing_ok=True)  # it makes the file complete
    write_states(path, [COLUMN], batches())
    with replacing_file(index_path) as unfinished:
        unfinished.write_text(json.dumps({**identity, "sha256": file_sha256(path)}, indent=2), encoding="utf-8")
    return CaptionStates(StatesColumn(read_states(path, channels, count)[COLUMN], channels[COLUMN]), numbers)


def _digest(texts: Iterable[str]) -> str:
    """SHA-256 of a list of texts as JSON."""
    digest = hashlib.sha256(b"[")
    for number, text in enumerate(texts):
        digest.update((", " * (number > 0) + json.dumps(text)).encode())
    digest.update(b"]")
    return digest.hexdigest()


def _differing(path: Path, index_path: Path, identity: dict[str, str]) -> str | None:
    """Why a file is not of what it is to be of; None where it is."""
    try:
        found = json.loads(index_path.read_bytes())
    except (OSError, ValueError) as error:
        return f"is not complete ({error})"
    if other := [name for name, value in identity.items() if found.get(name) != value]:
        return f"was made with other {' and '.join(other)}"
    damaged = changed_files(path.parent, {path.name: found.get("sha256", "")})
    return "is damaged: its SHA-256 is not the one beside it" if damaged else None
