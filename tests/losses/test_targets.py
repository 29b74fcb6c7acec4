"""What a batch's targets must be like; every error names the image."""

import numpy as np
import pytest
import torch

from dino_d2.errors import TargetError
from dino_d2.losses import pack_targets
from dino_d2.types import Target

GOOD = Target(torch.tensor([0, 4]), torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.6]]))


def box(*values):
    """Two objects, the second with this box."""
    return GOOD._replace(boxes=torch.tensor([[0.5, 0.5, 0.2, 0.2], values]))


FAULTS = {
    "class id too large": (GOOD._replace(labels=torch.tensor([0, 5])), "class id 5 is out of"),
    "class id negative": (GOOD._replace(labels=torch.tensor([-1, 0])), "class id -1 is out of"),
    "labels two-dimensional": (GOOD._replace(labels=GOOD.labels[:, None]), r"\(2, 1\)"),
    "labels too few": (GOOD._replace(labels=GOOD.labels[:1]), r"\(1,\) and \(2, 4\)"),
    "boxes of five": (GOOD._replace(boxes=torch.rand(2, 5)), r"\(2, 5\)"),
    "boxes flat": (GOOD._replace(boxes=torch.rand(8)), r"\(8,\)"),
    "labels in float": (GOOD._replace(labels=torch.tensor([0.0, 4.0])), "integers, not float32"),
    "labels in bool": (GOOD._replace(labels=torch.tensor([True, False])), "integers, not bool"),
    "boxes in integers": (GOOD._replace(boxes=torch.ones(2, 4).int()), "float64, not torch.int32"),
    "boxes in bfloat16": (GOOD._replace(boxes=GOOD.boxes.bfloat16()), "not torch.bfloat16"),
    "box of slightly negative size": (box(0.5, 0.5, -5e-4, 0.2), "box 1 "),
    "box is NaN": (box(0.5, np.nan, 0.2, 0.2), r"box 1 is \[0.5, nan"),
    "box is infinite": (box(0.5, 0.5, 0.2, np.inf), "box 1 .* must be finite"),
    "box in pixels": (box(50.0, 60.0, 20.0, 30.0), "box 1 .* relative to the image"),
    "box of negative size": (box(0.5, 0.5, -0.2, 0.2), "box 1 "),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("image", [0, 2])
def test_faults_are_named_with_their_image(fault, image):
    target, message = FAULTS[fault]
    targets = [GOOD, GOOD, GOOD]
    targets[image] = target
    with pytest.raises(TargetError, match=message) as error:
        pack_targets(targets, 5, torch.zeros(()))
    assert f"targets of image {image} of the batch" in str(error.value)
    assert error.value.image == image


def test_the_range_of_classes_is_said():
    with pytest.raises(TargetError, match="the model has 4 classes, 0 to 3"):
        pack_targets([GOOD], 4, torch.zeros(()))


def test_images_follow_one_another():
    empty = Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    packed = pack_targets([GOOD, empty, GOOD], 5, torch.zeros(()))
    assert packed.counts == (2, 0, 2)
    assert torch.equal(packed.labels, torch.cat([GOOD.labels, GOOD.labels]))
    assert torch.equal(packed.boxes, torch.cat([GOOD.boxes, GOOD.boxes]))


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_boxes_are_at_least_float32(like, expected):
    packed = pack_targets([GOOD], 5, torch.zeros((), dtype=like))
    assert packed.boxes.dtype == expected


def test_labels_of_any_integer_type():
    packed = pack_targets([GOOD._replace(labels=GOOD.labels.to(torch.uint8))], 5, torch.zeros(()))
    assert packed.labels.dtype == torch.int64


def test_rounding_beyond_the_image_is_allowed():
    packed = pack_targets([box(0.5, 0.5, 1.0000001, 1.0)], 5, torch.zeros(()))
    assert packed.counts == (2,)
