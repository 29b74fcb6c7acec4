"""DINO with Detectron2's ResNet-50; four or five scales."""

import copy

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

from dino_d2.d2 import DINO
from dino_d2.models import build_dino

IMAGENET = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"

r50 = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
    stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
    out_features="${..in_features}",
    freeze_at=2,
)

model = L(DINO)(
    detector=L(build_dino)(
        backbone=r50,
        in_features=["res3", "res4", "res5"],
        num_classes=80,
        num_levels=4,
    ),
)

model_5scale = copy.deepcopy(model)
model_5scale.detector.in_features = ["res2", "res3", "res4", "res5"]
model_5scale.detector.num_levels = 5
