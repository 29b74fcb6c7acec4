"""Host data to the device without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(data: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers that the host knows.

    `torch.tensor(..., device=device)` waits for a GPU to finish all its work; this does not.
    """
    return torch.tensor(data, dtype=dtype).to(device, non_blocking=True)
