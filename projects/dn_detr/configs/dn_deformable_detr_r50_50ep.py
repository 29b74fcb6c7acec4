"""DN-Deformable-DETR, ResNet-50, 50 epochs."""

from ....configs.common.coco_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_r50 import IMAGENET
from ....configs.common.models.dn_detr import deformable_r50 as model

train.init_backbone = IMAGENET
train.output_dir = "./output/dn_deformable_detr_r50_50ep"
