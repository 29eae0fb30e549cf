"""The order in which a dataset's rows are seen, of a seed and the epoch alone."""

from collections.abc import Iterator

import torch

from .draws import step_generator


def shuffled_batches(
    size: int, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[torch.Tensor]:
    """Endless index batches of a dataset held in memory: each epoch in an order of its own, drawn from (seed, epoch).

    The batch at a given step is the same in a run that was never stopped and in one resumed at `start`. The batches of
    the ranks are disjoint parts of one global batch. An epoch's remainder is carried into the next epoch, so that
    small datasets work with any batch size.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    global_batch = batch_size * world_size
    orders: dict[int, torch.Tensor] = {}

    def order(epoch: int) -> torch.Tensor:
        if epoch not in orders:
            orders.clear()
            orders[epoch] = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return orders[epoch]

    step = start
    while True:
        first = step * global_batch + rank * batch_size
        yield torch.tensor([int(order(i // size)[i % size]) for i in range(first, first + batch_size)])
        step += 1


def bucket_batches(
    buckets: torch.Tensor, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[torch.Tensor]:
    """Endless index batches of rows in buckets (N,), as [`shuffled_batches`]; all rows of a global batch are of one.

    Each bucket's rows are passed through again and again, each time in an order of its own, and what doesn't fill a
    batch is carried into the next pass: after e epochs a bucket of n rows has given floor(e n / B) batches of B. The
    batches of an epoch come in an order drawn from (seed, epoch).
    """
    members = [rows for bucket in buckets.unique().tolist() if len(rows := (buckets == bucket).nonzero().flatten())]
    global_batch = batch_size * world_size
    orders: dict[int, tuple[int, torch.Tensor]] = {}  # by bucket: the pass, and its order

    def row(bucket: int, position: int) -> int:
        number, place = divmod(position, len(members[bucket]))
        if bucket not in orders or orders[bucket][0] != number:
            generator = step_generator(seed, number, bucket, 1)
            orders[bucket] = number, torch.randperm(len(members[bucket]), generator=generator)
        return int(members[bucket][orders[bucket][1][place]])

    def given(epoch: int) -> list[int]:
        return [epoch * len(rows) // global_batch for rows in members]

    epoch = start * global_batch // len(buckets)
    while sum(given(epoch + 1)) <= start:
        epoch += 1
    skipped = start - sum(given(epoch))
    while True:
        spans = enumerate(zip(given(epoch), given(epoch + 1), strict=True))
        turns = [(bucket, turn) for bucket, span in spans for turn in range(*span)]
        for index in torch.randperm(len(turns), generator=step_generator(seed, epoch, 0, 2))[skipped:].tolist():
            bucket, turn = turns[index]
            first = turn * global_batch + rank * batch_size
            yield torch.tensor([row(bucket, position) for position in range(first, first + batch_size)])
        epoch, skipped = epoch + 1, 0
