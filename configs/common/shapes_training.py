"""The generated shapes data set (`python -m dino_d2.tools.make_shapes`), and the recipe for small
models on it; minutes on a CPU.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

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
