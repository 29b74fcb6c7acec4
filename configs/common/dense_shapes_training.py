"""The recipe for small models with dense attention on the shapes: more and cheaper steps, because
they learn late where to look.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .shapes_training import dataloader, lr_multiplier, optimizer, train

smaller = L(T.ResizeShortestEdge)(short_edge_length=96, max_size=96)
dataloader.train.mapper.augmentations = [L(T.RandomFlip)(), smaller]
dataloader.test.mapper.augmentations = [smaller]
optimizer.lr = 2e-3
train.max_iter = 2000
train.checkpointer.period = train.eval_period = 500
