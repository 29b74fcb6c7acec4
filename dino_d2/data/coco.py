"""COCO-format data without Detectron2."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from ..box_ops import xyxy_to_cxcywh
from ..types import Detections, Target
from .annotations import read_annotations
from .check import load_checked, read_entry
from .images import resolve

# The 80 of the ids 1..90 that COCO uses, in the order of Detectron2's contiguous classes.
COCO_CATEGORY_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]

COCO_CLASSES = (
    """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports
ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine
glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
vase, scissors, teddy bear, hair drier, toothbrush
""".replace("\n", " ")
    .strip()
    .split(", ")
)

_AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class Example(NamedTuple):
    """One image with its objects."""

    image: Tensor  # (3, h, w) uint8 RGB
    target: Target
    image_id: int


class CocoBoxes(torch.utils.data.Dataset):
    """The images and boxes of a COCO-format json; crowd regions and unusable boxes are left out.

    Classes are numbered from 0 in the order of the json's category ids. What the checks of the
    data find is in `findings`.

    Raises:
        DataError: the data cannot be used; also when an image is read.
    """

    def __init__(self, annotations: str | Path, images: str | Path):
        checked = load_checked(annotations, images)
        self.root, self.findings = checked.images, checked.findings
        self.images, self.categories = checked.content["images"], checked.content["categories"]
        self.category_ids = [category["id"] for category in self.categories]
        self.objects = {image["id"]: [] for image in self.images}
        for entry in checked.content["annotations"]:
            if not entry["iscrowd"]:
                self.objects[entry["image_id"]].append(entry)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        entry = self.images[index]
        pixels = read_entry(entry, resolve(self.root, entry["file_name"]))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        objects = self.objects[entry["id"]]
        labels = [self.category_ids.index(entry["category_id"]) for entry in objects]
        corners = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32)
        corners = corners.reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        size = torch.tensor([image.shape[2], image.shape[1]] * 2)
        boxes = xyxy_to_cxcywh((corners / size).clamp(0, 1))
        return Example(image, Target(torch.tensor(labels, dtype=torch.int64), boxes), entry["id"])


def read_class_names(source: str | Path) -> list[str]:
    """Names of classes in the order of their numbers.

    Args:
        source: "coco" for the 80 of COCO; "coco91" for rows that are COCO's category ids, 0 to 90,
            with "" for those of no class; or a COCO-format json.
    """
    if source == "coco":
        return COCO_CLASSES
    if source == "coco91":
        names = dict(zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True))
        return [names.get(number, "") for number in range(91)]
    categories = sorted(read_annotations(source)["categories"], key=lambda entry: entry["id"])
    return [category["name"] for category in categories]


def to_coco_results(
    detections: Detections, image_ids: list[int], category_ids: list[int]
) -> list[dict]:
    """Detections in COCO's result format: one dict with an xywh box for each."""
    results = []
    for image_id, scores, labels, boxes in zip(image_ids, *detections, strict=True):
        x0, y0, x1, y1 = boxes.unbind(-1)
        xywh = torch.stack([x0, y0, x1 - x0, y1 - y0], -1)
        for score, label, box in zip(scores.tolist(), labels.tolist(), xywh.tolist(), strict=True):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": box,
                    "score": score,
                }
            )
    return results


def evaluate_boxes(annotations: str | Path, results: list[dict]) -> dict[str, float]:
    """COCO's average precision of boxes in percent: AP, AP50, AP75, APs, APm, APl.

    NaN where a figure does not exist, for example APl without large objects.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        found = truth.loadRes(results) if results else COCO()  # loadRes needs one at least
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [100 * value if value >= 0 else float("nan") for value in evaluation.stats[:6]]
    return dict(zip(_AP_NAMES, map(float, values), strict=True))
