"""A small DAB-Deformable-DETR on the generated shapes data set; minutes on a CPU."""

from detectron2.config import LazyCall as L

from dino_d2.backbones import TimmBackbone
from dino_d2.d2 import DABDeformableDETR
from dino_d2.losses import Criterion
from dino_d2.models import build_dab_deformable_detr, small

from ....configs.common.shapes_training import dataloader, lr_multiplier, optimizer, train

model = L(DABDeformableDETR)(
    detector=L(build_dab_deformable_detr)(
        backbone=L(TimmBackbone)(**small.SMALL_BACKBONE),
        num_classes=3,
        criterion=L(Criterion)(**small.SMALL_CRITERION),
        **small.SMALL_DEFORMABLE,
    )
)
train.output_dir = "./output/dab_deformable_detr_shapes"
