"""LVIS v1: images with rare classes come more often (Gupta et al., LVIS, app. B.2)."""

from detectron2.config import LazyCall as L
from detectron2.data.samplers import RepeatFactorTrainingSampler

from dino_d2.d2.data import class_frequencies, lvis_evaluator
from dino_d2.losses import FederatedClasses

from .coco_detr import dataloader

LVIS_CLASSES = 1203
LVIS_EPOCH = 6261  # iterations of 16 images: there are 100,170

# of the classes that an image says nothing about
federated = L(FederatedClasses)(
    weights=L(class_frequencies)(name="lvis_v1_train", power=0.5), num_classes=50
)

dataloader.train.dataset.names = "lvis_v1_train"
dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
    repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
        dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.001
    )
)
dataloader.test.dataset.names = "lvis_v1_val"
dataloader.evaluator = L(lvis_evaluator)(dataset_name="${..test.dataset.names}")
