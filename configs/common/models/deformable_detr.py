"""Deformable DETR."""

import copy

from detectron2.config import LazyCall as L

from dino_d2.d2 import DeformableDETR
from dino_d2.models import build_deformable_detr

from .dino_r50 import model as _dino

r50 = L(DeformableDETR)(
    detector=L(build_deformable_detr)(
        backbone=copy.deepcopy(_dino.detector.backbone),
        in_features=["res3", "res4", "res5"],
        num_classes=80,
    ),
    num_detections=100,
)
