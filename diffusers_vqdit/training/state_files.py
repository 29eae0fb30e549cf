"""Files of an encoder's states: written once, then read row by row from where they lie on disk.

An Arrow file is mapped into memory, where a Parquet file would be decoded in row groups of gigabytes for each row. A
column is one segment; a row has a list of variants (wordings), each the float16 states (n, channels) of one, flat.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ..pipelines.padded_states import PaddedStates, join_states
from ..schedulers.samplers import Generators, uniform
from ..utils.weight_files import replacing_file


StateRows = list[list[torch.Tensor]]  # of each row its variants (n, channels), float16
_TYPE = pa.large_list(pa.large_list(pa.float16()))


@contextmanager
def states_writer(path: Path, names: Sequence[str]) -> Iterator[Callable[[Mapping[str, StateRows]], None]]:
    """A function for a ``with`` block that writes some rows of the columns `names`; the file is there at its end."""
    schema = _schema(names)
    with replacing_file(path) as unfinished, pa.OSFile(str(unfinished), "wb") as sink:
        with pa.ipc.new_file(sink, schema) as writer:
            yield lambda rows: writer.write_batch(
                pa.record_batch([_array(rows[name]) for name in names], schema=schema)
            )


def write_states(path: Path, names: Sequence[str], batches: Iterable[Mapping[str, StateRows]]) -> None:
    """Write the rows of all batches, each batch as it comes.

    Args:
        names: of the columns.
        batches: some rows of each column.
    """
    with states_writer(path, names) as write:
        for batch in batches:
            write(batch)


def join_state_files(path: Path, names: Sequence[str], parts: Iterable[Path]) -> None:
    """Write the rows of files of the columns `names`, one file after the other, as they would be from all batches."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _schema(names)) as writer:
        for part in parts:
            with pa.OSFile(str(part), "rb") as source, pa.ipc.open_file(source) as file:
                for number in range(file.num_record_batches):
                    writer.write_batch(file.get_batch(number))


def _schema(names: Sequence[str]) -> pa.Schema:
    return pa.schema([(name, _TYPE) for name in names])


def _array(rows: StateRows) -> pa.Array:
    variants = [states for row in rows for states in row]
    values = np.concatenate([states.flatten().numpy() for states in variants])
    inner = np.cumsum([0, *(states.numel() for states in variants)])
    outer = np.cumsum([0, *(len(row) for row in rows)])
    lists = pa.LargeListArray.from_arrays(pa.array(inner, pa.int64()), pa.array(values, pa.float16()))
    return pa.LargeListArray.from_arrays(pa.array(outer, pa.int64()), lists)


def read_states(path: Path, channels: Mapping[str, int], rows: int | None = None) -> pa.Table:
    """The columns of a file, which stays on disk.

    Args:
        channels: by column.
        rows: how many there must be; None for any number.

    Raises:
        ValueError: that names the file, if it is damaged or has other columns.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is no file of states that can be read: {error}") from error
    kinds = {name: table.schema.field(name).type for name in table.column_names}
    if kinds != dict.fromkeys(channels, _TYPE):
        raise ValueError(f"{str(path)!r} must have float16 states of {list(channels)}, it has {kinds}")
    if rows is not None and table.num_rows != rows:
        raise ValueError(f"{str(path)!r} has {table.num_rows} rows, not {rows}")
    return table


class StatesColumn:
    """The states of a segment for all rows of a dataset, on disk: a row is read when it is asked for.

    Args:
        column: from files of [`write_states`].
        channels: of a state.
    """

    def __init__(self, column: pa.ChunkedArray, channels: int) -> None:
        self.column, self.channels = column, channels

    def __len__(self) -> int:
        return len(self.column)

    def variants(self, row: int) -> list[torch.Tensor]:
        """The variants (n, channels) of a row, float16."""
        lists = self.column[row].values
        # A copy, as what is mapped can't be written to, which tensors promise.
        return [torch.from_numpy(np.array(one.values.to_numpy())).view(-1, self.channels) for one in lists]

    def draw(self, rows: torch.LongTensor, generator: Generators = None) -> PaddedStates:
        """A variant of each row, drawn by `generator` or by one a row, filled up to the longest of them."""
        shares = uniform(rows.shape, generator, rows.device).tolist()
        chosen = []
        for row, share in zip(rows.tolist(), shares, strict=True):
            variants = self.variants(row)
            chosen.append(PaddedStates(variants[int(share * len(variants))][None]))
        return join_states(chosen)


def split_padded(
    given: Mapping[str, torch.Tensor | PaddedStates],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What is given as tensors by segment, and the masks of those that are states and have some padding."""
    states = {name: value for name, value in given.items() if isinstance(value, PaddedStates)}
    masks = {name: value.mask for name, value in states.items() if value.mask is not None}
    return {**given, **{name: value.states for name, value in states.items()}}, masks
