"""One training step: mixed precision on any device, gradient clipping, one transfer of metrics."""

import math
import time
from collections.abc import Mapping

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """What a forward pass in this precision runs under, see `Trainer`."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device_type, dtype, enabled=dtype is not None)


class Trainer(SimpleTrainer):
    """Detectron2's trainer with a step of its own.

    Args:
        model, data_loader, optimizer: see `SimpleTrainer`.
        device_type: "cpu", "cuda", ...: where the model is.
        precision: "float32", or "float16" or "bfloat16" for automatic mixed precision. float16
            scales the loss to keep small gradients.
        max_norm: gradients of a larger L2 norm are scaled down to it; None leaves them.

    Raises:
        FloatingPointError: a loss or the gradient is not finite. That step leaves the weights
            untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        device_type: str,
        precision: str = "float32",
        max_norm: float | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.device_type, self.precision, self.max_norm = device_type, precision, max_norm
        self.scaler = torch.amp.GradScaler(device_type, enabled=precision == "float16")

    def run_step(self) -> None:
        """Forward, backward, check, clip, step."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with autocast(self.device_type, self.precision):
            losses = self.model(batch)
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self._write_metrics(_to_host(losses, self.iter), data_time)
        self.scaler.unscale_(self.optimizer)
        limit = torch.inf if self.max_norm is None else self.max_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # a scaler skips such steps
            raise FloatingPointError(f"the gradient is not finite in iteration {self.iter}")
        get_event_storage().put_scalar("grad_norm", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict:
        """Detectron2's, and the loss scale."""
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        scale = state_dict.get("grad_scaler")  # empty from a run of another precision
        if scale and self.scaler.is_enabled():
            self.scaler.load_state_dict(scale)


def _to_host(losses: Mapping[str, Tensor], iteration: int) -> dict[str, Tensor]:
    """Copy all losses in one transfer and refuse to go on with one that is not finite."""
    values = torch.stack([loss.detach().float() for loss in losses.values()]).cpu()
    on_host = dict(zip(losses, values, strict=True))
    bad = [name for name, value in on_host.items() if not value.isfinite()]
    if bad:
        raise FloatingPointError(f"not finite in iteration {iteration}: {', '.join(bad)}")
    return on_host
