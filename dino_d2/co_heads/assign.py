"""Which box stands for which object: one-to-many assignment.

All give (A,) int64: the object of every box, `BACKGROUND` or `IGNORED`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ..transfer import to_device
from .boxes import centres_of
from .protocol import BACKGROUND, IGNORED


def assign_by_iou(
    boxes: Tensor,
    objects: Tensor,
    positive: float,
    negative: float,
    at_least: float | None = None,
) -> Tensor:
    """Boxes stand for the object that they overlap most (Faster R-CNN, sec. 3.1.2).

    Args:
        boxes, objects: (A, 4), (T, 4) corners.
        positive: from this IoU on.
        negative: background below this IoU; ignored between the two.
        at_least: every object with an IoU from here on also gets its best box, or boxes if there
            are equal ones; of several objects, the last takes a box. None for no such rule.
    """
    if not len(objects):
        return objects.new_full((len(boxes),), BACKGROUND, dtype=torch.int64)
    overlap = box_iou(objects, boxes)  # (T, A)
    best, matched = overlap.max(0)
    matched = matched.where(best >= positive, IGNORED)
    matched = matched.where(best >= negative, BACKGROUND)
    if at_least is None:
        return matched
    best_of_object = overlap.amax(1, keepdim=True)
    claimed = (overlap == best_of_object) & (best_of_object >= at_least)
    number = torch.arange(len(objects), device=boxes.device)[:, None]
    last = number.where(claimed, BACKGROUND).amax(0)
    return last.where(last >= 0, matched)


def assign_adaptively(levels: Sequence[Tensor], objects: Tensor, topk: int) -> Tensor:
    """Adaptive training sample selection (ATSS, algorithm 1).

    Candidates of an object are the `topk` boxes of every level with the nearest centres. Those
    stand for it whose IoU is at least the candidates' mean plus standard deviation, and whose
    centre lies within; of several objects, for that with the largest IoU.

    Args:
        levels: (A_l, 4) corners of every level.
        objects: (T, 4) corners.
    """
    boxes = torch.cat(list(levels))
    if not len(objects):
        return objects.new_full((len(boxes),), BACKGROUND, dtype=torch.int64)
    centres = centres_of(boxes)
    nearest, start = [], 0
    for level in levels:
        part = centres[start : start + len(level)]
        distance = (part[:, None] - centres_of(objects)).pow(2).sum(-1).sqrt()  # (A_l, T)
        count = min(topk, len(level))
        nearest.append(distance.topk(count, 0, largest=False).indices + start)
        start += len(level)
    nearest = torch.cat(nearest)  # (C, T)
    overlap = box_iou(boxes, objects)  # (A, T)
    of_nearest = overlap.gather(0, nearest)
    threshold = of_nearest.mean(0) + of_nearest.std(0)
    margins = torch.cat([centres[nearest] - objects[:, :2], objects[:, 2:] - centres[nearest]], -1)
    stands = (of_nearest >= threshold) & (margins.amin(-1) > 0.01)
    best = torch.full_like(overlap, -1).scatter(0, nearest, of_nearest.where(stands, -1))
    best, matched = best.max(1)
    return matched.where(best >= 0, BACKGROUND)


def assign_by_size(
    levels: Sequence[Tensor], objects: Tensor, ranges: Sequence[float], radius: float
) -> Tensor:
    """Points near an object's centre stand for it, on the level of its size (FCOS, sec. 3.2, with
    the centre sampling of its later version).

    Args:
        levels: (A_l, 4) boxes of every level, all of one size, around its points.
        objects: (T, 4) corners.
        ranges: up to which distance to an object's farthest side, in pixels, a level is
            responsible; from that of the level before on.
        radius: how far from the centre points may lie, in eighths of their boxes.
    """
    points = torch.cat([centres_of(level) for level in levels])
    if not len(objects):
        return objects.new_full((len(points),), BACKGROUND, dtype=torch.int64)
    sizes = to_device([len(level) for level in levels], torch.int64, points.device)
    limits = [[0.0, *ranges[:-1]], list(ranges)]
    limits = to_device(limits, points.dtype, points.device)
    low, high = limits.repeat_interleave(sizes, 1, output_size=len(points))[..., None]
    reach = torch.cat([level[:, 2] - level[:, 0] for level in levels])[:, None] * radius / 8
    sides = torch.cat([points[:, None] - objects[:, :2], objects[:, 2:] - points[:, None]], -1)
    farthest = sides.amax(-1)
    near = (points[:, None] - centres_of(objects)).abs().amax(-1) < reach
    stands = near & (sides.amin(-1) > 0) & (farthest >= low) & (farthest <= high)
    area = (objects[:, 2:] - objects[:, :2]).prod(-1)
    smallest, matched = area.expand_as(farthest).where(stands, torch.inf).min(1)
    return matched.where(smallest.isfinite(), BACKGROUND)


def sample(matched: Tensor, number: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Random positives and negatives, in the order of the boxes.

    Args:
        matched: (A,) as assigned.
        number: of both together, at most.
        positive_fraction: positives are at most this part of it.

    Returns:
        (P,), (N,) indices.
    """
    positives = (matched >= 0).nonzero().squeeze(1)
    positives = random_subset(positives, int(number * positive_fraction)).sort().values
    negatives = (matched == BACKGROUND).nonzero().squeeze(1)
    negatives = random_subset(negatives, number - len(positives)).sort().values
    return positives, negatives


def random_subset(indices: Tensor, count: int) -> Tensor:
    """`count` of (n,) indices in random order; all, as they are, where there are not more."""
    if len(indices) <= count:
        return indices
    chosen = torch.randperm(len(indices), device=indices.device)[:count]
    return indices[chosen]
