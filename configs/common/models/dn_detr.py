"""DN-DETR on one dense feature map, with a deformable encoder, and on deformable attention."""

import copy

from detectron2.config import LazyCall as L

from dino_d2.d2 import DNDETR
from dino_d2.d2.backbones import build_resnet_dc5
from dino_d2.models import build_dn_detr

from .dino_r50 import r50 as _r50

r50 = L(DNDETR)(
    detector=L(build_dn_detr)(backbone=copy.deepcopy(_r50), in_features=["res5"], num_classes=80),
)
dc5_r50 = copy.deepcopy(r50)
dc5_r50.detector.backbone = L(build_resnet_dc5)(depth=50)

deformable_encoder_r50 = copy.deepcopy(r50)
deformable_encoder_r50.detector.in_features = ["res3", "res4", "res5"]
deformable_encoder_r50.detector.num_levels = 4
deformable_encoder_r50.detector.num_patterns = 3
deformable_encoder_r50.detector.activation = "relu"

deformable_r50 = copy.deepcopy(r50)
deformable_r50.detector.in_features = ["res3", "res4", "res5"]
deformable_r50.detector.num_levels = 4
deformable_r50.detector.deformable = True
deformable_r50.num_detections = 100
