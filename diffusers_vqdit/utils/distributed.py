"""Sums and rows of all processes, the same on each of them; of the one process where there is no other."""

from typing import Any

import torch
import torch.distributed as dist


def process_rank() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def wait_for_processes() -> None:
    """Wait until all processes are here."""
    if process_rank()[1] > 1:
        dist.barrier()


def from_main_process(value: Any) -> Any:
    """What the first process gives, on all of them."""
    found = [value]
    if process_rank()[1] > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def from_all_processes(value: Any) -> list[Any]:
    """What each process gives, in the order of their ranks, on all of them."""
    found = [value] * process_rank()[1]
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' `values`, with its gradient, which Accelerate's ``reduce`` has not:
    DistributedDataParallel's mean of the gradients is then that of a loss of the global batch."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    return _Sum.apply(values)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of all processes' `values`."""
    return sum_over_processes(values) / (dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks; every process must bring as many."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    return _Gather.apply(rows)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        return _summed(values)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient).chunk(dist.get_world_size())[dist.get_rank()]


def _summed(values: torch.Tensor) -> torch.Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
