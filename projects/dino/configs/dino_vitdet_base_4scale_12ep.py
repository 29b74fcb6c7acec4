"""DINO, ViTDet-B, 4 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.dino_vitdet import BASE
from ....configs.common.models.dino_vitdet import base as model

train.init_backbone = BASE
train.output_dir = "./output/dino_vitdet_base_4scale_12ep"
