"""DINO, ResNet-50, 4 scales, 24 epochs."""

from ....configs.common.coco_24ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_r50 import IMAGENET, model

train.init_backbone = IMAGENET
train.output_dir = "./output/dino_r50_4scale_24ep"
