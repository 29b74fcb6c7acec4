"""One criterion for everything supervised."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..box_ops import generalized_iou, iou
from ..types import Assignment, Predictions, Targets
from .federated import FederatedClasses
from .focal import quality_focal_loss, sigmoid_focal_loss


class Group(NamedTuple):
    """Predictions with the assignment that supervises them.

    Decoder layers, encoder proposals and denoising queries are all groups; whatever made the
    assignment, the same losses follow.
    """

    name: str  # appears in the names of the losses: "", "enc", "dn", ...
    predictions: Predictions
    targets: Targets
    assignment: Assignment
    normalizer: Tensor | float  # the number of objects that the sums are divided by
    weight: float = 1.0
    ignored: Tensor | None = None  # (B, Q) True: no loss, not even as background


class Criterion:
    """Focal loss of the classes, L1 and generalised IoU of the boxes, for every layer of a group.

    All queries that an assignment leaves out are background. Sums are divided by the group's
    normalizer, not by the number of queries (Deformable DETR, official code).

    Args:
        federated: limits the class loss to some classes, chosen anew in every call.
        quality: the score of a class is to be the IoU of the box instead of 1, by the quality focal
            loss (Co-DETR); gamma is its beta.
    """

    def __init__(
        self,
        class_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        giou_eps: float = 1e-6,
        federated: FederatedClasses | None = None,
        quality: bool = False,
    ):
        self.class_weight, self.box_weight, self.giou_weight = class_weight, box_weight, giou_weight
        self.alpha, self.gamma, self.giou_eps = alpha, gamma, giou_eps
        self.federated = federated
        self.quality = quality

    def __call__(self, groups: list[Group]) -> dict[str, Tensor]:
        """Weighted scalar losses by name: loss_{class,bbox,giou}[_group][_layer].

        The last layer of a group has no number, as in the logs of Detectron2 and detrex.
        """
        losses, counted = {}, None
        if self.federated is not None:
            labels = torch.cat([group.targets.labels for group in groups])
            counted = self.federated(labels, groups[0].predictions.logits.shape[-1])
        for group in groups:
            suffix = f"_{group.name}" if group.name else ""
            for kind, of_layers in self.of_layers(group, counted).items():
                *earlier, last = (of_layers * group.weight).unbind()
                losses[f"loss_{kind}{suffix}"] = last
                for layer, loss in enumerate(earlier):
                    losses[f"loss_{kind}{suffix}_{layer}"] = loss
        return losses

    def of_layers(self, group: Group, counted: Tensor | None = None) -> dict[str, Tensor]:
        """{class, bbox, giou}: (N,) each, with its own weight but not the group's.

        Args:
            counted: (K,) bool, the classes that the class loss counts; all by default.
        """
        targets = group.targets
        logits, boxes = (t.to(targets.boxes.dtype) for t in group.predictions)
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        image = group.assignment.image[None]  # (1, M), broadcasts against (N, M) or (1, M)
        query, target = group.assignment.query, group.assignment.target
        predicted = boxes[layer, image, query]  # (N, M, 4)
        wanted = targets.boxes[target].expand_as(predicted)
        scores = torch.zeros_like(logits)
        quality = iou(predicted.detach(), wanted) if self.quality else 1.0
        scores[layer, image, query, targets.labels[target]] = quality
        focal = self._focal(logits, scores)
        if counted is not None:
            focal = focal.masked_fill(~counted, 0)
        if group.ignored is not None:
            focal = focal.masked_fill(group.ignored[:, :, None], 0)
        distance = functional.l1_loss(predicted, wanted, reduction="none")
        overlap = generalized_iou(predicted, wanted, self.giou_eps)
        return {
            "class": self.class_weight * focal.flatten(1).sum(1) / group.normalizer,
            "bbox": self.box_weight * distance.flatten(1).sum(1) / group.normalizer,
            "giou": self.giou_weight * (1 - overlap).sum(1) / group.normalizer,
        }

    def _focal(self, logits: Tensor, scores: Tensor) -> Tensor:
        if self.quality:
            return quality_focal_loss(logits, scores, self.gamma)
        return sigmoid_focal_loss(logits, scores, self.alpha, self.gamma)
