"""DINO, Swin-L (224), 4 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_swin import LARGE_224
from ....configs.common.models.dino_swin import large_224 as model

train.init_backbone = LARGE_224
train.output_dir = "./output/dino_swin_large_224_4scale_12ep"
