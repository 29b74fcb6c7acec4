"""DINO, ResNet-50, 4 scales, 36 epochs."""

from ....configs.common.coco_36ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_r50 import IMAGENET, model

train.init_backbone = IMAGENET
train.output_dir = "./output/dino_r50_4scale_36ep"
