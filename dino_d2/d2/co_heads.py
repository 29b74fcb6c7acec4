"""Heads written for Detectron2, as co-heads of Co-DETR.

```
co_heads={"detectron2_dense": {"detector": L(RetinaNet)(backbone=None, head=..., ...)}}
```

The wrapped heads keep their own losses, assignment and thresholds.
"""

from collections.abc import Sequence

import torch
from detectron2.config import instantiate
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..co_heads import BACKGROUND, CO_HEADS, IGNORED, Candidates, Objects
from ..types import Detections


class DenseCoHead(nn.Module):
    """A `DenseDetector` such as Detectron2's RetinaNet or FCOS, without its backbone.

    Args:
        embed_dim, num_classes, strides: of the maps; the detector has to be made for them.
        detector: a module, or a config of one; its `head`, `anchor_generator`, `label_anchors` and
            losses are used.
    """

    def __init__(
        self, embed_dim: int, num_classes: int, strides: Sequence[int], detector: DenseDetector
    ):
        super().__init__()
        detector = instantiate(detector)
        _check_classes(detector.num_classes, num_classes)
        self.detector = detector
        self.detector.backbone = nn.Identity()

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects],
    ) -> tuple[dict[str, Tensor], list[Candidates]]:
        """See `CoHead`."""
        images, instances, maps = (
            _images(maps, image_sizes),
            _instances(objects, image_sizes),
            [*maps],
        )
        losses = self.detector.forward_training(images, maps, self.detector.head(maps), instances)
        anchors = self.detector.anchor_generator(maps)
        labels, boxes = self.detector.label_anchors(anchors, instances)  # as the losses did
        joined = Boxes.cat(anchors).tensor
        tokens = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
        num_classes = self.detector.num_classes
        return _by_kind(losses), [
            Candidates(joined, _matched(*of_image, num_classes), features)
            for *of_image, features in zip(labels, boxes, objects, tokens, strict=True)
        ]

    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """See `CoHead`."""
        maps = [*maps]
        found = self.detector.forward_inference(
            _images(maps, image_sizes), maps, self.detector.head(maps)
        )
        return list(map(_detections, found))


class ROICoHead(nn.Module):
    """A proposal generator and `StandardROIHeads` of Detectron2.

    Args:
        embed_dim, num_classes, strides: of the maps; the parts have to be made for them.
        proposal_generator, roi_heads: modules, or configs of them.
        names: what the parts call the maps, finest first, such as ["p2", ..., "p7"].
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        strides: Sequence[int],
        proposal_generator: nn.Module,
        roi_heads: StandardROIHeads,
        names: Sequence[str],
    ):
        super().__init__()
        proposal_generator, roi_heads = instantiate(proposal_generator), instantiate(roi_heads)
        _check_classes(roi_heads.num_classes, num_classes)
        if len(names) != len(strides):
            raise ValueError(f"{len(strides)} maps have the names {list(names)}")
        self.proposal_generator, self.roi_heads = proposal_generator, roi_heads
        self.names = tuple(names)

    def forward(
        self,
        maps: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects],
    ) -> tuple[dict[str, Tensor], list[Candidates]]:
        """See `CoHead`; features are means over the regions that the heads see."""
        images, features = _images(maps, image_sizes), self._named(maps)
        instances = _instances(objects, image_sizes)
        proposals, losses = self.proposal_generator(images, features, instances)
        sampled, of_regions = self.roi_heads(images, features, proposals, instances)
        boxes = [x.proposal_boxes for x in sampled]
        used = [features[name] for name in self.roi_heads.box_in_features]
        regions = self.roi_heads.box_pooler(used, boxes).mean((2, 3))
        parts = zip(sampled, objects, regions.split([len(b) for b in boxes]), strict=True)
        return _by_kind({**losses, **of_regions}), [
            Candidates(x.proposal_boxes.tensor, self._matched(x, known), of_image)
            for x, known, of_image in parts
        ]

    def _matched(self, sampled: Instances, known: Objects) -> Tensor:
        if not len(known.labels):
            return torch.full_like(sampled.gt_classes, BACKGROUND)
        boxes = sampled.gt_boxes.tensor
        return _matched(sampled.gt_classes, boxes, known, self.roi_heads.num_classes)

    def _named(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, maps, strict=True))

    def detect(
        self, maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """See `CoHead`."""
        images, features = _images(maps, image_sizes), self._named(maps)
        proposals, _ = self.proposal_generator(images, features)
        found, _ = self.roi_heads(images, features, proposals)
        return list(map(_detections, found))


def _by_kind(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("loss_"): loss for name, loss in losses.items()}


def _check_classes(given: int, wanted: int) -> None:
    if given != wanted:
        raise ValueError(f"the head has {given} classes, the detector {wanted}")


def _images(maps: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]) -> ImageList:
    """Sizes alone: Detectron2's heads do not look at the pixels."""
    return ImageList(maps[0], [(height, width) for width, height in image_sizes])


def _instances(
    objects: Sequence[Objects], image_sizes: Sequence[tuple[int, int]]
) -> list[Instances]:
    return [
        Instances((height, width), gt_boxes=Boxes(of_image.boxes), gt_classes=of_image.labels)
        for of_image, (width, height) in zip(objects, image_sizes, strict=True)
    ]


def _matched(labels: Tensor, boxes: Tensor, known: Objects, num_classes: int) -> Tensor:
    """Detectron2 says which box an anchor stands for; here it is the number of the object."""
    background = torch.full_like(labels, BACKGROUND)
    matched = background.where(labels >= 0, IGNORED)
    if not len(known.labels):
        return matched
    same = torch.cdist(boxes.to(known.boxes.dtype), known.boxes, p=1)
    same = same.masked_fill(labels[:, None] != known.labels, torch.inf)
    positive = (labels >= 0) & (labels < num_classes)
    return same.argmin(1).where(positive, matched)


def _detections(found: Instances) -> Detections:
    return Detections(found.scores, found.pred_classes, found.pred_boxes.tensor)


CO_HEADS.update({"detectron2_dense": DenseCoHead, "detectron2_roi": ROICoHead})
