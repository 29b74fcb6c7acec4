"""Co-Deformable-DETR: four scales, helped by Faster R-CNN and ATSS."""

import copy

from detectron2.config import LazyCall as L

from dino_d2.d2 import CoDETR
from dino_d2.models import build_co_deformable_base, build_co_detr

from .dino_r50 import IMAGENET, r50
from .swin import (
    BASE_384,
    LARGE_384,
    SMALL_224,
    TINY_224,
    swin_base_384,
    swin_large_384,
    swin_small_224,
    swin_tiny_224,
)

model = L(CoDETR)(
    detector=L(build_co_detr)(
        base=L(build_co_deformable_base)(
            backbone=r50,
            in_features=["res3", "res4", "res5"],
            num_classes="${..num_classes}",
        ),
        num_classes=80,
        co_heads={"faster_rcnn": {}, "atss": {}},
    ),
    num_detections=100,
)


def _with_swin(backbone, drop_path):
    swin = copy.deepcopy(model)
    swin.detector.base.backbone = backbone
    swin.detector.base.backbone.drop_path_rate = drop_path
    swin.detector.base.in_features = ["p1", "p2", "p3"]
    return swin


swin_tiny = _with_swin(swin_tiny_224, 0.2)
swin_small = _with_swin(swin_small_224, 0.2)
swin_base = _with_swin(swin_base_384, 0.2)
swin_large = _with_swin(swin_large_384, 0.3)
