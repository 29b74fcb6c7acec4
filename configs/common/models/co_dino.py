"""Co-DINO: DINO with five scales, helped by Faster R-CNN and ATSS."""

import copy

from detectron2.config import LazyCall as L

from dino_d2.backbones import build_eva02
from dino_d2.d2 import CoDETR
from dino_d2.models import build_co_detr, build_co_dino_base
from dino_d2.postprocess import Suppression

from .dino_r50 import IMAGENET, r50
from .swin import LARGE_384, swin_large_384

# What starts afresh for other classes.
CLASS_WEIGHTS = [
    "*heads.class_heads.*",
    "*query_source.class_head.*",
    "*denoising.label_embed.*",
    "*faster_rcnn.class_head.*",
    "*faster_rcnn.box_head.*",
    "*atss.towers.class_head.*",
]

model = L(CoDETR)(
    detector=L(build_co_detr)(
        base=L(build_co_dino_base)(
            backbone=r50,
            in_features=["res2", "res3", "res4", "res5"],
            num_classes="${..num_classes}",
            encoder_layers=6,
        ),
        num_classes=80,
        co_heads={"faster_rcnn": {}, "atss": {}},
    ),
    num_detections=300,
    suppression=L(Suppression)(kind="soft_nms", iou_threshold=0.8),
)

swin_large = copy.deepcopy(model)
swin_large.detector.base.backbone = swin_large_384
swin_large.detector.base.backbone.drop_path_rate = 0.3
swin_large.detector.base.backbone.out_indices = (0, 1, 2, 3)
swin_large.detector.base.in_features = ["p0", "p1", "p2", "p3"]

# As after training on Objects365.
swin_large_o365 = copy.deepcopy(swin_large)
swin_large_o365.detector.base.denoising_queries = 1000
swin_large_o365.detector.base.box_noise = 0.4

vit_large = copy.deepcopy(model)
vit_large.detector.base.backbone = L(build_eva02)()
vit_large.detector.base.in_features = [f"stride{stride}" for stride in (4, 8, 16, 32, 64)]
vit_large.detector.base.project = False
vit_large.detector.base.num_queries = 1500
vit_large.detector.base.denoising_queries = 600
vit_large.detector.base.box_noise = 0.4
vit_large.detector.co_heads.faster_rcnn = dict(
    num_convs=4, num_fcs=1, class_agnostic=True, box_stds=[0.05, 0.05, 0.1, 0.1]
)
vit_large.num_detections = 1000
