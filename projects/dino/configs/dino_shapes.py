"""A small DINO on the generated shapes data set; minutes on a CPU."""

from detectron2.config import LazyCall as L

from dino_d2.backbones import TimmBackbone
from dino_d2.d2 import DINO
from dino_d2.losses import Criterion
from dino_d2.models import build_dino, small

from ....configs.common.data.shapes import dataloader
from ....configs.common.optim import optimizer
from ....configs.common.schedule import lr_12ep as lr_multiplier
from ....configs.common.train import train

model = L(DINO)(
    detector=L(build_dino)(
        backbone=L(TimmBackbone)(**small.SMALL_BACKBONE),
        num_classes=3,
        criterion=L(Criterion)(**small.SMALL_CRITERION),
        **small.SMALL_DINO,
    )
)
dataloader.train.total_batch_size = small.SMALL_BATCH
optimizer.lr = small.SMALL_LR
optimizer.params.lr_factor_func.factor = 1.0
train.clip_grad.max_norm = small.SMALL_MAX_NORM
train.max_iter = small.SMALL_ITERATIONS
train.checkpointer.period = train.eval_period = small.SMALL_EVAL_PERIOD
train.output_dir = "./output/dino_shapes"
