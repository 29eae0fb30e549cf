"""The states of a dataset's captions, encoded once, into a file that says what they were made of."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models.text_vq import TextVQModel
from ..pipelines.frozen_encoders import encode_captions, state_channels
from ..pipelines.padded_states import PaddedStates, join_states, to_halves
from ..schedulers.samplers import Generators, uniform
from ..utils.distributed import from_main_process, process_rank, wait_for_processes
from ..utils.fingerprints import file_sha256, model_fingerprint, tokenizer_fingerprint
from ..utils.texts import in_parts
from ..utils.weight_files import replacing_file
from .columns import number_texts, texts_in_order
from .parts import make_parts
from .state_files import StateRows, StatesColumn, join_state_files, read_states, write_states
from .verified_files import changed_files


COLUMN = "captions"
PART_BATCHES = 8  # of texts, that a process encodes and writes at a time


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
    """The states of captions, read from a file if it is there and theirs, else encoded into it by all processes, which
    must call it. What was encoded before a run was killed is taken by the next.

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

    identity = {
        "captions": _digest(texts()),
        "text encoder": model_fingerprint(encoder),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_sequence_length": str(length),
    }
    reason = from_main_process(_differing(path, identity) if process_rank()[0] == 0 and path.exists() else None)
    if reason is not None and kept:
        raise ValueError(f"states_file={str(path)!r} {reason}; delete it or name another")

    def encode(part: list[str]) -> StateRows:
        states, mask, counts = encode_captions(encoder, tokenizer, part, length, device)
        if empty := [text for text, count in zip(part, counts, strict=True) if not count]:
            raise ValueError(f"the caption {empty[0]!r} has nothing to read")
        return [[one[own]] for one, own in zip(to_halves(states, "captions"), mask.cpu(), strict=True)]

    if reason is not None or not path.exists():
        wait_for_processes()
        _encode_parts(texts, count, encode, path, identity, batch_size)
    channels = {COLUMN: caption_channels(encoder)}
    return CaptionStates(StatesColumn(read_states(path, channels, count)[COLUMN], channels[COLUMN]), numbers)


def _encode_parts(
    texts: Callable[[], Iterator[str]],
    count: int,
    encode: Callable[[list[str]], StateRows],
    path: Path,
    identity: dict[str, str],
    batch_size: int,
) -> None:
    """Write the file of states and the one beside it, in parts that all processes share."""
    folder, size = path.parent / f".unfinished-{path.name}", PART_BATCHES * batch_size

    def make(parts: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        own = set(parts)
        total = sum(min(size, count - number * size) for number in parts)
        with tqdm(total=total, desc="Captions", unit=" captions", disable=process_rank()[0] > 0) as progress:

            def batches(part: list[str]) -> Iterator[dict[str, StateRows]]:
                for batch in in_parts(part, batch_size):
                    yield {COLUMN: encode(batch)}
                    progress.update(len(batch))

            for number, part in enumerate(in_parts(texts(), size)):
                if number in own:
                    file = folder / f"{number:05d}.arrow"
                    write_states(file, [COLUMN], batches(part))
                    yield number, {"files": {file.name: file_sha256(file)}}

    digest = hashlib.sha256(json.dumps([identity, size, batch_size]).encode()).hexdigest()
    made = make_parts(folder, digest, -(-count // size), make)
    if process_rank()[0] == 0:
        with replacing_file(path) as unfinished:
            join_state_files(unfinished, [COLUMN], [folder / name for part in made for name in part["files"]])
            # Before the file is there: killed in between, a run finds none, and joins its parts again.
            with replacing_file(_index_of(path)) as index:
                content = {**identity, "sha256": file_sha256(unfinished)}
                index.write_text(json.dumps(content, indent=2), encoding="utf-8")
        shutil.rmtree(folder)
    wait_for_processes()


def _index_of(path: Path) -> Path:
    """The file that says what a file of states was made of."""
    return path.with_name(f"{path.name}.json")


def _digest(texts: Iterable[str]) -> str:
    """SHA-256 of a list of texts as JSON."""
    digest = hashlib.sha256(b"[")
    for number, text in enumerate(texts):
        digest.update((", " * (number > 0) + json.dumps(text)).encode())
    digest.update(b"]")
    return digest.hexdigest()


def _differing(path: Path, identity: dict[str, str]) -> str | None:
    """Why a file is not of what it is to be of; None where it is."""
    try:
        found = json.loads(_index_of(path).read_bytes())
    except (OSError, ValueError) as error:
        return f"is not complete ({error})"
    if other := [name for name, value in identity.items() if found.get(name) != value]:
        return f"was made with other {' and '.join(other)}"
    damaged = changed_files(path.parent, {path.name: found.get("sha256", "")})
    return "is damaged: its SHA-256 is not the one beside it" if damaged else None
