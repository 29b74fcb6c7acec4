"""DINO, Swin-L (384), 5 scales, 36 epochs."""

from ....configs.common.coco_36ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_swin import LARGE_384
from ....configs.common.models.dino_swin import large_384_5scale as model

train.init_backbone = LARGE_384
train.output_dir = "./output/dino_swin_large_384_5scale_36ep"
