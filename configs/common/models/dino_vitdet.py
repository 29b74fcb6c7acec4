"""DINO with ViTDet backbones."""

import copy

from detectron2.config import LazyCall as L

from dino_d2.d2.backbones import build_vitdet

from .dino_r50 import model as base

base.detector.backbone = L(build_vitdet)(
    embed_dim=768, depth=12, num_heads=12, drop_path=0.1, global_blocks=[2, 5, 8, 11]
)
base.detector.in_features = ["p3", "p4", "p5", "p6"]

large = copy.deepcopy(base)
large.detector.backbone = L(build_vitdet)(
    embed_dim=1024, depth=24, num_heads=16, drop_path=0.4, global_blocks=[5, 11, 17, 23]
)

BASE = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth"
LARGE = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_large.pth"
