"""Hooks of training."""

import itertools
import logging
from collections.abc import Iterable

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..diagnostics.instability import instability
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
        # an iterator over a data loader draws from the global generator
        with torch.random.fork_rng(devices=()), autocast(self.model.device.type, self.precision):
            matched = [of_image for batch in self.loader for of_image in self.model.match(batch)]
        self.model.train(training)
        return matched
