"""COCO 2017 with large-scale jitter and copy-paste, on squares of 1024 pixels."""

from .coco_detr import dataloader
from .lsj import with_jitter

with_jitter(dataloader, 1024)
