"""DINO, Swin-S, 5 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_swin import SMALL_224
from ....configs.common.models.dino_swin import small_224_5scale as model

train.init_backbone = SMALL_224
train.output_dir = "./output/dino_swin_small_224_5scale_12ep"
