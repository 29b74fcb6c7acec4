"""Learning rates over training. A scheduler's milestones are epochs; it scales to any length."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

COCO_EPOCH = 7393  # iterations of 16 images

lr_12ep = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[11, 12])
lr_16ep = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[8, 16])
lr_24ep = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[20, 24])
lr_36ep = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[30, 36])
lr_50ep = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[40, 50])

# Co-DINO's ViT on LVIS.
lr_16ep_vit = L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[9, 15, 16])
# Co-DINO's ViT: 500 iterations of batches of 16 images to warm up.
lr_12ep_vit = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[7, 12]),
    warmup_factor=0.01,
    warmup_length=500 / (12 * COCO_EPOCH),
    warmup_method="linear",
)
