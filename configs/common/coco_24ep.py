"""The COCO recipe for 24 epochs."""

from .data.coco_detr import dataloader
from .optim import optimizer
from .schedule import COCO_EPOCH
from .schedule import lr_24ep as lr_multiplier
from .train import train

train.max_iter = 24 * COCO_EPOCH
