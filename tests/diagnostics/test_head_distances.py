"""Grad-CAMs and distances between heads, by hand."""

import math

import pytest
import torch
from tiny import make_memory

from dino_d2.diagnostics.head_distances import (
    draw_head_distances,
    grad_cam,
    head_conflicts,
    head_distances,
)


def test_grad_cam_weighs_channels_by_their_mean_slope():
    memory = make_memory(((2, 2), (1, 1)), (((2, 2), (1, 1)),), embed_dim=2)
    tokens = torch.tensor([[[1, 5], [2, 0], [-3, 0], [0, 4], [2, 2]]]).double().requires_grad_()
    memory = memory._replace(tokens=tokens)
    # The slopes are 3 and -1 in the mean over the finer level; on the coarser one 0 and 1.
    score = 12 * tokens[0, 1, 0] - 4 * tokens[0, 2, 1] + tokens[0, 4, 1]
    fine = torch.tensor([[0, 6], [0, 0]]) / 6  # relu of 3 x - y: -2, 6, -9, -4
    expected = (fine + 1) / 2
    torch.testing.assert_close(grad_cam(score, memory, (2, 2))[0], expected.double())


def test_padding_has_no_part_in_grad_cam():
    memory = make_memory(((1, 3),), (((1, 2),),), embed_dim=1)
    tokens = torch.tensor([[[1.0], [2.0], [9.0]]]).double().requires_grad_()
    memory = memory._replace(tokens=tokens)
    cam = grad_cam(tokens.sum(), memory, (1, 3))
    torch.testing.assert_close(cam, torch.tensor([[[0.5, 1, 0]]]).double())


def test_distances_are_kl_divergences():
    even = torch.tensor([[[0.2, 0.2]]])
    uneven = torch.tensor([[[0.1, 0.1 + math.log(3)]]])  # 1/4 and 3/4
    distances = head_distances({"a": even, "b": uneven}).tolist()
    there = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    back = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distances == [pytest.approx([0, there], abs=1e-6), pytest.approx([back, 0], abs=1e-6)]


def test_distances_are_means_over_images():
    first, second, third = torch.rand(3, 1, 4, 5)
    pairs = [head_distances({"a": first, "b": other}) for other in (second, third)]
    both = {"a": first.repeat(2, 1, 1), "b": torch.cat([second, third])}
    torch.testing.assert_close(head_distances(both), torch.stack(pairs).mean(0))


def test_conflicts_are_mean_distances_there_and_back():
    distances = torch.tensor([[0.0, 1, 2], [3, 0, 4], [5, 6, 0]])
    assert head_conflicts(distances).tolist() == [11 / 4, 14 / 4, 17 / 4]


def test_the_picture_shows_the_numbers(tmp_path, figures):
    draw_head_distances(
        ["detr", "atss"], torch.tensor([[0, 0.0078], [0.0073, 0]]), tmp_path / "x.png"
    )
    (axes,) = figures[0].axes
    assert [t.get_text() for t in axes.texts] == ["0.0000", "0.0078", "0.0073", "0.0000"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["detr", "atss"]
