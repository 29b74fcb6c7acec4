"""From predictions to detections."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from .box_ops import cxcywh_to_xyxy
from .types import Detections, Predictions


def postprocess(
    predictions: Predictions, image_sizes: Tensor, num_detections: int, clip: bool = False
) -> Detections:
    """The best (query, class) pairs of the last layer; duplicates stay; see `Suppression`.

    A query may yield several detections of different classes, as published.

    Args:
        predictions: of B images.
        image_sizes: (B, 2) height and width in pixels that boxes are scaled to.
        num_detections: k, at most; fewer where there are fewer pairs.
        clip: cut boxes off at the image's border.
    """
    logits = predictions.logits[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype).sigmoid()  # (B, Q, K)
    num_classes = scores.shape[-1]
    count = min(num_detections, scores.shape[1] * num_classes)
    scores, pairs = scores.flatten(1).topk(count, 1)
    query = (pairs // num_classes).unsqueeze(-1).expand(-1, -1, 4)
    boxes = cxcywh_to_xyxy(predictions.boxes[-1].gather(1, query))
    if clip:
        boxes = boxes.clamp(0, 1)
    height, width = image_sizes.to(boxes.dtype).unbind(1)
    scale = torch.stack([width, height, width, height], 1)
    return Detections(scores, pairs % num_classes, boxes * scale.unsqueeze(1))


class Suppression:
    """Removes duplicates among the detections of an image, class by class.

    DETR's detectors need none; published results of Co-DETR have it. "nms" drops a box that
    overlaps a better one by more than the threshold, "soft_nms" multiplies its score by 1 - IoU for
    every better one that it overlaps by at least that (Bodla et al., ICCV 2017, eq. 2).

    Args:
        kind: "nms" or "soft_nms".
        iou_threshold: see above.
        min_score: soft suppression drops what falls below this.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str = "soft_nms", iou_threshold: float = 0.8, min_score: float = 1e-3):
        if kind not in ("nms", "soft_nms"):
            raise ValueError(f"kind must be 'nms' or 'soft_nms', but is {kind!r}")
        self.kind, self.iou_threshold, self.min_score = kind, iou_threshold, min_score

    def __call__(self, detections: Detections) -> Detections:
        """Those of one image that stay, best first: scores (k,), labels (k,), boxes (k, 4)."""
        scores, labels, boxes = detections
        if self.kind == "nms":
            kept = batched_nms(boxes, scores, labels, self.iou_threshold)
            return Detections(scores[kept], labels[kept], boxes[kept])
        kept, scores = _soft_nms(detections, self.iou_threshold, self.min_score)
        return Detections(scores, labels[kept], boxes[kept])


def _soft_nms(
    detections: Detections, iou_threshold: float, min_score: float
) -> tuple[Tensor, Tensor]:
    """Indices (k,) in the order in which they are best, and their scores then."""
    scores, labels, boxes = (tensor.cpu() for tensor in detections)  # one small step after another
    scores = scores.clone()
    overlap = box_iou(boxes, boxes) * (labels[:, None] == labels)
    factors = (1 - overlap).where(overlap >= iou_threshold, 1)
    kept, left = [], []
    for _ in range(len(scores)):
        best = int(scores.argmax())
        score = float(scores[best])
        if kept and score < min_score:
            break
        kept.append(best)
        left.append(score)
        scores = scores * factors[best]
        scores[best] = -1
    device = detections.boxes.device
    return torch.tensor(kept, dtype=torch.int64, device=device), detections.scores.new_tensor(left)
