"""Assignment against slow literal twins."""

import numpy as np
import pytest
import torch
from golden import read_arrays, read_json
from torchvision.ops import box_iou

from dino_d2.co_heads.assign import (
    assign_adaptively,
    assign_by_iou,
    assign_by_size,
    random_subset,
    sample,
)
from dino_d2.co_heads.boxes import Anchors

NONE = torch.zeros(0, 4, dtype=torch.float64)


def random_boxes(count, seed, extent=100.0):
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(2, count, 2, generator=generator, dtype=torch.float64)
    return torch.cat([corner * extent, corner * extent + size * extent / 2 + 1], 1)


def literal_by_iou(boxes, objects, positive, negative, at_least):
    overlap = box_iou(boxes, objects)
    result = []
    for row in overlap:
        best = int(row.argmax())
        value = float(row[best])
        result.append(best if value >= positive else -1 if value < negative else -2)
    if at_least is not None:
        for t in range(len(objects)):
            best = float(overlap[:, t].max())
            if best >= at_least:
                for a in range(len(boxes)):
                    if float(overlap[a, t]) == best:
                        result[a] = t
    return result


@pytest.mark.parametrize("rule", [(0.7, 0.3, 0.3), (0.5, 0.5, None), (0.5, 0.4, 0.01)])
@pytest.mark.parametrize("seed", range(5))
def test_by_iou(rule, seed):
    boxes, objects = random_boxes(60, seed), random_boxes(6, seed + 100)
    objects[-1] = objects[0]  # equal ones
    assert assign_by_iou(boxes, objects, *rule).tolist() == literal_by_iou(boxes, objects, *rule)
    assert (assign_by_iou(boxes, NONE, *rule) == -1).all()


@pytest.mark.parametrize("case", ["overlap", "extreme", "empty"])
def test_atss_as_the_official_code(case):
    arrays = read_arrays("co_detr/atss_assigner")
    sizes = read_json("co_detr/atss_assigner")["level_sizes"]
    maps = [torch.zeros(1, 1, *size, dtype=torch.float64) for size in sizes]
    levels = Anchors((4, 8, 16, 32, 64, 128), 8)(maps)
    np.testing.assert_allclose(torch.cat(levels), arrays["anchors"])
    objects = torch.from_numpy(arrays[f"{case}.gt"]).double()
    matched = assign_adaptively(levels, objects, 9)
    np.testing.assert_array_equal(matched + 1, arrays[f"{case}.assigned_gt"])


def literal_by_size(levels, objects, ranges, radius):
    result, low = [], 0.0
    for level, high in zip(levels, ranges, strict=True):
        for box in level.tolist():
            x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            reach = radius * (box[2] - box[0]) / 8
            best, smallest = -1, float("inf")
            for number, (x0, y0, x1, y1) in enumerate(objects.tolist()):
                sides = (x - x0, y - y0, x1 - x, y1 - y)
                near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < reach
                fits = low <= max(sides) <= high
                area = (x1 - x0) * (y1 - y0)
                if near and min(sides) > 0 and fits and area < smallest:
                    best, smallest = number, area
            result.append(best)
        low = high
    return result


@pytest.mark.parametrize("seed", range(5))
def test_by_size(seed):
    maps = [torch.zeros(1, 1, 12 >> i, 14 >> i, dtype=torch.float64) for i in range(3)]
    levels, ranges = Anchors((8, 16, 32), 8)(maps), [30.0, 60.0, float("inf")]
    objects = random_boxes(8, seed)
    matched = assign_by_size(levels, objects, ranges, 1.5)
    assert matched.tolist() == literal_by_size(levels, objects, ranges, 1.5)
    assert (matched >= 0).any()
    assert (assign_by_size(levels, NONE, ranges, 1.5) == -1).all()


def test_sample_keeps_order_and_limits():
    matched = torch.tensor([0, -1, -2, 3, -1, 1, -1, -1, 2])
    positives, negatives = sample(matched, 4, 0.5)
    assert len(positives) == 2
    assert len(negatives) == 2
    assert (matched[positives] >= 0).all()
    assert (matched[negatives] == -1).all()
    assert positives.tolist() == sorted(positives.tolist())
    everything = sample(matched, 100, 0.5)
    assert [part.tolist() for part in everything] == [[0, 3, 5, 8], [1, 4, 6, 7]]


def test_random_subset_is_uniform():
    torch.manual_seed(0)
    drawn = torch.cat([random_subset(torch.arange(10, 20), 3) for _ in range(2000)])
    counts = drawn.bincount()[10:]
    assert counts.sum() == 6000
    assert (counts - 600).abs().max() < 120
    assert random_subset(torch.arange(3), 3).tolist() == [0, 1, 2]
