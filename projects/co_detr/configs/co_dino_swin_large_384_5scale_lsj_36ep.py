"""Co-DINO, Swin-L (384), 5 scales, 36 epochs, large-scale jitter."""

from ....configs.common.coco_36ep import lr_multiplier, optimizer, train
from ....configs.common.data.coco_lsj import dataloader
from ....configs.common.models.co_dino import LARGE_384
from ....configs.common.models.co_dino import swin_large as model

model.detector.base.backbone.drop_path_rate = 0.5
dataloader.train.mapper.augmentations.size = 1280
train.init_backbone = LARGE_384
optimizer.lr = 2e-4
dataloader.evaluator.unsuppressed = True
train.output_dir = "./output/co_dino_swin_large_384_5scale_lsj_36ep"
