"""The federated loss: for data sets whose images are labelled for some of the classes only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..transfer import to_device


class FederatedClasses:
    """Chooses the classes of a batch that the class loss counts (Zhou et al., Probabilistic
    two-stage detection, 2021: federated loss).

    In LVIS an image without a label of a rare class may well show one. So all classes of the
    batch's objects count, and others drawn by their frequency, without replacement, until there are
    `num_classes` together; the rest has no loss in this step.

    Args:
        weights: (K,) what the chance of each class to be drawn is proportional to, for example the
            square root of the number of images with it.
        num_classes: how many classes to choose; all with objects count even if they are more.

    Raises:
        ValueError: a weight is negative or not finite, or none is positive.
    """

    def __init__(self, weights: Sequence[float], num_classes: int = 50):
        self.weights = [float(weight) for weight in weights]
        self.num_classes = num_classes
        if not all(0 <= w < torch.inf for w in self.weights) or not any(self.weights):
            raise ValueError("weights of classes must be finite, not negative, and some positive")

    def __call__(self, labels: Tensor, num_classes: int) -> Tensor:
        """(K,) bool, on the device of the labels and without waiting for it.

        Args:
            labels: (M,) classes of all objects of the batch.
            num_classes: K.

        Raises:
            ValueError: K is not the number of weights.
        """
        if num_classes != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights for {num_classes} classes")
        weights = to_device(self.weights, torch.float32, labels.device)
        # The largest of log w + Gumbel noise are a draw without replacement.
        noise = torch.empty_like(weights).exponential_()
        keys = (weights.log() - noise.log()).masked_fill(weights == 0, -torch.inf)
        present = torch.zeros_like(weights, dtype=torch.bool).index_fill(0, labels, True)
        keys = keys.masked_fill(present, torch.inf)
        best = keys.topk(min(self.num_classes, num_classes)).indices
        drawn = torch.zeros_like(present).index_fill(0, best, True)
        return present | (drawn & (weights > 0))
