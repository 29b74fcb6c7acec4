"""DINO, ViTDet-B, 4 scales, 50 epochs."""

from ....configs.common.coco_50ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_vitdet import BASE
from ....configs.common.models.dino_vitdet import base as model

train.init_backbone = BASE
train.output_dir = "./output/dino_vitdet_base_4scale_50ep"
