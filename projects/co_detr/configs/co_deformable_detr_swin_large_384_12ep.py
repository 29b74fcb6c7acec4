"""Co-Deformable-DETR, Swin-L (384), 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.co_deformable_detr import LARGE_384
from ....configs.common.models.co_deformable_detr import swin_large as model

train.init_backbone = LARGE_384
optimizer.lr = 2e-4
optimizer.weight_decay = 0.05
optimizer.params.lr_factor_func.sampling = 0.1
train.output_dir = "./output/co_deformable_detr_swin_large_384_12ep"
