"""Hooks of training."""

import logging
from collections.abc import Iterable

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..diagnostics.instability import instability

logger = logging.getLogger("detectron2.dino_d2")


class InstabilityHook(HookBase):
    """Matches a set of images every so often and logs by how much the matching has changed since.

    Writes "instability", the IS of DN-DETR's paper, beside the other metrics, from the second time
    on.

    Args:
        period: iterations; it also runs after the last one.
        model: a `DetrMetaArch`, or its wrapper for distributed training.
        loader: batches with annotations, always the same images in the same order.
    """

    def __init__(self, period: int, model: nn.Module, loader: Iterable):
        self.period, self.model, self.loader = period, getattr(model, "module", model), loader
        self.before: list[np.ndarray] | None = None  # also [] in a process without images

    def after_step(self) -> None:
        """Run if it is time."""
        following = self.trainer.iter + 1
        last = following == self.trainer.max_iter
        if last or (self.period > 0 and following % self.period == 0):
            self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        training = self.model.training
        self.model.eval()
        after = [self.model.match(batch) for batch in self.loader]
        self.model.train(training)
        if self.before is not None:
            pairs = zip(self.before, after, strict=True)
            found = [(instability(*pair), len(pair[0])) for pair in pairs]
            found = [result for of_process in comm.all_gather(found) for result in of_process]
            values, images = zip(*found, strict=True)
            value = float(np.average(values, weights=images))
            self.trainer.storage.put_scalar("instability", value, smoothing_hint=False)
            logger.info("Instability of the matching: %.2f", value)
        self.before = after
