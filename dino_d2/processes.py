"""Averages over the processes of distributed training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """In this context averages are this process's own, so that no other has to call them."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def average_over_processes(total: Tensor) -> Tensor:
    """The mean of a scalar over all processes, at least 1: what losses are divided by.

    Every process has to call it, the same number of times.
    """
    if _distributed():
        total = total.clone()
        distributed.all_reduce(total)
        total = total / distributed.get_world_size()
    return total.clamp(min=1)


def average_count(count: int, like: Tensor) -> Tensor | float:
    """The same for a number that the host knows: without distributed training it stays there."""
    if not _distributed():
        return float(max(count, 1))
    return average_over_processes(torch.full((), count, dtype=like.dtype, device=like.device))


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and not _alone
