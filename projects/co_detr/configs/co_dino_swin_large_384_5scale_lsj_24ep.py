"""Co-DINO, Swin-L (384), 5 scales, 24 epochs, large-scale jitter."""

from ....configs.common.coco_24ep import lr_multiplier, optimizer, train
from ....configs.common.data.coco_lsj import dataloader
from ....configs.common.models.co_dino import LARGE_384
from ....configs.common.models.co_dino import swin_large as model

dataloader.train.mapper.augmentations.size = 1280
train.init_backbone = LARGE_384
optimizer.lr = 2e-4
dataloader.evaluator.unsuppressed = True
train.output_dir = "./output/co_dino_swin_large_384_5scale_lsj_24ep"
