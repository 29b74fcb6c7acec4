"""The recipe for small models with dense attention on the shapes: more and cheaper steps, because
they learn late where to look, and a rate that rises slowly, without which they never do.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler

from .schedule import lr_12ep
from .shapes_training import dataloader, optimizer, train

smaller = L(T.ResizeShortestEdge)(short_edge_length=96, max_size=96)
dataloader.train.mapper.augmentations = [L(T.RandomFlip)(), smaller]
dataloader.test.mapper.augmentations = [smaller]
lr_multiplier = L(WarmupParamScheduler)(scheduler=lr_12ep, warmup_factor=0.01, warmup_length=0.2)
optimizer.lr = 2e-3
train.max_iter = 1500
train.checkpointer.period = train.eval_period = 500
