"""Co-DINO, Swin-L (384), 5 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.co_dino import LARGE_384
from ....configs.common.models.co_dino import swin_large as model

train.init_backbone = LARGE_384
optimizer.lr = 2e-4
dataloader.evaluator.unsuppressed = True
train.output_dir = "./output/co_dino_swin_large_384_5scale_12ep"
