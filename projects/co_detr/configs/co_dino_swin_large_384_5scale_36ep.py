"""Co-DINO, Swin-L (384), 5 scales, 36 epochs."""

from ....configs.common.coco_36ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.co_dino import LARGE_384
from ....configs.common.models.co_dino import swin_large as model

model.detector.base.backbone.drop_path_rate = 0.6
train.init_backbone = LARGE_384
optimizer.lr = 2e-4
dataloader.evaluator.unsuppressed = True
train.output_dir = "./output/co_dino_swin_large_384_5scale_36ep"
