"""DAB-DETR with a deformable encoder, ResNet-50, 3 patterns, 50 epochs."""

from ....configs.common.coco_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dab_detr import r50 as model
from ....configs.common.models.dino_r50 import IMAGENET

model.detector.in_features = ["res3", "res4", "res5"]
model.detector.num_levels = 4
model.detector.num_patterns = 3
model.detector.activation = "relu"
train.init_backbone = IMAGENET
train.output_dir = "./output/dab_detr_deformable_encoder_r50_50ep"
