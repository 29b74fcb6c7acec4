"""COCO 2017 with large-scale jitter and copy-paste, on squares of 1024 pixels.

Without masks, boxes are pasted. With `train.dataset = L(load_datasets)(names=...)`, nothing is.
"""

from detectron2.config import LazyCall as L

from dino_d2.d2.augmentation import (
    JitterMapper,
    SquareMapper,
    fit_into_square,
    large_scale_jitter,
    load_pairs,
)

from .coco_detr import dataloader

dataloader.train.dataset = L(load_pairs)(names="coco_2017_train")
dataloader.train.mapper = L(JitterMapper)(
    augmentations=L(large_scale_jitter)(size=1024), image_format="RGB"
)
dataloader.test.mapper = L(SquareMapper)(
    augmentations=L(fit_into_square)(size="${....train.mapper.augmentations.size}"),
    image_format="${...train.mapper.image_format}",
)
