"""Deformable DETR, ResNet-50, 50 epochs."""

from ....configs.common.deformable_detr_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.deformable_detr import r50 as model
from ....configs.common.models.dino_r50 import IMAGENET

train.init_backbone = IMAGENET
train.output_dir = "./output/deformable_detr_r50_50ep"
