"""Co-Deformable-DETR, Swin-B (384), 36 epochs."""

from ....configs.common.coco_36ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.co_deformable_detr import BASE_384
from ....configs.common.models.co_deformable_detr import swin_base as model

model.detector.base.backbone.drop_path_rate = 0.4
train.init_backbone = BASE_384
optimizer.lr = 2e-4
optimizer.weight_decay = 0.05
optimizer.params.lr_factor_func.sampling = 0.1
train.output_dir = "./output/co_deformable_detr_swin_base_384_36ep"
