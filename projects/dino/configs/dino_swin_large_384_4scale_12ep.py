"""DINO, Swin-L (384), 4 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_swin import LARGE_384
from ....configs.common.models.dino_swin import large_384 as model

train.init_backbone = LARGE_384
train.output_dir = "./output/dino_swin_large_384_4scale_12ep"
