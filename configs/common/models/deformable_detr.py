"""Deformable DETR."""

import copy

from detectron2.config import LazyCall as L

from dino_d2.d2 import DeformableDETR
from dino_d2.models import build_deformable_detr

from .dino_r50 import r50 as _r50

r50 = L(DeformableDETR)(
    detector=L(build_deformable_detr)(
        backbone=copy.deepcopy(_r50),
        in_features=["res3", "res4", "res5"],
        num_classes=80,
    ),
    num_detections=100,
)
