"""DAB-DETR, ResNet-101, 50 epochs."""

from ....configs.common.coco_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dab_detr import r50 as model

model.detector.backbone.stages.depth = 101
train.init_backbone = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/dab_detr_r101_50ep"
