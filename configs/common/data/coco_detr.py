"""COCO 2017 with DETR's augmentation (DETR, sec. A.4), from Detectron2's transforms."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from omegaconf import OmegaConf

from dino_d2.d2.data import coco_evaluator, load_datasets
from dino_d2.d2.loading import build_train_loader
from dino_d2.d2.mapper import CheckedMapper

dataloader = OmegaConf.create()

dataloader.train = L(build_train_loader)(
    dataset=L(load_datasets)(names="coco_2017_train"),
    mapper=L(CheckedMapper)(
        is_train=True,
        augmentations=[
            L(T.RandomFlip)(),
            L(T.RandomApply)(  # half of the images: a random part of them
                tfm_or_aug=L(T.AugmentationList)(
                    augs=[
                        L(T.ResizeShortestEdge)(
                            short_edge_length=(400, 500, 600), sample_style="choice"
                        ),
                        L(T.RandomCrop)(crop_type="absolute_range", crop_size=(384, 600)),
                    ]
                ),
                prob=0.5,
            ),
            L(T.ResizeShortestEdge)(
                short_edge_length=tuple(range(480, 801, 32)), max_size=1333, sample_style="choice"
            ),
        ],
        image_format="RGB",
    ),
    total_batch_size=16,
    num_workers=4,
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(load_datasets)(names="coco_2017_val"),
    mapper=L(CheckedMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

# The test images with their objects, for the instability of the matching.
dataloader.matching = L(build_detection_test_loader)(
    dataset="${..test.dataset}",
    mapper=L(CheckedMapper)(
        is_train=True,
        augmentations="${...test.mapper.augmentations}",
        image_format="${...train.mapper.image_format}",
    ),
    num_workers="${..test.num_workers}",
)

dataloader.evaluator = L(coco_evaluator)(dataset_name="${..test.dataset.names}")


def with_large_images(dataloader, longest):
    """Change to the sizes of Co-DINO's models from Objects365, of up to `longest` pixels."""
    to_size = dataloader.train.mapper.augmentations[-1]
    to_size.short_edge_length, to_size.max_size = tuple(range(480, 1537, 32)), longest
    (to_size,) = dataloader.test.mapper.augmentations
    to_size.short_edge_length, to_size.max_size = 1280, 2048
