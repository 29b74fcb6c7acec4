"""Queries that are parameters, and those that two-stage Deformable DETR makes from boxes."""

import numpy as np
import pytest
import torch
from reference import sine_loop
from tiny import add_noise, make_memory
from torch import nn

from dino_d2.transformer import LearnedQueries, ReferencePointQueries, TwoStageQueries
from dino_d2.transformer.query_selection import propose_anchors

SHAPES = ((5, 6), (3, 3))
VALID = (SHAPES, ((3, 4), (2, 2)))  # of each image


def memory():
    return make_memory(SHAPES, VALID)


def learned(*arguments, **settings):
    """The source and its queries for two images."""
    source = LearnedQueries(5, 8, *arguments, **settings).double()
    queries, proposals = source(memory())
    assert proposals is None
    assert queries.positions is None
    return source, queries


def test_learned_queries_are_the_same_whatever_the_image():
    source, queries = learned()
    for image in range(2):
        assert torch.equal(queries.content[image], source.content)
        assert torch.equal(queries.anchors[image], source.anchors.sigmoid())


def test_one_content_for_all_anchors():
    source, queries = learned("shared")
    assert source.content.shape == (1, 8)
    assert torch.equal(queries.content, source.content.expand(2, 5, 8))


def test_no_content():
    source, queries = learned("zero")
    assert queries.content.shape == (2, 5, 8)
    assert not queries.content.any()
    assert [name for name, _ in source.named_parameters()] == ["anchors"]


@pytest.mark.parametrize(("content", "rows"), [("each", 5), ("shared", 1)])
def test_the_indicator_is_a_last_channel_of_zero(content, rows):
    source, queries = learned(content, indicator=True)
    assert source.content.shape == (rows, 7)
    assert torch.equal(queries.content[..., :7], source.content.expand(2, 5, 7))
    assert not queries.content[..., 7].any()


@pytest.mark.parametrize("content", ["each", "shared", "zero"])
def test_every_anchor_appears_once_per_pattern(content):
    """Query p * 5 + i has the anchor i and, added to its content, the pattern p."""
    source, queries = learned(content, num_patterns=3)
    own = torch.zeros(1, 8) if source.content is None else source.content
    assert queries.content.shape == (2, 15, 8)
    for image, pattern, anchor in np.ndindex(2, 3, 5):
        query = pattern * 5 + anchor
        expected = source.patterns[pattern] + own[anchor % len(own)]
        assert torch.equal(queries.content[image, query], expected)
        torch.testing.assert_close(queries.anchors[image, query], source.anchors[anchor].sigmoid())


def test_patterns_reach_the_indicator():
    """As published: they are as wide as the queries."""
    source, queries = learned("shared", indicator=True, num_patterns=2)
    assert torch.equal(queries.content[0, ::5, 7], source.patterns[:, 7])


@pytest.mark.parametrize("content", ["each", "shared", "zero"])
def test_learned_queries_are_trained(content):
    source, queries = learned(content, num_patterns=2)
    (queries.content.sum() + queries.anchors.sum()).backward()
    assert all(parameter.grad.all() for parameter in source.parameters())


def test_unknown_content_is_an_error():
    with pytest.raises(ValueError, match=r"\['each', 'shared', 'zero'\], but is 'random'"):
        LearnedQueries(5, 8, "random")


def test_reference_points_come_from_the_positions():
    source = add_noise(ReferencePointQueries(5, 8).double())
    queries, proposals = source(memory())
    assert proposals is None
    weight, bias = source.reference.weight, source.reference.bias
    points = 1 / (1 + (-source.positions @ weight.T - bias).exp())
    for image in range(2):
        assert torch.equal(queries.content[image], source.content)
        assert torch.equal(queries.positions[image], source.positions)
        torch.testing.assert_close(queries.anchors[image], points)
    queries.anchors.sum().backward()
    assert source.reference.weight.grad.all()
    assert source.positions.grad.all()


@pytest.fixture
def two_stage():
    heads = nn.Linear(8, 5), nn.Linear(8, 4)
    return add_noise(TwoStageQueries(6, 8, *heads).double(), 0.3)


def test_all_tokens_are_proposals(two_stage):
    given = memory()
    _, proposals = two_stage(given)
    anchors, usable = propose_anchors(given)
    tokens = two_stage.norm(two_stage.project(given.tokens * usable[..., None]))
    assert proposals.logits.shape == (1, 2, 39, 5)
    torch.testing.assert_close(proposals.logits[0], two_stage.class_head(tokens))
    torch.testing.assert_close(proposals.boxes[0], (two_stage.box_head(tokens) + anchors).sigmoid())


def test_the_first_class_score_alone_chooses(two_stage):
    assert two_stage.class_agnostic
    with torch.no_grad():
        two_stage.class_head.bias[1:] = 50
    queries, proposals = two_stage(memory())
    best = proposals.logits[0, ..., 0].sort(descending=True).indices[:, :6]
    for image, query in np.ndindex(2, 6):
        box = proposals.boxes[0, image, best[image, query]]
        assert torch.equal(queries.anchors[image, query], box)


def test_positions_and_content_come_from_boxes_alone(two_stage):
    """Encoded as x, y, w, h."""
    queries, _ = two_stage(memory())
    for image, query in np.ndindex(2, 6):
        angles = (2 * np.pi * queries.anchors[image, query]).tolist()
        code = torch.from_numpy(np.concatenate([sine_loop(a, 4, 10000) for a in angles]))
        both = two_stage.from_box_norm(two_stage.from_box(code))
        torch.testing.assert_close(queries.positions[image, query], both[:8])
        torch.testing.assert_close(queries.content[image, query], both[8:])


def test_two_stage_queries_have_no_gradient_to_the_proposals(two_stage):
    given = memory()
    queries, proposals = two_stage(given)
    assert not queries.anchors.requires_grad
    of_proposals = [given.tokens, *two_stage.project.parameters(), *two_stage.box_head.parameters()]
    total = queries.content.square().sum() + queries.positions.sum()
    gradients = torch.autograd.grad(total, of_proposals, allow_unused=True, retain_graph=True)
    assert gradients == (None,) * len(of_proposals)
    assert torch.autograd.grad(total, two_stage.from_box.weight)[0].any()
    (proposals.logits.sum() + proposals.boxes.sum()).backward()
    for tensor in of_proposals:
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_fewer_tokens_than_two_stage_queries(two_stage):
    two_stage.num_queries = 50
    queries, _ = two_stage(memory())
    assert queries.content.shape == queries.positions.shape == (2, 39, 8)
    assert queries.anchors.shape == (2, 39, 4)
