"""DN-DETR, ResNet-50-DC5, 50 epochs."""

from ....configs.common.coco_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_r50 import IMAGENET
from ....configs.common.models.dn_detr import dc5_r50 as model

train.init_backbone = IMAGENET
train.output_dir = "./output/dn_detr_dc5_r50_50ep"
