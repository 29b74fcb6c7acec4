"""Co-Deformable-DETR, ResNet-50, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.co_deformable_detr import IMAGENET, model

train.init_backbone = IMAGENET
optimizer.lr = 2e-4
optimizer.params.lr_factor_func.sampling = 0.1
train.output_dir = "./output/co_deformable_detr_r50_12ep"
