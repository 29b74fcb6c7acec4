"""Deformable DETR on one scale, ResNet-50-DC5, 50 epochs."""

from ....configs.common.deformable_detr_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dab_detr import dc5_r50 as _dc5_r50
from ....configs.common.models.deformable_detr import r50 as model
from ....configs.common.models.dino_r50 import IMAGENET

model.detector.backbone = _dc5_r50.detector.backbone
model.detector.in_features = ["res5"]
model.detector.num_levels = 1
train.init_backbone = IMAGENET
train.output_dir = "./output/deformable_detr_dc5_r50_single_scale_50ep"
