"""Where deformable decoder layers are told that queries are."""

import numpy as np
import pytest
import torch
from reference import sine_loop
from tiny import add_noise, make_memory

from dino_d2.transformer import BoxPositions, GivenPositions
from dino_d2.types import Queries

SHAPES = ((5, 6), (3, 3))
VALID = (SHAPES, ((3, 4), (2, 2)))  # of each image


def random_queries(coordinates):
    content, positions = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    return Queries(content, torch.rand(2, 3, coordinates, dtype=torch.float64), positions)


def relative_to_maps(anchors):
    """(B, Q, L, 2 or 4), one number at a time."""
    batch, count, coordinates = anchors.shape
    result = torch.zeros(batch, count, 2, coordinates, dtype=torch.float64)
    for b, q, level, c in np.ndindex(*result.shape):
        side = 1 - c % 2  # x and width go with the width
        result[b, q, level, c] = anchors[b, q, c] * VALID[b][level][side] / SHAPES[level][side]
    return result


@pytest.mark.parametrize("coordinates", [2, 4])
def test_given_positions_stay(coordinates):
    queries = random_queries(coordinates)
    for index in (0, 3):
        places = GivenPositions()(index, queries.content, queries, make_memory(SHAPES, VALID))
        assert places[0] is queries.positions
        torch.testing.assert_close(places[1], relative_to_maps(queries.anchors))


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_positions_of_boxes_equal_a_literal_computation(scaled, padded, index):
    """Relative to the finest padded map or to the image; weighed from the second layer on."""
    placement = add_noise(BoxPositions(8, scaled, padded).double(), 0.3)
    queries = random_queries(4)
    positions, on_levels = placement(index, queries.content, queries, make_memory(SHAPES, VALID))
    expected = relative_to_maps(queries.anchors)
    torch.testing.assert_close(on_levels, expected)
    boxes = expected[:, :, 0] if padded else queries.anchors
    for b, q in np.ndindex(2, 3):
        x, y, width, height = (2 * np.pi * boxes[b, q]).tolist()
        codes = [sine_loop(angle, 4, 10000) for angle in (y, x, width, height)]
        wanted = placement.mlp(torch.from_numpy(np.concatenate(codes)))
        if scaled and index:
            wanted = wanted * placement.scale(queries.content[b, q])
        torch.testing.assert_close(positions[b, q], wanted)
