"""LVIS v1: images with rare classes come more often (Gupta et al., LVIS, app. B.2)."""

from detectron2.config import LazyCall as L
from detectron2.data.samplers import RepeatFactorTrainingSampler

from dino_d2.d2.data import lvis_evaluator

from .coco_detr import dataloader

LVIS_CLASSES = 1203

dataloader.train.dataset.names = "lvis_v1_train"
dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
    repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
        dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.001
    )
)
dataloader.test.dataset.names = "lvis_v1_val"
dataloader.evaluator = L(lvis_evaluator)(dataset_name="${..test.dataset.names}")
