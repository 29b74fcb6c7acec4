"""The COCO recipe for 12 epochs."""

from .data.coco_detr import dataloader
from .optim import optimizer
from .schedule import COCO_EPOCH
from .schedule import lr_12ep as lr_multiplier
from .train import train

train.max_iter = 12 * COCO_EPOCH
