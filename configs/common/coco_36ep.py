"""The COCO recipe for 36 epochs."""

from .data.coco_detr import dataloader
from .optim import optimizer
from .schedule import COCO_EPOCH
from .schedule import lr_36ep as lr_multiplier
from .train import train

train.max_iter = 36 * COCO_EPOCH
