"""DINO, Swin-B (384), 5 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_swin import BASE_384
from ....configs.common.models.dino_swin import base_384_5scale as model

train.init_backbone = BASE_384
train.output_dir = "./output/dino_swin_base_384_5scale_12ep"
