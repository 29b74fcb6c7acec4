"""Hooks of training."""

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from torch import nn

from ..checkpoint.io import peek
from ..diagnostics.instability import instability
from .checkpoint import Checkpointer
from .ema import EMAHook
from .sharding import gathered
from .stopping import Stopped
from .trainer import autocast

logger = logging.getLogger("detectron2.dino_d2")


class InstabilityHook(HookBase):
    """Matches a set of images every so often and logs by how much the matching has changed since.

    Writes "instability", the IS of DN-DETR's paper, beside the other metrics, from the second time
    on; in a resumed run from the first time on. Training draws the same random numbers as without.

    Args:
        period: iterations; it also runs after the last one.
        model: a `DetrMetaArch`, or its wrapper for distributed training.
        loader: batches with annotations, always the same images in the same order.
        precision: that of evaluation, see `Trainer`.
    """

    def __init__(self, period: int, model: nn.Module, loader: Iterable, precision: str = "float32"):
        self.period, self.model, self.loader = period, getattr(model, "module", model), loader
        self.precision = precision
        self.before: list[np.ndarray] | None = None  # (Q,) of every image of all processes

    def after_step(self) -> None:
        """Run if it is time."""
        following = self.trainer.iter + 1
        last = following == self.trainer.max_iter
        if last or (self.period > 0 and following % self.period == 0):
            self._measure()

    def state_dict(self) -> dict:
        """The last matching, for a checkpoint."""
        return {} if self.before is None else {"before": list(map(torch.from_numpy, self.before))}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` returned."""
        self.before = [matched.numpy() for matched in state_dict["before"]]

    def _measure(self) -> None:
        matched = list(itertools.chain.from_iterable(comm.all_gather(self._match())))
        if self.before is not None:
            pairs = zip(self.before, matched, strict=True)
            value = float(np.mean([instability(*np.expand_dims(pair, 1)) for pair in pairs]))
            self.trainer.storage.put_scalar("instability", value, smoothing_hint=False)
            logger.info("Instability of the matching: %.2f", value)
        self.before = matched

    @torch.no_grad()
    def _match(self) -> list[np.ndarray]:
        training = self.model.training
        self.model.eval()
        device = self.model.device.type
        # an iterator over a data loader draws from the global generator
        with (
            torch.random.fork_rng(devices=()),
            autocast(device, self.precision),
            gathered(self.model),
        ):
            matched = [of_image for batch in self.loader for of_image in self.model.match(batch)]
        self.model.train(training)
        return matched


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's; when training resumes, `max_to_keep` counts what the earlier run has left."""

    def before_train(self) -> None:
        """Look for the earlier run's."""
        super().before_train()
        if self.trainer.start_iter:
            files = Path(self.checkpointer.save_dir).glob(f"{self.file_prefix}_[0-9]*.pth")
            self.recent_checkpoints = sorted(map(str, files))


class BestCheckpointer(HookBase):
    """Keeps the weights of the best evaluation in model_best.pth; to run after the evaluation.

    The file also says how good they are, so that a run that resumes does not keep worse ones.

    Args:
        checkpointer: of the model alone.
        metric: larger is better, such as "bbox/AP".
        weights: a context in which the model has those that were evaluated.
    """

    NAME = "model_best"

    def __init__(
        self,
        checkpointer: Checkpointer,
        metric: str,
        weights: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.checkpointer, self.metric, self.best = checkpointer, metric, -math.inf
        self.weights = weights

    def before_train(self) -> None:
        """Go on from the value in the file, if training does."""
        path = os.path.join(self.checkpointer.save_dir, f"{self.NAME}.pth")
        if self.trainer.start_iter and os.path.isfile(path):
            self.best = peek(path).get("metrics", {}).get(self.metric, -math.inf)

    def after_step(self) -> None:
        """Save if there was an evaluation in this step, and no better one before."""
        now = self.trainer.storage.iter
        value, iteration = self.trainer.storage.latest().get(self.metric, (math.nan, None))
        if iteration == now and value > self.best:
            self.best = value
            with self.weights():
                self.checkpointer.save(self.NAME, iteration=now, metrics={self.metric: value})
            logger.info("Best %s so far: %.4f", self.metric, value)

    def after_train(self) -> None:
        """As after a step: the last evaluation comes late. Tell if none has found the metric."""
        self.after_step()
        found = sorted(name for name in self.trainer.storage.latest() if "/" in name)
        if found and self.metric not in found:
            logger.warning(
                "no checkpoint is the best, for no evaluation has found %r, only %s",
                *(self.metric, ", ".join(found)),
            )


def best_checkpointer(
    metric: str, model: nn.Module, folder: str, ema: EMAHook | None
) -> BestCheckpointer | None:
    """A hook that keeps the best weights, or the best average; None without a metric.

    Raises:
        ValueError: the metric is the average's, and there is none.
    """
    if not metric:
        return None
    of_average = metric.startswith("ema/")
    if of_average and ema is None:
        raise ValueError(f"the best {metric!r} needs an average of the weights: set its decay")
    checkpointer = Checkpointer(model, folder, tag=False)
    return BestCheckpointer(checkpointer, metric, ema.applied if of_average else nullcontext)


def save_average(ema: EMAHook, folder: str) -> None:
    """Write model_final_ema.pth."""
    with ema.applied():
        Checkpointer(ema.model, folder, tag=False).save("model_final_ema")


def first_step(trainer: TrainerBase, checkpointer: Checkpointer, max_iter: int) -> int:
    """Where training goes on, or 0 if it has not resumed.

    Raises:
        ValueError: behind its end.
    """
    start = trainer.iter + 1 if checkpointer.resumed else 0
    if start > max_iter:
        raise ValueError(
            f"the run in {checkpointer.save_dir} is at step {start}, but training is to end at "
            f"{max_iter} (train.max_iter, SOLVER.MAX_ITER)"
        )
    return start


@contextmanager
def saved_when_stopped(trainer: TrainerBase, checkpointer: Checkpointer) -> Iterator[None]:
    """A block of training, with a checkpoint of its last step if a signal ends it."""
    try:
        yield
    except Stopped:
        if trainer.iter < trainer.max_iter:  # else the last step has left model_final
            checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        comm.synchronize()  # before a process ends, and its launcher all others
        raise


class EpochHook(HookBase):
    """Logs the mean loss, the time and the time that is left whenever all images have been used.

    Args:
        num_images: of the training set.
        batch_size: of all processes together.
    """

    def __init__(self, num_images: int, batch_size: int):
        self.num_images, self.batch_size = num_images, batch_size

    def before_train(self) -> None:
        """Start to count."""
        self.start, self.losses = time.monotonic(), []

    def after_step(self) -> None:
        """Log if an epoch ends with this step, or training."""
        step, last = self.trainer.iter + 1, self.trainer.max_iter
        self.losses.append(self.trainer.storage.latest()["total_loss"][0])
        before, now, total = (self._epochs(count) for count in (step - 1, step, last))
        if int(before) == int(now) and step < last:
            return
        spent = time.monotonic() - self.start
        left = spent / (step - self.trainer.start_iter) * (last - step)
        logger.info(
            "After %.1f of %.1f epochs: mean loss %.4f, %s spent, %s left",
            *(now, total, np.mean(self.losses)),
            *(timedelta(seconds=int(seconds)) for seconds in (spent, left)),
        )
        self.losses = []

    def _epochs(self, steps: int) -> float:
        return steps * self.batch_size / self.num_images


class NoObjectsHook(HookBase):
    """Ends training that has never seen an object.

    Args:
        patience: iterations, from the first of this run, in which every loss of boxes is 0.

    Raises:
        RuntimeError: so it is.
    """

    def __init__(self, patience: int = 200):
        self.patience, self.waiting = patience, True

    def after_step(self) -> None:
        """Look at the losses, which are means over all processes."""
        losses = self.trainer.storage.latest().items()
        boxes = [value for name, (value, _) in losses if name.startswith("loss_bbox")]
        self.waiting = self.waiting and bool(boxes) and not any(boxes)
        if self.waiting and self.trainer.iter + 1 - self.trainer.start_iter >= self.patience:
            raise RuntimeError(
                f"in {self.patience} iterations, no object was matched: every loss of boxes was 0. "
                "The training images have no annotations that can be used. Look at the data set "
                "with `python -m dino_d2.tools.check_dataset`."
            )
