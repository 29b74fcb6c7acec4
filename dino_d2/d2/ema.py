"""An exponential moving average of the weights, evaluated beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .sharding import own_part, place


class EMAHook(HookBase):
    """Averages the weights, and the statistics of batch norms, after every step.

    A checkpoint of the trainer holds the average. The decay rises to its final value, as
    (1 + n) / (10 + n) in step n, so that the weights of the start are soon forgotten.

    Args:
        model: the one in training, or its wrapper for distributed training.
        decay: share of the old average in the new one, in (0, 1).

    Raises:
        ValueError: the decay is not in that range.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"the decay of an average must be between 0 and 1, not {decay}")
        self.model, self.decay = getattr(model, "module", model), decay
        self.average: dict[str, Tensor] = {}  # by the names of the model's state dict

    def before_train(self) -> None:
        """Begin with the weights as they are, unless a checkpoint had an average."""
        if not self.average:
            self.average = _copy(self.model.state_dict())

    def after_step(self) -> None:
        """Add the new weights."""
        step = self.trainer.iter + 1
        weights = self.model.state_dict()
        names = [name for name, tensor in weights.items() if tensor.is_floating_point()]
        old, new = ([own_part(state[name]) for name in names] for state in (self.average, weights))
        get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(old, new, None)
        for name in weights.keys() - set(names):
            self.average[name].copy_(weights[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While active, the model has the averaged weights."""
        weights = self.model.state_dict()
        own = _copy(weights)
        _assign(weights, self.average)
        try:
            yield
        finally:
            _assign(weights, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, for a checkpoint; sharded as the model is."""
        return self.average

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.average = _copy(self.model.state_dict())
        _assign(self.average, state_dict)


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


@torch.no_grad()
def _assign(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        tensor.copy_(place(values[name], tensor))
