"""Faster R-CNN (Ren et al., NeurIPS 2015) as a co-head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, roi_align

from ..transfer import to_device
from ..types import Detections
from .assign import assign_by_iou, sample
from .boxes import Anchors, DeltaCoder, clip, overlap_loss
from .dense import conv_block, to_rows
from .protocol import Candidates, Objects, wanted_of


class RegionProposals(nn.Module):
    """The region proposal network on all levels.

    Args:
        nms_threshold: of proposals on the same level.
        num_training, num_testing: (candidates of every level, proposals of an image).
    """

    def __init__(
        self,
        embed_dim: int,
        strides: Sequence[int],
        nms_threshold: float = 0.7,
        num_training: tuple[int, int] = (4000, 1000),
        num_testing: tuple[int, int] = (1000, 1000),
    ):
        super().__init__()
        self.anchors = Anchors(strides, 4, scales_per_octave=3, ratios=(0.5, 1.0, 2.0))
        self.coder = DeltaCoder()
        self.nms_threshold = nms_threshold
        self.num_training, self.num_testing = tuple(num_training), tuple(num_testing)
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.class_head = nn.Conv2d(embed_dim, self.anchors.per_cell, 1)
        self.box_head = nn.Conv2d(embed_dim, self.anchors.per_cell * 4, 1)
        for layer in (self.conv, self.class_head, self.box_head):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects] | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses "rpn_class" and "rpn_bbox", none without objects, and the proposals (P, 4) of
        every image, best first and without a gradient.
        """
        logits, deltas = [], []
        for feature in maps:
            hidden = self.conv(feature).relu()
            logits.append(to_rows(self.class_head(hidden), 1).squeeze(-1))
            deltas.append(to_rows(self.box_head(hidden), 4))
        levels = self.anchors(maps)
        losses = {}
        if objects is not None:
            anchors = torch.cat(levels)
            sampled = [
                self._sample(anchors, self.anchors.inside(maps, size), of_image)
                for size, of_image in zip(image_sizes, objects, strict=True)
            ]
            losses = self._losses(torch.cat(logits, 1), torch.cat(deltas, 1), anchors, sampled)
        counts = self.num_testing if objects is None else self.num_training
        with torch.no_grad():
            proposals = [
                self._propose(levels, [x[i] for x in logits], [x[i] for x in deltas], size, *counts)
                for i, size in enumerate(image_sizes)
            ]
        return losses, proposals

    def _sample(
        self, anchors: Tensor, inside: list[Tensor], objects: Objects
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positive and negative anchors (P,), (N,), and boxes (P, 4) of the former's objects."""
        where = torch.cat(inside)
        matched = assign_by_iou(anchors[where], objects.boxes, 0.7, 0.3, at_least=0.3)
        positives, negatives = sample(matched, 256, 0.5)
        return where[positives], where[negatives], objects.boxes[matched[positives]]

    def _losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, sampled: list[tuple]
    ) -> dict[str, Tensor]:
        """Means over the sampled anchors. logits (B, A), deltas (B, A, 4)."""
        errors, distances, count = [], [], 0
        for image, (positives, negatives, boxes) in enumerate(sampled):
            given = logits[image, torch.cat([positives, negatives])]
            wanted = torch.zeros_like(given)
            wanted[: len(positives)] = 1
            errors.append(
                functional.binary_cross_entropy_with_logits(given, wanted, reduction="sum")
            )
            wanted = self.coder.encode(anchors[positives], boxes)
            distances.append((deltas[image, positives] - wanted).abs().sum())
            count += max(len(positives), 1) + max(len(negatives), 1)
        return {"rpn_class": sum(errors) / count, "rpn_bbox": sum(distances) / count}

    def _propose(
        self,
        levels: list[Tensor],
        logits: list[Tensor],
        deltas: list[Tensor],
        size: tuple[int, int],
        per_level: int,
        per_image: int,
    ) -> Tensor:
        """The best boxes (P, 4) of one image; logits (A_l,), deltas (A_l, 4) of every level.

        Without any that has a size, as where weights are not finite, the whole image is one.
        """
        scores, boxes, numbers = [], [], []
        for number, (anchors, of_level, moves) in enumerate(
            zip(levels, logits, deltas, strict=True)
        ):
            best, chosen = of_level.topk(min(per_level, len(of_level)))
            scores.append(best)
            boxes.append(clip(self.coder.decode(anchors[chosen], moves[chosen]), size))
            numbers.append(torch.full_like(chosen, number))
        scores, boxes, numbers = map(torch.cat, (scores, boxes, numbers))
        real = (boxes[:, 2:] > boxes[:, :2]).all(1).nonzero().squeeze(1)
        if not len(real):
            return to_device([[0, 0, *size]], boxes.dtype, boxes.device)
        kept = batched_nms(boxes[real], scores[real], numbers[real], self.nms_threshold)
        return boxes[real[kept[:per_image]]]


