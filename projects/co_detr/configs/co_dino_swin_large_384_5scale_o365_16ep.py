"""Co-DINO, Swin-L (384), 5 scales, from Objects365, 16 epochs; give `train.init_checkpoint`."""

from ....configs.common.data.coco_detr import dataloader, with_large_images
from ....configs.common.models.co_dino import CLASS_WEIGHTS as _CLASS_WEIGHTS
from ....configs.common.models.co_dino import swin_large_o365 as model
from ....configs.common.optim import optimizer
from ....configs.common.schedule import COCO_EPOCH
from ....configs.common.schedule import lr_16ep as lr_multiplier
from ....configs.common.train import train

with_large_images(dataloader, 2048)
dataloader.evaluator.unsuppressed = True
train.init_skip = _CLASS_WEIGHTS  # Objects365 has other classes
train.max_iter = 16 * COCO_EPOCH
train.output_dir = "./output/co_dino_swin_large_384_5scale_o365_16ep"
