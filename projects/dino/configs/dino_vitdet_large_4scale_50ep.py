"""DINO, ViTDet-L, 4 scales, 50 epochs."""

from ....configs.common.coco_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_vitdet import LARGE
from ....configs.common.models.dino_vitdet import large as model

train.init_backbone = LARGE
train.output_dir = "./output/dino_vitdet_large_4scale_50ep"
