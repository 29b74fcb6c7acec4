"""The COCO recipe of Deformable DETR for 50 epochs: twice the rates and images of the others."""

from .data.coco_detr import dataloader
from .optim import optimizer
from .schedule import COCO_EPOCH
from .schedule import lr_50ep as lr_multiplier
from .train import train

dataloader.train.total_batch_size = 32
optimizer.lr = 2e-4
optimizer.params.lr_factor_func.sampling = 0.1
train.max_iter = 50 * COCO_EPOCH // 2
train.checkpointer.period = train.eval_period = COCO_EPOCH // 2
