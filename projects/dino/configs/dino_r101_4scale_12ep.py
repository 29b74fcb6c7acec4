"""DINO, ResNet-101, 4 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_r50 import model

model.detector.backbone.stages.depth = 101

train.init_backbone = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/dino_r101_4scale_12ep"
