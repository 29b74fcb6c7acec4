"""A small DAB-DETR on the generated shapes data set; minutes on a CPU."""

from detectron2.config import LazyCall as L

from dino_d2.backbones import TimmBackbone
from dino_d2.d2 import DABDETR
from dino_d2.losses import Criterion
from dino_d2.models import build_dab_detr, small

from ....configs.common.shapes_training import dataloader, learn_late, optimizer, train
from ....configs.common.shapes_training import lr_dense as lr_multiplier

model = L(DABDETR)(
    detector=L(build_dab_detr)(
        backbone=L(TimmBackbone)(**small.SMALL_BACKBONE),
        num_classes=3,
        criterion=L(Criterion)(**small.SMALL_CRITERION),
        **small.SMALL_DENSE,
    )
)
learn_late(dataloader, optimizer, train)
train.output_dir = "./output/dab_detr_shapes"
