"""Sums and rows of all processes, the same on each of them; of the one process where there is no other."""

import torch
import torch.distributed as dist


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' `values`, with its gradient, which Accelerate's ``reduce`` has not:
    DistributedDataParallel's mean of the gradients is then that of a loss of the global batch."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    from torch.distributed.nn.functional import all_reduce  # not there in every build of PyTorch

    return all_reduce(values)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of all processes' `values`."""
    return sum_over_processes(values) / (dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks; every process must bring as many."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))
