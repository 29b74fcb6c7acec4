"""A small Co-Deformable-DETR on the generated shapes data set; minutes on a CPU."""

from detectron2.config import LazyCall as L

from dino_d2.backbones import TimmBackbone
from dino_d2.d2 import CoDETR
from dino_d2.losses import Criterion
from dino_d2.models import build_co_detr, build_deformable_detr, small

from ....configs.common.shapes_training import dataloader, lr_multiplier, optimizer, train

model = L(CoDETR)(
    detector=L(build_co_detr)(
        base=L(build_deformable_detr)(
            backbone=L(TimmBackbone)(**small.SMALL_BACKBONE),
            num_classes="${..num_classes}",
            box_refinement=True,
            two_stage=True,
            mixed_selection=True,
            look_forward_twice=True,
            criterion=L(Criterion)(**small.SMALL_CRITERION),
            **small.SMALL_DEFORMABLE,
        ),
        num_classes=3,
        co_heads={"faster_rcnn": {"fc_dim": 128}, "atss": {}},
        co_head_weight=0.5,
    )
)
train.output_dir = "./output/co_deformable_detr_shapes"
