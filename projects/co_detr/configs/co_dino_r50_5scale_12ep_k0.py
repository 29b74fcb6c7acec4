"""Co-DINO with no co-heads, ResNet-50, 5 scales, 12 epochs."""

from ....configs.common.coco_12ep import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.co_dino import IMAGENET, model

model.detector.co_heads = {}
train.init_backbone = IMAGENET
optimizer.lr = 2e-4
dataloader.evaluator.unsuppressed = True
train.output_dir = "./output/co_dino_r50_5scale_12ep_k0"
