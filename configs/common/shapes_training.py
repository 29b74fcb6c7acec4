"""The generated shapes data set (`python -m dino_d2.tools.make_shapes`), and the recipe for small
models on it; minutes on a CPU.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from dino_d2.models import small

from .data.coco_detr import dataloader
from .optim import optimizer
from .schedule import lr_12ep as lr_multiplier
from .train import train

dataloader.train.dataset.names = "output/shapes/train/annotations.json:output/shapes/train/images"
dataloader.train.mapper.augmentations = [L(T.RandomFlip)()]
dataloader.train.num_workers = 0
dataloader.train.total_batch_size = small.SMALL_BATCH
dataloader.test.dataset.names = "output/shapes/val/annotations.json:output/shapes/val/images"
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 0
optimizer.lr = small.SMALL_LR
optimizer.params.lr_factor_func.factor = 1.0
train.clip_grad.max_norm = small.SMALL_MAX_NORM
train.max_iter = small.SMALL_ITERATIONS
train.checkpointer.period = train.eval_period = small.SMALL_EVAL_PERIOD

# For dense attention, which learns late where to look: a rate that rises slowly, without which it
# never does, on smaller images and for longer.
lr_dense = L(WarmupParamScheduler)(scheduler=lr_multiplier, warmup_factor=0.01, warmup_length=0.2)


def learn_late(dataloader, optimizer, train):
    """Change the recipe to that for dense attention, together with `lr_dense`."""
    smaller = L(T.ResizeShortestEdge)(short_edge_length=96, max_size=96)
    dataloader.train.mapper.augmentations = [L(T.RandomFlip)(), smaller]
    dataloader.test.mapper.augmentations = [smaller]
    optimizer.lr = 2 * small.SMALL_LR
    train.max_iter = 1500
    train.checkpointer.period = train.eval_period = 500
