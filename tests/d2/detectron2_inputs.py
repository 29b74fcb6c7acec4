"""A tiny DINO as a Detectron2 model, and what its data mapper would give it."""

import torch
from tiny import tiny_dino


def tiny_model(**settings):
    """In training mode; any image size will do."""
    from dino_d2.d2 import DINO

    detector = tiny_dino(torch.float32)
    detector.backbone.size_divisibility = 0
    return DINO(detector=detector, num_detections=7, **settings)


def make_input(height=64, width=96, boxes=((8, 8, 40, 32),), classes=None, **facts):
    """A training example as Detectron2's mapper makes them."""
    from detectron2.structures import Boxes, Instances

    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes or [1] * len(boxes), dtype=torch.int64)
    image = torch.randint(256, (3, height, width)).to(torch.uint8)
    return {"image": image, "instances": instances, "height": height, "width": width, **facts}
