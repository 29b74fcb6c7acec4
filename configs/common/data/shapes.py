"""The generated shapes data set (`python -m dino_d2.tools.make_shapes`)."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .coco_detr import dataloader

dataloader.train.dataset.names = "output/shapes/train/annotations.json:output/shapes/train/images"
dataloader.train.mapper.augmentations = [L(T.RandomFlip)()]
dataloader.train.num_workers = 0
dataloader.test.dataset.names = "output/shapes/val/annotations.json:output/shapes/val/images"
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 0
