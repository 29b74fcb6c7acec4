"""Large-scale jitter and copy-paste (Ghiasi et al., CVPR 2021), as Co-DETR trains with them."""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import DatasetFromList, transforms
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import BitMasks, Boxes, Instances
from fvcore.transforms.transform import Transform
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from .data import load_datasets
from .mapper import FIELDS, CheckedMapper, transform_object

PAD_VALUE = 114.0
MAX_SHIFT = 10  # pixels that a side of a box may move before its object counts as covered,
MIN_VISIBLE = 300  # unless more than so many pixels of the object are left
MIN_BOX = 0.01  # pixels of width and height


def large_scale_jitter(size: int) -> list[transforms.Augmentation]:
    """Scale images to 0.1 to 2 times a square, then crop or pad them to it; mirror half of them."""
    return [
        transforms.RandomFlip(),
        transforms.ResizeScale(0.1, 2.0, size, size),
        transforms.FixedSizeCrop((size, size), pad_value=PAD_VALUE, seg_pad_value=0),
    ]


def fit_into_square(size: int) -> list[transforms.Augmentation]:
    """Scale images to just fit into a square and pad them to it, for testing after the jitter."""
    return [
        transforms.ResizeShortestEdge(size, max_size=size),
        transforms.FixedSizeCrop((size, size), pad_value=PAD_VALUE, seg_pad_value=0),
    ]


class Pairs(Dataset):
    """Every entry of a data set, and under "partner" one that is drawn at random, to paste from."""

    def __init__(self, entries: Sequence[dict]):
        self.entries = DatasetFromList(entries, copy=False)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict:
        """The entry; numpy draws its partner, which Detectron2 seeds in every worker."""
        return {**self.entries[index], "partner": self.entries[np.random.randint(len(self))]}


def load_pairs(names: str | Sequence[str], filter_empty: bool = False) -> Pairs:
    """`load_datasets`, with masks, for training with copy-paste."""
    return Pairs(load_datasets(names, filter_empty, masks=True))


class JitterMapper(CheckedMapper):
    """The mapper for training with crops and copy-paste.

    Boxes are tight around what a crop leaves of an object where all objects of an image have masks,
    else they are the cropped boxes. Where an entry has a partner (see `Pairs`), up to `max_pasted`
    objects of it are pasted, see `paste_objects`.

    Args:
        augmentations: must end in images of one size, as `large_scale_jitter` does.
        image_format: "RGB" or "BGR".
        max_pasted: objects of a partner; one less at most, as published.
    """

    def __init__(
        self,
        augmentations: Sequence[transforms.Augmentation],
        image_format: str,
        max_pasted: int = 100,
    ):
        super().__init__(True, augmentations, image_format)
        self.max_pasted = max_pasted

    def __call__(self, dataset_dict: dict) -> dict:
        """Detectron2's dict of an image, with or without a partner -> a training example."""
        partner = dataset_dict.get("partner")
        example = super().__call__({k: v for k, v in dataset_dict.items() if k != "partner"})
        if partner is None:
            return example
        partner = super().__call__(partner)
        objects = len(partner["instances"])
        number = np.random.randint(min(objects + 1, self.max_pasted))
        chosen = np.random.choice(objects, number, replace=False)
        return paste_objects(example, partner, torch.from_numpy(chosen))

    def _instances(self, objects: list[dict], transforms: Transform, source: dict) -> Instances:
        if all("segmentation" in entry for entry in objects):
            instances = _masked(objects, transforms, source)
        else:
            instances = super()._instances(objects, transforms, source)
        return instances[instances.gt_boxes.nonempty(MIN_BOX)]


