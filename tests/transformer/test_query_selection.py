"""Queries from the best tokens of the memory."""

import math

import numpy as np
import pytest
import torch
from tiny import make_memory
from torch import nn

from dino_d2.transformer import QuerySelection
from dino_d2.transformer.query_selection import propose_anchors

SHAPES = ((5, 6), (3, 3))
VALID = (((5, 6), (3, 3)), ((3, 4), (2, 2)))  # (height, width) of each image and level


def make_selection(num_queries=10, content="learned", padding_last=False):
    heads = nn.Linear(8, 5), nn.Linear(8, 4)
    return QuerySelection(num_queries, 8, *heads, content, padding_last).double()


class PrefersNothing(nn.Module):
    """Scores the feature of an empty token 0 and all others less."""

    def __init__(self, selection):
        super().__init__()
        self.selection = [selection]

    def forward(self, tokens):
        (selection,) = self.selection
        nothing = selection.norm(selection.project.bias)
        return -(tokens - nothing).abs().sum(-1, keepdim=True)


def test_proposed_anchors_follow_their_definition():
    """60 cells to a side: the centre of the first one is below 0.01."""
    shapes, valid = ((60, 60), (2, 3)), (((60, 60), (2, 3)), ((30, 20), (1, 2)))
    anchors, usable = propose_anchors(make_memory(shapes, valid))
    for image, sizes in enumerate(valid):
        token = 0
        for level, ((rows, columns), (height, width)) in enumerate(zip(shapes, sizes, strict=True)):
            side = 0.05 * 2**level
            for i, j in np.ndindex(rows, columns):
                box = ((j + 0.5) / width, (i + 0.5) / height, side, side)
                inside = i < height and j < width and all(0.01 < c < 0.99 for c in box)
                assert usable[image, token] == inside
                expected = [math.log(c / (1 - c)) if inside else math.inf for c in box]
                assert anchors[image, token].tolist() == pytest.approx(expected, abs=1e-12)
                token += 1


def test_the_best_tokens_are_chosen_best_first():
    """Those of padding and of the border score with an empty feature."""
    selection, memory = make_selection(), make_memory(SHAPES, VALID)
    _, usable = propose_anchors(memory)
    _, proposals = selection(memory)
    tokens = memory.tokens.masked_fill(~usable[..., None], 0)
    scores = selection.class_head(selection.norm(selection.project(tokens))).amax(-1)
    best = scores.sort(descending=True).values[:, :10]
    torch.testing.assert_close(proposals.logits[0].amax(-1), best)


def test_boxes_belong_to_their_scores():
    selection, memory = make_selection(), make_memory(SHAPES, VALID)
    _, proposals = selection(memory)
    anchors, usable = propose_anchors(memory)
    features = selection.norm(selection.project(memory.tokens.masked_fill(~usable[..., None], 0)))
    logits, boxes = selection.class_head(features), selection.box_head(features) + anchors
    for image, query in np.ndindex(2, 10):
        same = (logits[image] - proposals.logits[0, image, query]).abs().amax(-1) < 1e-12
        torch.testing.assert_close(
            proposals.boxes[0, image, query], boxes[image, same][0].sigmoid()
        )


@pytest.mark.parametrize("content", ["learned", "memory"])
def test_fewer_tokens_than_queries(content):
    queries, proposals = make_selection(50, content)(make_memory(SHAPES, VALID))
    assert queries.content.shape == (2, 39, 8)
    assert queries.anchors.shape == (2, 39, 4)
    assert proposals.logits.shape == (1, 2, 39, 5)
    assert proposals.boxes.isfinite().all()


@pytest.mark.parametrize("padding_last", [False, True])
def test_padding_is_chosen_last_if_asked_to(padding_last):
    """However well its empty feature scores."""
    selection = make_selection(30, padding_last=padding_last)
    selection.class_head = PrefersNothing(selection)
    _, proposals = selection(make_memory(SHAPES, VALID))
    is_empty = proposals.logits[0, 1, :, 0] == 0  # padding, and the border if there is any
    assert is_empty[-1] == padding_last
    assert is_empty[0] != padding_last


def test_tokens_of_padding_do_not_matter():
    selection, memory = make_selection(30), make_memory(SHAPES, VALID)
    changed = memory.tokens.masked_fill(memory.padding_mask[..., None], 1e3)
    for expected, actual in zip(
        selection(memory), selection(memory._replace(tokens=changed)), strict=True
    ):
        assert all(map(torch.equal, expected[:2], actual[:2]))


def test_mixed_selection_has_learned_content_in_order():
    selection = make_selection(50)
    queries, _ = selection(make_memory(SHAPES, VALID))
    for image in range(2):
        assert torch.equal(queries.content[image], selection.content[:39])


def test_pure_selection_has_the_content_of_the_memory():
    selection, memory = make_selection(content="memory"), make_memory(SHAPES, VALID)
    queries, proposals = selection(memory)
    torch.testing.assert_close(selection.class_head(queries.content), proposals.logits[0])
    assert selection.content is None


@pytest.mark.parametrize("content", ["learned", "memory"])
def test_queries_have_no_gradient_to_the_proposals(content):
    selection, memory = make_selection(content=content), make_memory(SHAPES, VALID)
    queries, _ = selection(memory)
    assert not queries.anchors.requires_grad
    assert queries.content.requires_grad == (content == "learned")
    if content == "learned":
        trained = [memory.tokens, *selection.project.parameters(), *selection.box_head.parameters()]
        gradients = torch.autograd.grad(queries.content.sum(), trained, allow_unused=True)
        assert gradients == (None,) * len(trained)


def test_proposals_train_the_memory_and_their_heads():
    selection, memory = make_selection(), make_memory(SHAPES, VALID)
    _, proposals = selection(memory)
    (proposals.logits.sum() + proposals.boxes.sum()).backward()
    heads = [*selection.class_head.parameters(), *selection.box_head.parameters()]
    for tensor in (memory.tokens, *heads, *selection.project.parameters()):
        assert tensor.grad.any()
    assert not memory.tokens.grad[memory.padding_mask].any()


def test_padding_among_the_queries_has_a_finite_gradient():
    selection, memory = make_selection(50), make_memory(SHAPES, VALID)
    _, proposals = selection(memory)
    (proposals.logits.sum() + proposals.boxes.sum()).backward()
    assert memory.tokens.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in selection.box_head.parameters())


def test_unknown_content_is_an_error():
    with pytest.raises(ValueError, match="'random'"):
        make_selection(content="random")
