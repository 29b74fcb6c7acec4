"""AdamW as published: weight decay on everything, a tenth of the rate for the backbone."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from dino_d2.d2.solver import BackboneLR

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}",
        lr_factor_func=L(BackboneLR)(factor=0.1),
    ),
    lr=1e-4,
    weight_decay=1e-4,
)
