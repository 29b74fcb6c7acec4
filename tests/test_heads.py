"""Class and box heads."""

import pytest
import torch
from tiny import add_noise

from dino_d2.heads import Heads


def logit(x):
    return (x / (1 - x)).log()


@torch.no_grad()
def test_boxes_move_by_what_the_content_says():
    heads = add_noise(Heads(8, 5, 1, shared=True).double())
    content, boxes = torch.randn(2, 3, 8).double(), torch.rand(2, 3, 4).double() * 0.8 + 0.1
    expected = (logit(boxes) + heads.box_heads[0](content)).sigmoid()
    torch.testing.assert_close(heads.refine(0, content, boxes), expected)


@torch.no_grad()
def test_points_become_boxes():
    """Of a size that depends on the content alone."""
    heads = add_noise(Heads(8, 5, 1, shared=True).double())
    content, points = torch.randn(2, 3, 8).double(), torch.rand(2, 3, 2).double() * 0.8 + 0.1
    expected = heads.box_heads[0](content)
    expected[..., :2] += logit(points)
    torch.testing.assert_close(heads.refine(0, content, points), expected.sigmoid())


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_references_at_the_border_move(eps):
    heads = Heads(8, 5, 1, shared=True, eps=eps).double()
    border = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]], dtype=torch.float64)
    refined = heads.refine(0, torch.zeros(1, 1, 8).double(), border)
    expected = border.clamp(min=eps) / (1 + eps)
    torch.testing.assert_close(refined, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_layers_share_their_heads_or_have_their_own(shared):
    heads, content = add_noise(Heads(8, 5, 3, shared)), torch.randn(1, 2, 8)
    scores = [heads.classify(layer, content) for layer in range(3)]
    assert torch.equal(scores[0], scores[2]) == shared
    assert len(heads.class_heads) == len(heads.box_heads) == (1 if shared else 3)
    assert torch.equal(scores[2], heads.class_heads[-1](content))
