"""A DINO in which something goes wrong, as $FAULT says: what, in which step and process."""

import os
import time

import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

from dino_d2.d2 import DINO


class FaultyDINO(DINO):
    """$FAULT is "what step process": loss, output, gradient, raise, exit or hang, or none."""

    steps = 0

    def forward(self, batched_inputs):
        what, step, rank = os.environ["FAULT"].split()
        now = self.training and self.steps == int(step) and comm.get_rank() == int(rank)
        self.steps += self.training
        if not now:
            return super().forward(batched_inputs)
        print(f"fault: {time.time()}", flush=True)
        if what == "hang":
            time.sleep(1e6)
        if what == "exit":
            os._exit(0)
        if what == "raise":
            raise RuntimeError("something else")
        if what == "output":
            self.detector.encoder.register_forward_hook(_first_row_nan)
        losses = super().forward(batched_inputs)
        name = "loss_class"
        if what == "loss":
            losses[name] = losses[name] * torch.nan
        if what == "gradient":  # a loss of 0, whose gradient is infinite
            losses[name] = losses[name] + (self.detector.encoder.level_embed * 0).abs().sqrt().sum()
        self.steps -= 1  # the step may be repeated, to find out more
        return losses


class SlowEvaluator(COCOEvaluator):
    """Its first process takes 10 seconds for the results."""

    def evaluate(self):
        time.sleep(10 if comm.is_main_process() else 0)
        return super().evaluate()


def _first_row_nan(_module, _inputs, output):
    return output._replace(tokens=output.tokens * torch.nan)