def _masked(objects: list[dict], transforms: Transform, source: dict) -> Instances:
    """Objects of an entry with masks, and boxes that are tight around them."""
    before, size = (source["height"], source["width"]), source["image"].shape[1:]
    coded = [{**e, "segmentation": _as_rle(e["segmentation"], before)} for e in objects]
    fields = (*FIELDS, "segmentation")
    moved = [transform_object(entry, transforms, size, fields) for entry in coded]
    instances = annotations_to_instances(moved, size, mask_format="bitmask")
    if not objects:
        instances.gt_masks = BitMasks(torch.zeros(0, *size, dtype=torch.bool))
    instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
    return instances


class SquareMapper(CheckedMapper):
    """The mapper for testing on images that `fit_into_square` pads.

    The size that detections are scaled back to is that of the image with its padding.
    """

    def __init__(self, augmentations: Sequence[transforms.Augmentation], image_format: str):
        super().__init__(False, augmentations, image_format)

    def __call__(self, dataset_dict: dict) -> dict:
        """Detectron2's dict of an image -> a test example."""
        example = super().__call__(dataset_dict)
        example["height"] = example["width"] = max(example["height"], example["width"])
        return example


def paste_objects(example: dict, partner: dict, chosen: Tensor) -> dict:
    """Paste objects of one training example onto another of the same size.

    Where objects have no masks, their boxes are pasted. An object that gets covered has its box
    shrunk to what can be seen of it. It is dropped if a side of the box moves by more than 10
    pixels and no more than 300 of its pixels are left.

    Args:
        example, partner: "image" (3, H, W) and "instances", as from `JitterMapper`.
        chosen: indices of the partner's objects.

    Raises:
        ValueError: the images differ in size.
    """
    shapes = [tuple(source["image"].shape[1:]) for source in (example, partner)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"cannot paste from an image of {shapes[1]} pixels onto {shapes[0]}")
    pasted = partner["instances"][chosen]
    if not len(pasted):
        return example
    cover = _masks(pasted).any(0)
    instances = [_uncovered(example["instances"], cover), pasted]
    if not all(objects.has("gt_masks") for objects in instances):
        instances = [_without_masks(objects) for objects in instances]
    image = torch.where(cover, partner["image"], example["image"])
    return {**example, "image": image, "instances": Instances.cat(instances)}


def _uncovered(instances: Instances, cover: Tensor) -> Instances:
    """What is left of objects under a cover (H, W)."""
    masks = _masks(instances)
    left = masks & ~cover
    area, old = _areas(left), instances.gt_boxes.tensor
    touched = (area < _areas(masks))[:, None]
    boxes = torch.where(touched, BitMasks(left).get_bounding_boxes().tensor, old)
    moved = (boxes - old).abs().amax(1) > MAX_SHIFT
    result = Instances(instances.image_size, **instances.get_fields())
    result.gt_boxes = Boxes(boxes)
    if result.has("gt_masks"):
        result.gt_masks = BitMasks(left)
    return result[(area > 0) & ~(moved & (area <= MIN_VISIBLE))]


def _masks(instances: Instances) -> Tensor:
    """(T, H, W) of the objects, or of their boxes where there are no masks."""
    if instances.has("gt_masks"):
        return instances.gt_masks.tensor
    height, width = instances.image_size
    x0, y0, x1, y1 = (side[:, None] for side in instances.gt_boxes.tensor.unbind(1))
    x, y = torch.arange(width), torch.arange(height)
    columns, rows = (x > x0 - 1) & (x < x1), (y > y0 - 1) & (y < y1)
    return rows[:, :, None] & columns[:, None]


def _areas(masks: Tensor) -> Tensor:
    """(T, H, W) -> (T,); torch takes seventy times as long to add up bits."""
    return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.int64)


def _without_masks(instances: Instances) -> Instances:
    fields = {name: value for name, value in instances.get_fields().items() if name != "gt_masks"}
    return Instances(instances.image_size, **fields)


def _as_rle(segmentation: list | dict, size: tuple[int, int]) -> dict:
    """Polygons cut by a crop need a library of their own (shapely), run-length codes do not."""
    if isinstance(segmentation, dict):
        return segmentation
    return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
