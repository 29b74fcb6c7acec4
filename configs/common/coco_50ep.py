"""The COCO recipe for 50 epochs."""

from .data.coco_detr import dataloader
from .optim import optimizer
from .schedule import COCO_EPOCH
from .schedule import lr_50ep as lr_multiplier
from .train import train

train.max_iter = 50 * COCO_EPOCH
