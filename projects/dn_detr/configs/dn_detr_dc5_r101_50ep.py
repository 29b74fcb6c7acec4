"""DN-DETR, ResNet-101-DC5, 50 epochs."""

from ....configs.common.coco_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dn_detr import dc5_r50 as model

model.detector.backbone.depth = 101
train.init_backbone = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/dn_detr_dc5_r101_50ep"
