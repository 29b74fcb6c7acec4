"""DINO, ConvNeXt-Xlarge (384), 4 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_convnext import IMAGENET, model

model.detector.backbone.name = "convnext_xlarge"

train.init_backbone = f"{IMAGENET}/convnext_xlarge_22k_1k_384_ema.pth"
train.output_dir = "./output/dino_convnext_xlarge_384_4scale_12ep"
