"""Anchors, and boxes relative to them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..box_ops import generalized_iou, xyxy_to_cxcywh
from ..transfer import to_device

_MAX_LOG_SCALE = math.log(1000 / 16)  # sides grow at most by this factor (Fast R-CNN's code)


class Anchors:
    """Boxes around every cell's upper left corner (i * stride), as mmdetection has them.

    Args:
        strides: of the maps, in pixels.
        scale: side of the smallest square anchor, in strides.
        scales_per_octave: sides per doubling (RetinaNet, sec. 4).
        ratios: height / width.
    """

    def __init__(
        self,
        strides: Sequence[int],
        scale: float,
        scales_per_octave: int = 1,
        ratios: Sequence[float] = (1.0,),
    ):
        self.strides = tuple(strides)
        sides = [scale * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
        shapes = [(s / math.sqrt(r), s * math.sqrt(r)) for r in ratios for s in sides]
        self.corners = [(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes]  # in strides
        self.per_cell = len(shapes)

    def __call__(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Corners (h * w * A, 4) in pixels for every map, row by row, A anchors to a cell.

        Raises:
            ValueError: the number of maps is not that of the strides.
        """
        if len(maps) != len(self.strides):
            raise ValueError(f"{len(maps)} maps for anchors of {len(self.strides)} strides")
        placed = []
        for feature, stride in zip(maps, self.strides, strict=True):
            dtype = torch.float64 if feature.dtype == torch.float64 else torch.float32
            height, width = feature.shape[-2:]
            x = torch.arange(width, device=feature.device, dtype=dtype)
            y = torch.arange(height, device=feature.device, dtype=dtype)
            cells = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (h w, 2)
            corners = to_device(self.corners, dtype, feature.device)
            boxes = (cells.repeat(1, 2)[:, None] + corners) * stride  # (h w, A, 4)
            placed.append(boxes.flatten(0, 1))
        return placed

    def inside(self, maps: Sequence[Tensor], image_size: tuple[int, int]) -> list[Tensor]:
        """Indices, for every map, of anchors whose cells begin within the image (width, height).

        They count the anchors of all maps. The host knows their number, so nothing waits for the
        device.
        """
        found, start = [], 0
        for feature, stride in zip(maps, self.strides, strict=True):
            height, width = feature.shape[-2:]
            columns, rows = (math.ceil(side / stride) for side in image_size)
            x = torch.arange(min(columns, width), device=feature.device)
            y = torch.arange(min(rows, height), device=feature.device)
            cells = (y[:, None] * width + x).flatten()
            of_cell = torch.arange(self.per_cell, device=feature.device)
            found.append((cells[:, None] * self.per_cell + of_cell).flatten() + start)
            start += height * width * self.per_cell
        return found


class DeltaCoder:
    """Boxes as shifts and logarithmic scales of anchors (R-CNN, appendix C), divided by `stds`."""

    def __init__(self, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)):
        self.stds = tuple(stds)

    def encode(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """(..., 4) corners of both -> (..., 4)"""
        (centre, size), (wanted_centre, wanted_size) = _parts(anchors), _parts(boxes)
        deltas = torch.cat([(wanted_centre - centre) / size, (wanted_size / size).log()], -1)
        return deltas / to_device(self.stds, deltas.dtype, deltas.device)

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """(..., 4) corners and (..., 4) deltas -> corners"""
        centre, size = _parts(anchors)
        stds = to_device(self.stds, deltas.dtype, deltas.device)
        shift, scale = (deltas * stds).split(2, -1)
        centre = centre + shift * size
        half = size * scale.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE).exp() / 2
        return torch.cat([centre - half, centre + half], -1)


class DistanceCoder:
    """Boxes as logarithms of the distances to their four sides from an anchor's centre, in strides
    (FCOS, sec. 3.2).

    Args:
        scale: the anchors' side in strides.
    """

    def __init__(self, scale: float):
        self.scale = scale

    def decode(self, anchors: Tensor, distances: Tensor) -> Tensor:
        """(..., 4) corners and (..., 4) left, top, right, bottom -> corners"""
        centre, size = _parts(anchors)
        reach = distances.exp() * torch.cat([size, size], -1) / self.scale
        return torch.cat([centre - reach[..., :2], centre + reach[..., 2:]], -1)


def overlap_loss(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """1 - generalised IoU of pairs: (..., 4) corners of both -> (...), without waiting for the
    device as torchvision's does.
    """
    return 1 - generalized_iou(xyxy_to_cxcywh(boxes_a), xyxy_to_cxcywh(boxes_b), eps=1e-7)


def centres_of(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 2)"""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def clip(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """(..., 4) corners, cut off at the image's (width, height)."""
    width, height = image_size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x, y], -1).flatten(-2)


def _parts(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return centres_of(boxes), boxes[..., 2:] - boxes[..., :2]
