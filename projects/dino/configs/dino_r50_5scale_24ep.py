"""DINO, ResNet-50, 5 scales, 24 epochs."""

from ....configs.common.coco_24ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_r50 import IMAGENET
from ....configs.common.models.dino_r50 import model_5scale as model

train.init_backbone = IMAGENET
train.output_dir = "./output/dino_r50_5scale_24ep"
