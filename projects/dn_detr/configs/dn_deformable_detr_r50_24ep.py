"""DN-Deformable-DETR, ResNet-50, 24 epochs."""

from ....configs.common.coco_24ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_r50 import IMAGENET
from ....configs.common.models.dn_detr import deformable_r50 as model

train.init_backbone = IMAGENET
train.output_dir = "./output/dn_deformable_detr_r50_24ep"
