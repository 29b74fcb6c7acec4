"""Two-stage Deformable DETR, ResNet-50, 50 epochs."""

from ....configs.common.deformable_detr_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.deformable_detr import r50 as model
from ....configs.common.models.dino_r50 import IMAGENET

model.detector.box_refinement = model.detector.two_stage = True
train.init_backbone = IMAGENET
train.output_dir = "./output/deformable_detr_r50_two_stage_50ep"
