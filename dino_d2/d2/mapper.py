"""From entries of data sets to what a detector takes."""

import copy
from collections.abc import Sequence

import torch
from detectron2.data import transforms as T  # noqa: N812 -- Detectron2's own name for it
from detectron2.data.detection_utils import (
    annotations_to_instances,
    filter_empty_instances,
    transform_instance_annotations,
)
from detectron2.structures import Instances
from fvcore.transforms.transform import Transform
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data.check import read_entry
from ..data.findings import DataError

FIELDS = ("bbox", "bbox_mode", "category_id")  # of an object, that training uses


class CheckedMapper:
    """From an entry of a data set to what a detector takes, as Detectron2's `DatasetMapper`.

    It differs in reading images by this package's checks: what cannot be read as 8-bit RGB of the
    stated size is an error that names the image.

    Args:
        is_train: whether annotations become "instances"; else they are left out.
        augmentations: Detectron2's, in their order.
        image_format: "RGB" or "BGR".
    """

    def __init__(self, is_train: bool, augmentations: Sequence, image_format: str = "RGB"):
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be RGB or BGR, not {image_format!r}")
        self.is_train, self.image_format = is_train, image_format
        self.augmentations = T.AugmentationList(list(augmentations))

    def __call__(self, source: dict) -> dict:
        """The entry with "image", (3, H, W) uint8, and in training "instances"."""
        source = copy.deepcopy(source)
        try:
            pixels = read_entry(source, source["file_name"])
        except DataError as error:
            raise DataError(f"image {source.get('image_id')}: {error}") from error
        source["height"], source["width"] = pixels.shape[:2]
        given = T.AugInput(pixels if self.image_format == "RGB" else pixels[:, :, ::-1])
        transforms = self.augmentations(given)
        image = given.image.transpose(2, 0, 1).copy()  # a mirrored side of one pixel, too
        source["image"] = torch.as_tensor(image)
        entries = source.pop("annotations", None)
        if self.is_train and entries is not None:
            objects = [entry for entry in entries if not entry.get("iscrowd", 0)]
            source["instances"] = self._instances(objects, transforms, source)
        return source

    def _instances(self, objects: list[dict], transforms: Transform, source: dict) -> Instances:
        """Objects of an entry, without those that a crop misses."""
        size = source["image"].shape[1:]
        objects = [transform_object(entry, transforms, size) for entry in objects]
        return filter_empty_instances(annotations_to_instances(objects, size))


def transform_object(
    entry: dict, transforms: Transform, size: tuple[int, int], fields: tuple[str, ...] = FIELDS
) -> dict:
    """Those fields of an object, as they are after the transforms, in an image (height, width)."""
    return transform_instance_annotations({f: entry[f] for f in fields}, transforms, size)


def scale_sizes(config: DictConfig | ListConfig, factor: float) -> None:
    """Multiply all sizes in pixels within augmentations of a config, by name; round them.

    For images whose objects are of another scale than COCO's.
    """
    for key in config if OmegaConf.is_dict(config) else range(len(config)):
        if OmegaConf.is_interpolation(config, key):
            continue
        value = config[key]
        if key in ("short_edge_length", "max_size", "crop_size"):
            several = not isinstance(value, int)
            scaled = [round(v * factor) for v in (value if several else [value])]
            config[key] = scaled if several else scaled[0]
        elif OmegaConf.is_config(value):
            scale_sizes(value, factor)
