"""One-to-one matching of predictions and objects (DETR, sec. 3.1)."""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..box_ops import generalized_iou
from ..errors import NonFiniteError
from ..types import Assignment, Predictions, Targets


class HungarianMatcher:
    """Finds, for every layer and image, the pairs of queries and objects that cost least together.

    The cost of a pair is the weighted sum of a focal cost of the object's class, the L1 distance of
    the boxes, and their negative generalised IoU (Deformable DETR, official code).

    All costs are computed on the device, each image only against its own objects, and copied to the
    host once for all layers, images and groups.
    """

    def __init__(
        self,
        class_cost: float = 2.0,
        box_cost: float = 5.0,
        giou_cost: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        giou_eps: float = 1e-6,
    ):
        self.class_cost, self.box_cost, self.giou_cost = class_cost, box_cost, giou_cost
        self.alpha, self.gamma, self.giou_eps = alpha, gamma, giou_eps

    @torch.no_grad()
    def __call__(
        self,
        matched: Mapping[str, tuple[Predictions, Targets]],
        checked: Mapping[str, Predictions] | None = None,
    ) -> dict[str, Assignment]:
        """Match every group of predictions with its targets.

        Args:
            matched: predictions and objects by group name; where an image has more objects than
                queries, some stay unmatched, with a warning.
            checked: further predictions that are only to be finite.

        Raises:
            NonFiniteError: logits or boxes of any given group are not finite.
        """
        everything = {name: predictions for name, (predictions, _) in matched.items()}
        everything.update(checked or {})
        flags = [_finite(predictions) for predictions in everything.values()]
        costs = [
            self.cost(predictions, targets, image)
            for predictions, targets in matched.values()
            for image in range(len(targets.counts))
        ]
        on_host = _copy_to_host([*flags, *costs])
        for name, flag in zip(everything, on_host, strict=False):
            _raise_if_not_finite(name, flag)
        on_host = iter(on_host[len(flags) :])
        assignments = {}
        for name, (_, targets) in matched.items():
            of_images = [next(on_host) for _ in targets.counts]
            assignments[name] = _solve(of_images, targets.counts, targets.labels.device)
        return assignments

    def cost(self, predictions: Predictions, targets: Targets, image: int) -> Tensor:
        """(N, Q, T): cost of each pair of a query and an object of this image."""
        start = sum(targets.counts[:image])
        labels = targets.labels[start : start + targets.counts[image]]
        boxes = targets.boxes[start : start + targets.counts[image]]
        probability = predictions.logits[:, image].to(boxes.dtype)[..., labels].sigmoid()
        positive = -self.alpha * (1 - probability) ** self.gamma * (probability + 1e-8).log()
        negative = -(1 - self.alpha) * probability**self.gamma * (1 - probability + 1e-8).log()
        predicted = predictions.boxes[:, image].to(boxes.dtype)
        distance = torch.cdist(predicted, boxes.expand(len(predicted), -1, -1), p=1)
        overlap = generalized_iou(predicted[:, :, None], boxes, self.giou_eps)
        class_part = self.class_cost * (positive - negative)
        return class_part + self.box_cost * distance - self.giou_cost * overlap


def _finite(predictions: Predictions) -> Tensor:
    """(2, N, B): 1 where all logits, all boxes of a layer and image are finite."""
    return torch.stack([t.isfinite().flatten(2).all(-1) for t in predictions])


def _copy_to_host(tensors: list[Tensor]) -> list[np.ndarray]:
    """One transfer for all of them."""
    dtype = torch.promote_types(torch.float32, tensors[-1].dtype)
    flat = torch.cat([tensor.flatten().to(dtype) for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    parts = np.split(flat, ends[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _raise_if_not_finite(name: str, flags: np.ndarray) -> None:
    if flags.all():
        return
    what, layer, image = np.argwhere(flags == 0)[0]
    layers = f"{name} layer {layer}" if flags.shape[1] > 1 else name
    raise NonFiniteError(int(image), layers, ("class scores", "boxes")[what])


def _solve(costs: list[np.ndarray], counts: tuple[int, ...], device: torch.device) -> Assignment:
    """costs: (N, Q, T) of every image."""
    num_layers = len(costs[0])
    images, queries, objects = [], [], []
    start = 0
    for image, (cost, count) in enumerate(zip(costs, counts, strict=True)):
        if count > cost.shape[1]:
            warnings.warn(
                f"an image has more objects than the {cost.shape[1]} queries: those that match "
                "worst are not learned from",
                stacklevel=2,
            )
        pairs = np.array([linear_sum_assignment(layer) for layer in cost])  # (N, 2, M of the image)
        images.append(np.full(pairs.shape[-1], image))
        queries.append(pairs[:, 0])
        objects.append(pairs[:, 1] + start)
        start += count
    rows = [np.concatenate(images)[None], np.concatenate(queries, 1), np.concatenate(objects, 1)]
    indices = torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(device, non_blocking=True)
    image, query, target = indices.split([1, num_layers, num_layers])
    return Assignment(image[0], query, target)
