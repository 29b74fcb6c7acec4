"""The one place that knows box formats and their arithmetic."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> centre and size; crossed corners give a negative size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def inverse_sigmoid(probability: Tensor, eps: float = 1e-3) -> Tensor:
    """log(p / (1 - p)) with both sides of the fraction clamped to at least `eps`.

    The eps is that of DINO's official code; it limits the result to about +-6.9.
    """
    probability = probability.clamp(0, 1)
    return (probability.clamp(min=eps) / (1 - probability).clamp(min=eps)).log()


def iou(boxes_a: Tensor, boxes_b: Tensor, eps: float = 1e-6) -> Tensor:
    """Intersection over union in [0, 1].

    Args:
        boxes_a, boxes_b: cxcywh, of shapes that broadcast to (..., 4).
        eps: the union is at least that. Co-DETR's value counts: relative boxes of less than a
            millionth of the image get less than their IoU.
    """
    intersection, union, _ = _areas(boxes_a, boxes_b)
    return intersection / union.clamp(min=eps)


def generalized_iou(boxes_a: Tensor, boxes_b: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019, algorithm 1) in (-1, 1].

    Args:
        boxes_a, boxes_b: cxcywh, of shapes that broadcast to (..., 4); unsqueeze for all pairs.
        eps: added to both denominators. DINO's value counts: of boxes a thousandth of the image
            wide it takes several percent off the IoU. Keep it to reproduce published results.
    """
    intersection, union, enclosing = _areas(boxes_a, boxes_b)
    return intersection / (union + eps) - (enclosing - union) / (enclosing + eps)


def _areas(boxes_a: Tensor, boxes_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of the intersection, of the union, and of the box around both."""
    a, b = cxcywh_to_xyxy(boxes_a), cxcywh_to_xyxy(boxes_b)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(
        min=0
    )
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(
        min=0
    )
    intersection, enclosing = overlap.prod(-1), hull.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return intersection, union, enclosing
