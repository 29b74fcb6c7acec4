"""DAB-DETR, ResNet-50, 3 patterns, 50 epochs."""

from ....configs.common.coco_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dab_detr import r50 as model
from ....configs.common.models.dino_r50 import IMAGENET

model.detector.num_patterns = 3
train.init_backbone = IMAGENET
train.output_dir = "./output/dab_detr_r50_3patterns_50ep"
