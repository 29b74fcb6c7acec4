"""DINO, Swin-T, 5 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_swin import TINY_224
from ....configs.common.models.dino_swin import tiny_224_5scale as model

train.init_backbone = TINY_224
train.output_dir = "./output/dino_swin_tiny_224_5scale_12ep"
