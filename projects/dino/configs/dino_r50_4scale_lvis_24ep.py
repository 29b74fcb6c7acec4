"""DINO, ResNet-50, 4 scales, LVIS v1 with the federated loss, 24 epochs."""

from detectron2.config import LazyCall as L

from dino_d2.losses import Criterion

from ....configs.common.coco_24ep import lr_multiplier, optimizer, train
from ....configs.common.data.lvis_detr import LVIS_CLASSES, LVIS_EPOCH, dataloader
from ....configs.common.data.lvis_detr import federated as _federated
from ....configs.common.models.dino_r50 import IMAGENET, model

model.detector.num_classes = LVIS_CLASSES
model.detector.criterion = L(Criterion)(federated=_federated)
train.max_iter = 24 * LVIS_EPOCH
train.eval_period = train.checkpointer.period = LVIS_EPOCH
train.init_backbone = IMAGENET
train.output_dir = "./output/dino_r50_4scale_lvis_24ep"
