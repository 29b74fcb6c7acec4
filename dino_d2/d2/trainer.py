"""One training step: mixed precision on any device, gradient clipping, one transfer of metrics."""

import logging
import math
import os
import signal
import time
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, distributed, nn

from ..checkpoint.io import replace_file
from ..diagnostics.non_finite import record_non_finite
from ..errors import NonFiniteError
from ..processes import alone
from ..transfer import to_device
from .loading import deadline, seed_all, start_at
from .sharding import is_sharded, own_part, whole, without_sync
from .stopping import Stopped, StopSignals

logger = logging.getLogger("detectron2.dino_d2")

PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """What a forward pass in this precision runs under, see `Trainer`."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device_type, dtype, enabled=dtype is not None)


class _ElsewhereError(Exception):
    """What is not finite was met by another process of a sharded model."""


class Trainer(SimpleTrainer):
    """Detectron2's trainer with a step of its own.

    Every step draws from generators seeded by its number, so that training that resumes is the
    same as training that never stopped.

    Args:
        model, data_loader, optimizer: see `SimpleTrainer`.
        device_type: "cpu", "cuda", ...: where the model is.
        precision: "float32", or "float16" or "bfloat16" for automatic mixed precision. float16
            scales the loss to keep small gradients.
        max_norm: gradients of a larger L2 norm are scaled down to it; None leaves them.
        seed: of all that is random; None draws one. A checkpoint keeps it.
        save_dir: where a batch goes that makes a loss or the gradient not finite; "" nowhere.
        signals: end training after the step in which one comes, in all processes.
        data_timeout: seconds that a batch may take to come; 0 is no limit.
        accumulate: a batch is taken in so many parts of equal size, one after the other, and its
            gradient and losses are the means over them. Each part's losses are divided by the
            number of objects in that part.

    Raises:
        FloatingPointError: a loss or the gradient is not finite, in any process. The step leaves
            the weights untouched in all of them.
        LoadingError: a batch has not come in time.
        Stopped: there was a signal.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        device_type: str,
        precision: str = "float32",
        max_norm: float | None = None,
        seed: int | None = None,
        save_dir: str = "",
        signals: StopSignals | None = None,
        data_timeout: float = 0,
        accumulate: int = 1,
    ):
        super().__init__(model, data_loader, optimizer)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.device_type, self.precision, self.max_norm = device_type, precision, max_norm
        self.scaler = torch.amp.GradScaler(device_type, enabled=precision == "float16")
        self.seed = comm.shared_random_seed() if seed is None else seed
        self.save_dir, self.signals = save_dir, signals or StopSignals()
        self.data_timeout = data_timeout
        self.accumulate = accumulate
        self.phase = ""  # of the step, for who watches it
        self._stop, self._skipped = 0, 0

    def before_train(self) -> None:
        """Let the data go on with the step."""
        start_at(self.data_loader, self.start_iter, self.seed)
        super().before_train()

    def run_step(self) -> None:
        """Forward, backward, check, clip, step."""
        start = time.perf_counter()
        self.phase = "loading data"
        with deadline(self.data_timeout):
            batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        try:
            losses = self._backward(batch, self.model)
        except (NonFiniteError, _ElsewhereError) as error:
            # without sharding, the others end because this process does
            what = f"not finite in iteration {self.iter}: {error}"
            raise self._report(what, batch, is_sharded(self.model)) from error
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        self.phase = "sharing metrics"
        metrics = self._to_host({**losses, "grad_norm": norm}, data_time)
        self._refuse_non_finite(metrics, batch)
        self.storage.put_scalars(**metrics)
        if self.max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.phase = "after the step"

    def after_step(self) -> None:
        """Detectron2's hooks; then end if that was agreed."""
        super().after_step()
        if self._stop:
            raise Stopped(self._stop)

    def after_train(self) -> None:
        """Detectron2's; and let the data loader's workers go."""
        self._data_loader_iter_obj = None
        super().after_train()

    def _backward(self, batch: list[dict], model: nn.Module) -> dict[str, Tensor]:
        """The gradient of a batch, and its losses."""
        self.optimizer.zero_grad()
        *parts, last = split(batch, self.accumulate)
        with without_sync(model):
            losses = [self._backward_part(part, i, model) for i, part in enumerate(parts)]
        losses.append(self._backward_part(last, len(parts), model))
        return {name: sum(of_part[name] for of_part in losses) / len(losses) for name in losses[0]}

    def _backward_part(self, part: list[dict], number: int, model: nn.Module) -> dict[str, Tensor]:
        # 4 numbers: other keys than data have
        seed_all(self.seed, comm.get_rank(), self.iter, number)
        self.phase = "forward pass"
        with autocast(self.device_type, self.precision):
            losses = self._forward(part, model)
        self.phase = "backward pass"
        self.scaler.scale(sum(losses.values()) / self.accumulate).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _forward(self, part: list[dict], model: nn.Module) -> dict[str, Tensor]:
        """Losses. If one process of a sharded model fails, all do, for they could not go on."""
        if not is_sharded(model):
            return model(part)
        losses, failure = {}, None
        try:
            losses = model(part)
        except NonFiniteError as error:
            failure = error
        failures = to_device([failure is not None], torch.float32, model.device)
        distributed.all_reduce(failures)
        if failures.item():
            raise failure or _ElsewhereError("in another process")
        return losses

    def _to_host(self, values: dict[str, Tensor], data_time: float) -> dict[str, float]:
        """Means over all processes, in one transfer. What is not finite in one, is not in the mean.

        The signals to stop travel along.
        """
        own = torch.stack([value.detach().float() for value in values.values()])
        more = to_device([data_time, self.signals.number], torch.float32, own.device)
        shared = torch.cat([own, more]) / comm.get_world_size()
        if comm.get_world_size() > 1:
            distributed.all_reduce(shared)
        *means, data_time, stop = shared.tolist()
        self._stop = stop and (self.signals.number or signal.SIGTERM)
        means = dict(zip(values, means, strict=True))
        total = sum(mean for name, mean in means.items() if name != "grad_norm")
        return {**means, "total_loss": total, "data_time": data_time}

    def _refuse_non_finite(self, metrics: dict[str, float], batch: list[dict]) -> None:
        """The same in all processes, for they see the same means."""
        bad = [n for n, value in metrics.items() if not math.isfinite(value) and n != "total_loss"]
        self._skipped = self._skipped + 1 if bad else 0
        if not bad or (self.scaler.is_enabled() and bad == ["grad_norm"] and self._skipped <= 30):
            return  # a scaler skips the step, and tries a smaller scale
        what = f"not finite in iteration {self.iter}: {', '.join(bad)}"
        if bad == ["grad_norm"]:
            what = f"the gradient is not finite in iteration {self.iter}"
        raise self._report(what, batch, together=True)

    def _report(self, what: str, batch: list[dict], together: bool) -> FloatingPointError:
        logger.error(what)  # should the search for the cause fail
        report = self._diagnose(batch)
        reports = comm.all_gather(report) if together else [report]
        return FloatingPointError("\n".join([what, *filter(None, reports)]))

    def _diagnose(self, batch: list[dict]) -> str:
        """Repeat the step: where it goes wrong in this process, and with which images.

        All processes of a sharded model have to call it; others repeat it alone.
        """
        sharded = is_sharded(self.model)
        model = self.model if sharded else getattr(self.model, "module", self.model)
        losses = {}
        with (
            record_non_finite(model) as found,
            torch.compiler.set_stance("force_eager"),
            nullcontext() if sharded else alone(),
        ):
            try:
                losses = self._backward(batch, model)
            except _ElsewhereError:
                pass
            except Exception as error:  # of the matcher, or out of memory
                found.outputs.append(str(error))
        names = [f"loss {name!r}" for name, loss in losses.items() if not loss.isfinite()]
        names += [f"first the output of {name!r}" for name in found.outputs[:1]]
        names += [f"first the gradient at the output of {name!r}" for name in found.gradients[:1]]
        elsewhere = sharded and any(comm.all_gather(bool(names))) and not names
        gradients = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        weights = [name for name, gradient in gradients if not own_part(gradient).isfinite().all()]
        if weights and losses and not elsewhere:  # where they are sharded, they are everyone's
            names.append(f"the gradients of {len(weights)} weights, such as {weights[-1]!r}")
        return f"Process {comm.get_rank()}: {', '.join(names)}{self._keep(batch)}" if names else ""

    def _keep(self, batch: list[dict]) -> str:
        """Save a batch for inspection; for the end of a message."""
        inputs = [source for source in batch if isinstance(source, dict)]
        images = [f"{x.get('file_name', 'unknown')} (id {x.get('image_id')})" for x in inputs]
        text = f"; images: {', '.join(images)}"
        if not self.save_dir:
            return text
        name = f"non_finite_{self.iter:07d}_process{comm.get_rank()}.pt"
        path = os.path.join(self.save_dir, name)
        content = [plain(source) for source in inputs]
        replace_file(path, lambda file: torch.save(content, file), checksum=False)
        return f"{text}; saved in {path}"

    def state_dict(self) -> dict:
        """Detectron2's, the loss scale, and what all that is random depends on."""
        state = {"grad_scaler": self.scaler.state_dict(), "seed": self.seed}
        return {**super().state_dict(), **state}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        scale = state_dict.get("grad_scaler")  # empty from a run of another precision
        if scale and self.scaler.is_enabled():
            self.scaler.load_state_dict(scale)


def split(batch: list[dict], count: int) -> list[list[dict]]:
    """A batch in parts of equal size.

    Raises:
        ValueError: it cannot be divided so.
    """
    if count == 1:
        return [batch]
    size, rest = divmod(len(batch), count)
    if rest or not size:
        raise ValueError(
            f"the {len(batch)} images of a batch that each process has cannot be taken in {count} "
            "equal parts (train.accumulate, SOLVER.ACCUMULATE)"
        )
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def plain(source: dict) -> dict:
    """An input of the model as tensors and plain values, which load without any code."""
    facts = {k: v for k, v in source.items() if isinstance(v, Tensor | str | int | float)}
    if "instances" in source:
        fields = source["instances"].get_fields()
        facts |= {name: getattr(value, "tensor", value) for name, value in fields.items()}
    return facts
