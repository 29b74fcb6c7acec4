"""From predictions to detections."""

import torch
from torch import Tensor

from .box_ops import cxcywh_to_xyxy
from .types import Detections, Predictions


def postprocess(predictions: Predictions, image_sizes: Tensor, num_detections: int) -> Detections:
    """The best (query, class) pairs of the last layer; no suppression of duplicates.

    A query may yield several detections of different classes, as published.

    Args:
        predictions: of B images.
        image_sizes: (B, 2) height and width in pixels that boxes are scaled to.
        num_detections: k, at most; fewer where there are fewer pairs.
    """
    logits = predictions.logits[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype).sigmoid()  # (B, Q, K)
    num_classes = scores.shape[-1]
    count = min(num_detections, scores.shape[1] * num_classes)
    scores, pairs = scores.flatten(1).topk(count, 1)
    query = (pairs // num_classes).unsqueeze(-1).expand(-1, -1, 4)
    boxes = cxcywh_to_xyxy(predictions.boxes[-1].gather(1, query))
    height, width = image_sizes.to(boxes.dtype).unbind(1)
    scale = torch.stack([width, height, width, height], 1)
    return Detections(scores, pairs % num_classes, boxes * scale.unsqueeze(1))
