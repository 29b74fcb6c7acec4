"""DN-DETR with a deformable encoder, ResNet-101, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dn_detr import deformable_encoder_r50 as model

model.detector.backbone.stages.depth = 101
train.init_backbone = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
train.output_dir = "./output/dn_detr_deformable_encoder_r101_12ep"
