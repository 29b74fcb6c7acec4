import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from dino_d2.co_heads.boxes import Anchors, DeltaCoder, DistanceCoder, clip


def test_anchors_by_hand():
    anchors = Anchors((4, 8), scale=2, scales_per_octave=2, ratios=(0.5, 1.0))
    maps = [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 2)]
    levels = anchors(maps)
    assert anchors.per_cell == 4
    assert [len(level) for level in levels] == [24, 8]
    for cell, (x, y) in enumerate([(0, 0), (4, 0), (8, 0), (0, 4), (4, 4), (8, 4)]):
        for number, (ratio, side) in enumerate(
            [(0.5, 8), (0.5, 8 * 2**0.5), (1, 8), (1, 8 * 2**0.5)]
        ):
            width, height = side / math.sqrt(ratio), side * math.sqrt(ratio)
            expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            assert levels[0][4 * cell + number].tolist() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(levels[1][2], torch.tensor([-8.0, -8, 8, 8]))


def test_as_many_maps_as_strides():
    with pytest.raises(ValueError, match="1 maps for anchors of 2 strides"):
        Anchors((4, 8), 8)([torch.zeros(1, 1, 2, 3)])


@pytest.mark.parametrize("size", [(12, 8), (9, 5), (8, 4), (1, 1), (99, 99)])
def test_inside_is_every_cell_that_begins_in_the_image(size):
    anchors = Anchors((4,), 8, ratios=(0.5, 1.0))
    (inside,) = anchors.inside([torch.zeros(1, 1, 3, 4)], size)
    expected = [
        2 * (4 * row + column) + number
        for row in range(3)
        for column in range(4)
        for number in range(2)
        if 4 * column < size[0] and 4 * row < size[1]
    ]
    assert inside.tolist() == expected


def test_deltas_are_torchvisions():
    torch.manual_seed(0)
    corner, size = torch.rand(2, 20, 2, dtype=torch.float64) * 50 + 1
    anchors = torch.cat([corner, corner + size], 1)
    boxes = anchors.flip(0)
    ours, theirs = DeltaCoder((0.1, 0.1, 0.2, 0.2)), BoxCoder((10.0, 10.0, 5.0, 5.0))
    deltas = ours.encode(anchors, boxes)
    torch.testing.assert_close(deltas, theirs.encode_single(boxes, anchors))
    torch.testing.assert_close(ours.decode(anchors, deltas), boxes)
    wild = deltas * 30  # scales beyond the limit
    decoded = theirs.decode_single(wild.clamp(min=-20), anchors)
    torch.testing.assert_close(
        ours.decode(anchors, wild.clamp(min=-20))[:, 2:].isfinite(), decoded[:, 2:].isfinite()
    )


def test_distances_by_hand():
    anchors = torch.tensor([[0.0, 0.0, 16.0, 16.0]])  # stride 2
    distances = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
    decoded = DistanceCoder(8).decode(anchors, distances)
    torch.testing.assert_close(decoded, torch.tensor([[6.0, 4.0, 14.0, 16.0]]))


def test_clip():
    boxes = torch.tensor([[-1.0, 2.0, 30.0, 9.0]])
    torch.testing.assert_close(clip(boxes, (20, 5)), torch.tensor([[0.0, 2.0, 20.0, 5.0]]))
