"""DINO, ConvNeXt-Base (384), 4 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_convnext import IMAGENET, model

model.detector.backbone.name = "convnext_base"

train.init_backbone = f"{IMAGENET}/convnext_base_22k_1k_384.pth"
train.output_dir = "./output/dino_convnext_base_384_4scale_12ep"
