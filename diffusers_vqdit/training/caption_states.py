"""The states of a dataset's captions, encoded once, into a file that says what they were made of."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..models.text_vq import TextVQModel
from ..pipelines.frozen_encoders import encode_captions, state_channels
from ..pipelines.padded_states import PaddedStates, join_states, to_halves
from ..utils.fingerprints import file_sha256, model_fingerprint, tokenizer_fingerprint
from ..utils.weight_files import replacing_file
from .state_files import StateRows, StatesColumn, read_states, write_states
from .verified_files import changed_files


COLUMN = "captions"


class CaptionStates:
    """States of captions, on disk, by their text.

    Args:
        column: one row for each text.
        rows: its number, by text.
    """

    def __init__(self, column: StatesColumn, rows: dict[str, int]) -> None:
        self.column, self.rows = column, rows

    def batch(self, texts: list[str]) -> PaddedStates:
        """Those of some texts, filled up to the longest of them, float16."""
        return join_states([PaddedStates(self.column.variants(self.rows[text])[0][None]) for text in texts])


def caption_channels(encoder: torch.nn.Module) -> int:
    """Channels of a text encoder's states."""
    return encoder.config.code_dim if isinstance(encoder, TextVQModel) else state_channels(encoder)


def cache_captions(
    encoder: torch.nn.Module,
    tokenizer,
    captions: Iterable[str],
    length: int,
    path: Path,
    *,
    kept: bool,
    device: torch.device,
    batch_size: int = 64,
) -> CaptionStates:
    """The states of captions, read from a file if it is there and theirs, else encoded into it.

    Args:
        captions: of which each is encoded once.
        length: tokens of a text, at most.
        path: of the file; beside it a ``.json`` says what it was made of.
        kept: whether it is the user's own file, which isn't replaced by one of other captions or another encoder.

    Raises:
        ValueError: if it is to be kept and is damaged, or of others; or a caption has no tokens.
    """
    texts = list(dict.fromkeys(captions))
    rows = {text: index for index, text in enumerate(texts)}
    channels, index_path = {COLUMN: caption_channels(encoder)}, path.with_name(f"{path.name}.json")
    identity = {
        "captions": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "text encoder": model_fingerprint(encoder),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_sequence_length": str(length),
    }
    if path.exists():
        reason = _differing(path, index_path, identity)
        if reason is None:
            return CaptionStates(StatesColumn(read_states(path, channels, len(texts))[COLUMN], channels[COLUMN]), rows)
        if kept:
            raise ValueError(f"states_file={str(path)!r} {reason}; delete it or name another")

    def batches() -> Iterator[dict[str, StateRows]]:
        for start in tqdm(range(0, len(texts), batch_size), desc="Captions"):
            part = texts[start : start + batch_size]
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
    return CaptionStates(StatesColumn(read_states(path, channels, len(texts))[COLUMN], channels[COLUMN]), rows)


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
