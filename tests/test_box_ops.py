"""Box formats and their arithmetic."""

import math

import pytest
import torch
from reference import generalized_iou_loop
from torchvision.ops import box_iou, generalized_box_iou

from dino_d2.box_ops import (
    cxcywh_to_xyxy,
    generalized_iou,
    inverse_sigmoid,
    iou,
    xyxy_to_cxcywh,
)


def random_boxes(count):
    """cxcywh, from a thousandth to the whole image, many of them apart."""
    centre = torch.rand(count, 2, dtype=torch.float64)
    size = 10 ** (torch.rand(count, 2, dtype=torch.float64) * 3 - 3)
    return torch.cat([centre, size], -1)


def test_corners_of_a_box():
    box = cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 0.2, 0.4]))
    torch.testing.assert_close(box, torch.tensor([0.4, 0.3, 0.6, 0.7]))


def test_conversions_are_inverse_for_any_shape():
    boxes = random_boxes(12).reshape(2, 3, 2, 4)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)


def test_crossed_corners_have_negative_size():
    box = xyxy_to_cxcywh(torch.tensor([0.6, 0.2, 0.4, 0.8]))
    torch.testing.assert_close(box, torch.tensor([0.5, 0.5, -0.2, 0.6]))


def test_inverse_sigmoid_is_the_inverse_between_the_clamps():
    probability = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(probability).sigmoid(), probability)


@pytest.mark.parametrize("probability", [-1.0, 0.0, 1e-5, 0.001])
def test_inverse_sigmoid_is_clamped(probability):
    low, high = inverse_sigmoid(torch.tensor([probability, 1 - probability], dtype=torch.float64))
    assert high == pytest.approx(math.log((1 - max(probability, 0)) / 1e-3))
    assert low == pytest.approx(-high)


def test_inverse_sigmoid_has_a_finite_gradient_at_the_ends():
    probability = torch.tensor([0.0, 1.0], requires_grad=True)
    inverse_sigmoid(probability).sum().backward()
    assert probability.grad.isfinite().all()


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_generalized_iou_equals_a_loop(eps):
    a, b = random_boxes(20), random_boxes(15)
    expected = generalized_iou_loop(a.tolist(), b.tolist(), eps)
    actual = generalized_iou(a[:, None], b, eps)
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


def test_generalized_iou_equals_torchvision():
    a, b = random_boxes(20), random_boxes(15)
    expected = generalized_box_iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))
    torch.testing.assert_close(generalized_iou(a[:, None], b, eps=0), expected)


def test_generalized_iou_of_points_is_finite():
    point = torch.tensor([0.5, 0.5, 0.0, 0.0], requires_grad=True)
    value = generalized_iou(point, point.detach())
    value.backward()
    assert value.isfinite()
    assert point.grad.isfinite().all()


def test_generalized_iou_by_default_adds_what_dino_adds():
    """A box of 4 x 4 pixels in 1333 x 800 loses several percent."""
    box = torch.tensor([0.5, 0.5, 4 / 1333, 4 / 800], dtype=torch.float64)
    area = (box[2] * box[3]).item()
    assert generalized_iou(box, box).item() == pytest.approx(area / (area + 1e-6))


def test_iou():
    torch.manual_seed(0)
    a, b = torch.rand(2, 30, 4, dtype=torch.float64)
    expected = box_iou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)).diagonal()
    torch.testing.assert_close(iou(a, b), expected)
    tiny = torch.tensor([0.5, 0.5, 0.0005, 0.001])
    assert iou(tiny, tiny).item() == pytest.approx(0.5, rel=1e-5)  # its area is half of eps
