"""DINO, ResNet-50, 4 scales, LVIS v1 with the federated loss, 24 epochs."""

from detectron2.config import LazyCall as L

from dino_d2.d2.data import class_frequencies
from dino_d2.losses import Criterion, FederatedClasses

from ....configs.common.coco_24ep import lr_multiplier, optimizer, train
from ....configs.common.data.lvis_detr import LVIS_CLASSES, dataloader
from ....configs.common.models.dino_r50 import IMAGENET, model

model.detector.num_classes = LVIS_CLASSES
model.detector.criterion = L(Criterion)(
    federated=L(FederatedClasses)(
        weights=L(class_frequencies)(name="lvis_v1_train", power=0.5),
        num_classes=50,
    )
)
train.max_iter = 24 * 6261  # epochs of 100,170 images
train.eval_period = train.checkpointer.period = 6261
train.init_backbone = IMAGENET
train.output_dir = "./output/dino_r50_4scale_lvis_24ep"
