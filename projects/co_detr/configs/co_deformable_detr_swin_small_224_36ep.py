"""Co-Deformable-DETR, Swin-S (224), 36 epochs."""

from ....configs.common.coco_36ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.co_deformable_detr import SMALL_224
from ....configs.common.models.co_deformable_detr import swin_small as model

model.detector.base.backbone.drop_path_rate = 0.4
train.init_backbone = SMALL_224
optimizer.lr = 2e-4
optimizer.weight_decay = 0.05
optimizer.params.lr_factor_func.sampling = 0.1
train.output_dir = "./output/co_deformable_detr_swin_small_224_36ep"
