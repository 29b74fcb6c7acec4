"""DINO, ResNet-50, 4 scales, 12 epochs, in detrex's variant: what its weights need.

Heads of its own for every layer, and another position encoding.
"""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_r50 import IMAGENET, model

model.detector.share_heads = False
model.detector.position_temperature = 10000
model.detector.position_offset = -0.5
train.init_backbone = IMAGENET
train.output_dir = "./output/dino_r50_4scale_12ep_detrex"