class FasterRCNN(nn.Module):
    """Proposals, and a head that classifies and refines each from its region of the maps.

    The coarsest level gives proposals only.

    Args:
        num_convs, num_fcs: layers of the head, before its outputs.
        class_agnostic: one box for all classes instead of one each.
        box_stds: of the deltas, see `DeltaCoder`.
        proposals: options of `RegionProposals`.
    """

    region_size = 7
    num_detections = 100

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        strides: Sequence[int],
        num_convs: int = 0,
        num_fcs: int = 2,
        fc_dim: int = 1024,
        class_agnostic: bool = False,
        box_stds: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
        proposals: dict | None = None,
    ):
        super().__init__()
        self.num_classes, self.class_agnostic = num_classes, class_agnostic
        self.strides = tuple(strides[:-1])
        self.proposals = RegionProposals(embed_dim, strides, **(proposals or {}))
        self.coder = DeltaCoder(box_stds)
        self.convs = nn.Sequential(*(conv_block(embed_dim) for _ in range(num_convs)))
        dims = [embed_dim * self.region_size**2, *[fc_dim] * num_fcs]
        self.fcs = nn.ModuleList(map(nn.Linear, dims[:-1], dims[1:]))
        self.class_head = nn.Linear(dims[-1], num_classes + 1)  # the last is the background
        self.box_head = nn.Linear(dims[-1], 4 * (1 if class_agnostic else num_classes))
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer, std in ((self.class_head, 0.01), (self.box_head, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects],
    ) -> tuple[dict[str, Tensor], list[Candidates]]:
        """See `CoHead`: losses "rpn_class", "rpn_bbox", "class" and "giou"."""
        losses, proposals = self.proposals(maps, image_sizes, objects)
        boxes, matched = zip(*map(self._sample, proposals, objects), strict=True)
        regions = self._regions(maps, boxes)
        logits, deltas = self._score(regions)
        losses.update(self._losses(logits, deltas, boxes, matched, objects))
        features = regions.mean((2, 3)).split([len(b) for b in boxes])
        least = min(len(b) for b in boxes)  # as published, all images hand over equally many
        return losses, [
            Candidates(*(t[:least] for t in of_image))
            for of_image in zip(boxes, matched, features, strict=True)
        ]

    def _sample(self, proposals: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
        """512 boxes (R, 4), up to a quarter of them positives, and their objects (R,)."""
        boxes = torch.cat([objects.boxes, proposals])
        own = torch.arange(len(objects.boxes), device=boxes.device)
        matched = torch.cat([own, assign_by_iou(proposals, objects.boxes, 0.5, 0.5)])
        chosen = torch.cat(sample(matched, 512, 0.25))
        return boxes[chosen], matched[chosen]

    def _regions(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """(B, D, h, w) each, (R, 4) for every image -> (sum R, D, 7, 7), each from the level that
        fits its size (Feature Pyramid Networks, eq. 1).
        """
        joined = torch.cat(list(boxes))
        image = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        rows = torch.cat([image, joined], 1)
        sides = (joined[:, 2:] - joined[:, :2]).prod(1).sqrt()
        finest = 14 * self.strides[0]
        level = (sides / finest + 1e-6).log2().floor().clamp(0, len(self.strides) - 1)
        dtype = torch.promote_types(maps[0].dtype, torch.float32)  # of coordinates, above all
        regions = rows.new_zeros(len(rows), maps[0].shape[1], *[self.region_size] * 2, dtype=dtype)
        for number, (feature, stride) in enumerate(zip(maps, self.strides, strict=False)):
            chosen = (level == number).nonzero().squeeze(1)
            with torch.autocast(feature.device.type, enabled=False):
                pooled = roi_align(
                    feature.to(dtype),
                    rows[chosen].to(dtype),
                    self.region_size,
                    1 / stride,
                    aligned=True,
                )
            regions = regions.index_copy(0, chosen, pooled)
        return regions

    def _score(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(R, D, 7, 7) -> logits (R, K + 1) and deltas (R, K or 1, 4), at least float32."""
        hidden = self.convs(regions).flatten(1)
        for layer in self.fcs:
            hidden = layer(hidden).relu()
        logits, deltas = self.class_head(hidden), self.box_head(hidden).unflatten(1, (-1, 4))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(dtype), deltas.to(dtype)

    def _losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        boxes: Sequence[Tensor],
        matched: Sequence[Tensor],
        objects: Sequence[Objects],
    ) -> dict[str, Tensor]:
        """Means over all sampled regions; the generalised IoU counts tenfold."""
        image = torch.cat([torch.full_like(m, i) for i, m in enumerate(matched)])
        joined, assigned = torch.cat(list(boxes)), torch.cat(list(matched))
        positive = (assigned >= 0).nonzero().squeeze(1)
        labels, wanted = wanted_of(objects, image[positive], assigned[positive])
        classes = torch.full_like(assigned, self.num_classes)
        classes[positive] = labels
        moves = deltas[positive, 0 if self.class_agnostic else labels]
        predicted = self.coder.decode(joined[positive], moves)
        misfit = overlap_loss(predicted, wanted).sum()
        return {
            "class": functional.cross_entropy(logits, classes),
            "giou": 10 * misfit / len(joined),
        }

    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """See `CoHead`: the 100 best after suppression of duplicates within each class."""
        _, proposals = self.proposals(maps, image_sizes)
        logits, deltas = self._score(self._regions(maps, proposals))
        counts = [len(p) for p in proposals]
        parts = zip(proposals, logits.split(counts), deltas.split(counts), image_sizes, strict=True)
        return [self._detect(*of_image) for of_image in parts]

    def _detect(
        self, proposals: Tensor, logits: Tensor, deltas: Tensor, size: tuple[int, int]
    ) -> Detections:
        scores = logits.softmax(-1)[:, :-1]  # (P, K)
        boxes = clip(self.coder.decode(proposals[:, None], deltas), size).expand(*scores.shape, 4)
        labels = torch.arange(self.num_classes, device=scores.device).expand_as(scores)
        boxes, scores, labels = boxes.flatten(0, 1), scores.flatten(), labels.flatten()
        kept = batched_nms(boxes, scores, labels, 0.5)[: self.num_detections]
        return Detections(scores[kept], labels[kept], boxes[kept])
