"""DAB-DETR on one dense feature map, and on deformable attention."""

import copy

from detectron2.config import LazyCall as L

from dino_d2.d2 import DABDETR, DABDeformableDETR
from dino_d2.d2.backbones import build_resnet_dc5
from dino_d2.models import build_dab_deformable_detr, build_dab_detr

from .dino_r50 import r50 as _r50

r50 = L(DABDETR)(
    detector=L(build_dab_detr)(backbone=copy.deepcopy(_r50), in_features=["res5"], num_classes=80),
)
dc5_r50 = copy.deepcopy(r50)
dc5_r50.detector.backbone = L(build_resnet_dc5)(depth=50)

deformable_r50 = L(DABDeformableDETR)(
    detector=L(build_dab_deformable_detr)(
        backbone=copy.deepcopy(_r50),
        in_features=["res3", "res4", "res5"],
        num_classes=80,
    ),
    num_detections=100,
)
