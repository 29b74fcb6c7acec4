"""DAB-DETR, ResNet-50-DC5, 50 epochs."""

from ....configs.common.coco_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dab_detr import dc5_r50 as model
from ....configs.common.models.dino_r50 import IMAGENET

train.init_backbone = IMAGENET
train.output_dir = "./output/dab_detr_dc5_r50_50ep"
