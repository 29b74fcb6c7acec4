"""Co-DINO, ResNet-50, 5 scales, 36 epochs, large-scale jitter."""

from ....configs.common.coco_36ep import lr_multiplier, optimizer, train
from ....configs.common.data.coco_lsj import dataloader
from ....configs.common.models.co_dino import IMAGENET, model

train.init_backbone = IMAGENET
optimizer.lr = 2e-4
dataloader.evaluator.unsuppressed = True
train.output_dir = "./output/co_dino_r50_5scale_lsj_36ep"
