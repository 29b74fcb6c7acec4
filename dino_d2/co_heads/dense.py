"""Dense co-heads: every cell of every map scores classes and finds a box."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, sigmoid_focal_loss

from ..processes import average_over_processes
from ..types import Detections
from .boxes import Anchors, DeltaCoder, DistanceCoder, centres_of, clip, overlap_loss
from .protocol import BACKGROUND, IGNORED, Candidates, Objects, wanted_of

_PRIOR = 0.01  # of an object at an anchor, before training (RetinaNet, sec. 4.1)


class DenseOutputs(NamedTuple):
    """What the towers say about all A anchors of B images."""

    logits: Tensor  # (B, A, K)
    deltas: Tensor  # (B, A, 4), for the head's coder
    centerness: Tensor | None  # (B, A) logits


class Towers(nn.Module):
    """Convolutions for classes and for boxes, shared by all levels.

    Args:
        per_cell: anchors.
        num_levels: each has a learned scale of the boxes.
        num_convs: of each tower; one is as good as more (Co-DETR, table 9).
        centerness: whether to judge how central the anchor is in the object (FCOS, sec. 3.3).
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        per_cell: int,
        num_levels: int,
        num_convs: int,
        centerness: bool,
    ):
        super().__init__()
        self.class_tower = nn.Sequential(*(conv_block(embed_dim) for _ in range(num_convs)))
        self.box_tower = nn.Sequential(*(conv_block(embed_dim) for _ in range(num_convs)))
        self.class_head = nn.Conv2d(embed_dim, per_cell * num_classes, 3, padding=1)
        self.box_head = nn.Conv2d(embed_dim, per_cell * 4, 3, padding=1)
        self.centerness_head = nn.Conv2d(embed_dim, per_cell, 3, padding=1) if centerness else None
        self.scales = nn.ParameterList(torch.ones(()) for _ in range(num_levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.class_head.bias, -math.log((1 - _PRIOR) / _PRIOR))
        self.num_classes = num_classes

    def forward(self, maps: Sequence[Tensor]) -> DenseOutputs:
        """maps: (B, D, h, w) each. The outputs are at least float32."""
        logits, deltas, centerness = [], [], []
        for feature, scale in zip(maps, self.scales, strict=True):
            of_box = self.box_tower(feature)
            logits.append(to_rows(self.class_head(self.class_tower(feature)), self.num_classes))
            deltas.append(to_rows(self.box_head(of_box), 4) * scale)
            if self.centerness_head is not None:
                centerness.append(to_rows(self.centerness_head(of_box), 1).squeeze(-1))
        joined = torch.cat(centerness, 1) if centerness else None
        return DenseOutputs(torch.cat(logits, 1), torch.cat(deltas, 1), joined)


class DenseHead(nn.Module):
    """A dense head: focal loss of the classes, generalised IoU of the boxes, centerness.

    ATSS, RetinaNet and FCOS differ in their anchors and in who stands for an object.

    Args:
        towers: score the anchors.
        anchors: their places.
        coder: turns the towers' deltas into boxes.
        assign: (levels, objects) -> which anchor stands for which object, see `assign`.
        pad_with_outside: negative queries may also come from anchors outside the image, as boxes of
            no size. Published, by accident of the code; it changes numbers slightly.
    """

    nms_threshold = 0.6
    num_candidates = 1000  # of every level, before suppression
    num_detections = 100

    def __init__(
        self,
        towers: Towers,
        anchors: Anchors,
        coder: DeltaCoder | DistanceCoder,
        assign: Callable[[list[Tensor], Tensor], Tensor],
        pad_with_outside: bool = True,
    ):
        super().__init__()
        self.towers, self.anchors, self.coder = towers, anchors, coder
        self.assign = assign
        self.pad_with_outside = pad_with_outside

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects],
    ) -> tuple[dict[str, Tensor], list[Candidates]]:
        """See `CoHead`: losses "class", "giou" and, if there is one, "centerness"."""
        outputs = self.towers(maps)
        anchors = torch.cat(self.anchors(maps))
        matched = torch.stack(
            [
                self._match(anchors, self.anchors.inside(maps, size), of_image.boxes)
                for size, of_image in zip(image_sizes, objects, strict=True)
            ]
        )
        features = torch.cat([feature.flatten(2) for feature in maps], 2).transpose(1, 2)
        return self._losses(outputs, anchors, matched, objects), [
            self._hand_over(anchors, *of_image) for of_image in zip(matched, features, strict=True)
        ]

    def _match(self, anchors: Tensor, inside: list[Tensor], objects: Tensor) -> Tensor:
        """(A,), for all anchors; those outside the image are ignored."""
        found = self.assign([anchors[of_level] for of_level in inside], objects)
        matched = torch.full((len(anchors),), IGNORED, device=found.device)
        return matched.scatter(0, torch.cat(inside), found)

    def _losses(
        self, outputs: DenseOutputs, anchors: Tensor, matched: Tensor, objects: Sequence[Objects]
    ) -> dict[str, Tensor]:
        """anchors (A, 4), matched (B, A)."""
        image, anchor = (matched >= 0).nonzero().unbind(1)  # (P,)
        labels, boxes = wanted_of(objects, image, matched[image, anchor])
        count = (matched >= 0).sum(1).clamp(min=1).sum()
        normalizer = average_over_processes(count.to(anchors.dtype))
        scores = torch.zeros_like(outputs.logits)
        scores[image, anchor, labels] = 1
        focal = sigmoid_focal_loss(outputs.logits, scores, 0.25, 2.0)
        focal = focal.masked_fill((matched == IGNORED)[..., None], 0)
        predicted = self.coder.decode(anchors[anchor], outputs.deltas[image, anchor])
        misfit = overlap_loss(predicted, boxes)
        losses = {"class": focal.sum() / normalizer}
        if outputs.centerness is None:
            return {**losses, "giou": 2 * misfit.sum() / normalizer}
        wanted = centerness_of(centres_of(anchors[anchor]), boxes)
        losses["giou"] = 2 * (misfit * wanted).sum() / average_over_processes(wanted.sum())
        given = outputs.centerness[image, anchor]
        error = functional.binary_cross_entropy_with_logits(given, wanted, reduction="sum")
        return {**losses, "centerness": error / normalizer}

    def _hand_over(self, anchors: Tensor, matched: Tensor, features: Tensor) -> Candidates:
        if not self.pad_with_outside:
            return Candidates(anchors, matched, features)
        ignored = matched == IGNORED
        anchors = anchors.masked_fill(ignored[:, None], 0)
        return Candidates(anchors, matched.masked_fill(ignored, BACKGROUND), features)

    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """See `CoHead`: the 100 best after suppression of duplicates within each class."""
        outputs, levels = self.towers(maps), self.anchors(maps)
        return [
            self._detect(outputs, levels, image, size) for image, size in enumerate(image_sizes)
        ]

    def _detect(
        self, outputs: DenseOutputs, levels: list[Tensor], image: int, size: tuple[int, int]
    ) -> Detections:
        num_classes = outputs.logits.shape[-1]
        scores, labels, boxes, start = [], [], [], 0
        for anchors in levels:
            part = slice(start, start + len(anchors))
            start += len(anchors)
            best = outputs.logits[image, part].flatten().sigmoid()
            best, pairs = best.topk(min(self.num_candidates, len(best)))
            anchor = pairs // num_classes
            if outputs.centerness is not None:
                best = best * outputs.centerness[image, part][anchor].sigmoid()
            found = self.coder.decode(anchors[anchor], outputs.deltas[image, part][anchor])
            scores.append(best)
            labels.append(pairs % num_classes)
            boxes.append(clip(found, size))
        scores, labels, boxes = map(torch.cat, (scores, labels, boxes))
        kept = batched_nms(boxes, scores, labels, self.nms_threshold)[: self.num_detections]
        return Detections(scores[kept], labels[kept], boxes[kept])


def centerness_of(points: Tensor, boxes: Tensor) -> Tensor:
    """How central points (P, 2) are in their boxes (P, 4): 1 in the middle, 0 at a side (FCOS,
    eq. 3).
    """
    low, high = points - boxes[:, :2], boxes[:, 2:] - points
    return (torch.minimum(low, high) / torch.maximum(low, high)).prod(1).sqrt()


def to_rows(outputs: Tensor, size: int) -> Tensor:
    """(B, A * n, h, w) -> (B, h * w * A, n), at least float32"""
    rows = outputs.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, size))
    return rows if rows.dtype == torch.float64 else rows.float()


def conv_block(embed_dim: int) -> nn.Sequential:
    """3x3 convolution, GroupNorm, ReLU"""
    convolution = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(32, embed_dim), nn.ReLU())
