"""Denoising queries: how many, what they hold, what they stand for and whom they see."""

import numpy as np
import pytest
import torch
from tiny import NUM_CLASSES, tiny_targets

from dino_d2.box_ops import cxcywh_to_xyxy
from dino_d2.losses import Criterion, Group, pack_targets
from dino_d2.transformer import ContrastiveDenoising, Denoising
from dino_d2.types import Predictions

KINDS = [Denoising, ContrastiveDenoising]


def pack(*counts):
    like = torch.zeros((), dtype=torch.float64)
    return pack_targets(tiny_targets(*counts), NUM_CLASSES, like)


def make(kind, num_queries=None, num_groups=None, **settings):
    """Content is one number: the class."""
    denoising = kind(NUM_CLASSES, 1, num_queries, num_groups, **settings).double()
    with torch.no_grad():
        denoising.label_embed.weight.copy_(torch.arange(NUM_CLASSES)[:, None])
    return denoising


def count(noised):
    return noised.queries.anchors.shape[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(3, 5), (1,), (0, 2), (0, 0)], ids=str)
def test_who_sees_whom(kind, counts):
    noised = make(kind, num_groups=3)(pack(*counts))
    number, ordinary = count(noised), 4
    per_group = number // noised.num_groups
    mask = noised.attn_mask(ordinary)
    assert mask.shape == (number + ordinary, number + ordinary)
    for viewer, seen in np.ndindex(*mask.shape):
        if seen >= number:
            blocked = False  # everybody sees ordinary queries
        elif viewer >= number:
            blocked = True  # ordinary queries see no denoising query
        else:
            blocked = viewer // per_group != seen // per_group
        assert mask[viewer, seen].item() == blocked, (viewer, seen)


@pytest.mark.parametrize(
    ("kind", "counts", "groups"),
    [
        (Denoising, (3, 5), 40),
        (ContrastiveDenoising, (3, 5), 20),
        (ContrastiveDenoising, (7,), 14),
        (ContrastiveDenoising, (150, 1), 1),
        (ContrastiveDenoising, (0, 0), 1),
    ],
)
def test_groups_share_the_number_of_queries(kind, counts, groups):
    noised = make(kind, num_queries=200)(pack(*counts))
    assert noised.num_groups == groups
    assert count(noised) == groups * kind.repeats_per_group * max(counts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 6])
def test_number_of_groups_can_be_given(kind, most):
    noised = make(kind, num_groups=7)(pack(most, 1))
    assert noised.num_groups == 7
    assert count(noised) == 7 * kind.repeats_per_group * most


def test_repeats_per_group():
    """A positive for DN-DETR; a positive and a negative for DINO."""
    assert count(make(Denoising, num_groups=1)(pack(3))) == 3
    assert count(make(ContrastiveDenoising, num_groups=1)(pack(3))) == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"num_queries": 200}, {"num_groups": 50}, {"num_queries": 9999}])
@pytest.mark.parametrize("counts", [(1, 2), (30, 4), (101, 3), (1500, 0)], ids=str)
def test_number_of_queries_is_bounded(kind, how, counts):
    noised = make(kind, **how, max_queries=100)(pack(*counts))
    assert 0 < count(noised) <= 100
    assert noised.num_groups >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_of_too_many_objects_a_random_part_is_noised(kind):
    denoising, targets = make(kind, num_queries=10, max_queries=20), pack(3, 40, 2)
    first, second = (denoising(targets).assignment for _ in range(2))
    for assignment in (first, second):
        objects = assignment.target[0]
        assert len(set(objects.tolist())) == len(objects)
        owner = torch.tensor([0] * 3 + [1] * 40 + [2] * 2)
        assert torch.equal(owner[objects], assignment.image)
    assert first.target.tolist() != second.target.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(3, 5), (0, 4), (2, 0, 1), (30, 2)], ids=str)
def test_positive_queries_stand_for_their_objects(kind, counts):
    """Without noise, a query is its object."""
    targets = pack(*counts)
    denoising = make(kind, num_groups=4, label_noise=0, box_noise=0, max_queries=160)
    noised = denoising(targets)
    image, (query,), (target,) = noised.assignment
    assert len(query) == noised.num_groups * sum(counts)
    content = noised.queries.content[image, query, 0]
    torch.testing.assert_close(content, targets.labels[target].double())
    torch.testing.assert_close(noised.queries.anchors[image, query], targets.boxes[target])
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert torch.equal(owner[target], image)


@pytest.mark.parametrize("kind", KINDS)
def test_every_group_holds_every_object_once(kind):
    noised = make(kind, num_groups=3)(pack(2, 4))
    image, (query,), (target,) = noised.assignment
    group = query // (count(noised) // 3)
    assert sorted(zip(group.tolist(), target.tolist(), strict=True)) == [
        (g, t) for g in range(3) for t in range(6)
    ]
    assert len(set(zip(image.tolist(), query.tolist(), strict=True))) == 18


def test_negatives_stand_for_nothing():
    noised = make(ContrastiveDenoising, num_groups=3)(pack(2))
    position = noised.assignment.query[0] % 4  # positive, positive, negative, negative
    assert set(position.tolist()) == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_empty_slots_hold_nothing(kind):
    noised = make(kind, num_groups=2)(pack(0, 3))
    assert not noised.queries.content[0].any()
    assert (noised.queries.anchors[0] == 0.5).all()
    assert (noised.assignment.image == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_empty_slots_are_seen_by_nobody(kind):
    plain, hidden = (make(kind, num_groups=2, hide_empty=h)(pack(1, 3)) for h in (False, True))
    total = count(plain)
    empty = torch.zeros(2, total + 4, dtype=torch.bool)
    empty[0, :total] = ~torch.tensor([True, False, False]).repeat(total // 3)
    assert torch.equal(hidden.attn_mask(4), plain.attn_mask(4) | empty[:, None])
    assert not hidden.attn_mask(4).all(-1).any(), "everyone sees something"


@pytest.mark.parametrize(("kind", "background"), [(Denoising, False), (ContrastiveDenoising, True)])
def test_empty_slots_are_background_or_have_no_loss(kind, background):
    targets = pack(1, 3)
    noised = make(kind, num_groups=2)(targets)
    shape = (1, 2, count(noised))
    boxes = torch.rand(*shape, 4, dtype=torch.float64)
    losses = []
    for score in (-1.0, 2.0):
        logits = torch.zeros(*shape, NUM_CLASSES, dtype=torch.float64)
        logits[0, 0, 1:3] = score  # the empty slots of the first repeat
        group = Group("dn", Predictions(logits, boxes), targets, noised.assignment, 1.0)
        losses.append(Criterion()([group._replace(ignored=noised.ignored)])["loss_class_dn"])
    assert (losses[0] < losses[1]) == background
    assert (losses[0] == losses[1]) != background


@pytest.mark.parametrize("kind", KINDS)
def test_the_indicator_tells_filled_slots(kind):
    denoising = kind(NUM_CLASSES, 4, num_groups=2, label_noise=0, indicator=True).double()
    noised = denoising(pack(1, 3))
    assert denoising.label_embed.weight.shape == (NUM_CLASSES, 3)
    assert noised.queries.content.shape == (2, count(noised), 4)
    filled = torch.tensor([[1.0, 0, 0], [1, 1, 1]]).repeat(1, count(noised) // 3)
    assert torch.equal(noised.queries.content[..., 3], filled.double())
    assert denoising(pack(0, 0)).queries.content.shape == (2, 0, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [{"num_queries": 200}, {"num_groups": 5}])
def test_without_objects_there_are_no_queries_but_a_gradient(kind, how):
    denoising = make(kind, **how)
    noised = denoising(pack(0, 0))
    assert noised.queries.content.shape == (2, 0, 1)
    assert noised.queries.anchors.shape == (2, 0, 4)
    assert noised.assignment.query.shape == noised.assignment.target.shape == (1, 0)
    noised.queries.content.sum().backward()
    assert torch.equal(denoising.label_embed.weight.grad, torch.zeros(NUM_CLASSES, 1).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_share_of_replaced_labels(kind, probability):
    targets = pack(20)
    targets = targets._replace(labels=torch.full((20,), 2))
    denoising = make(kind, num_groups=500, label_noise=probability, max_queries=20_000)
    labels = denoising(targets).queries.content.detach()
    share = [(labels == label).double().mean().item() for label in range(NUM_CLASSES)]
    replaced = probability / NUM_CLASSES  # by each class, the right one too
    expected = [replaced] * NUM_CLASSES
    expected[2] += 1 - probability
    assert share == pytest.approx(expected, abs=0.02 if probability else 0)


def moved_corners(kind, box_noise):
    """How far (B, R, T, 4) corners of boxes far from the border move, in sides."""
    boxes = torch.rand(2, 1, 30, 4, dtype=torch.float64) * 0.05 + 0.1
    boxes[..., :2] += 0.4
    denoising = make(kind, num_groups=1, box_noise=box_noise)
    noised = denoising.noise_boxes(boxes, denoising.draw(2, 40, 30, boxes))
    moved = (cxcywh_to_xyxy(noised) - cxcywh_to_xyxy(boxes)).abs()
    return moved / boxes[..., [2, 3, 2, 3]]


@pytest.mark.parametrize("box_noise", [1.0, 0.4])
def test_corners_of_positives_move_by_up_to_half_a_side(box_noise):
    moved = moved_corners(ContrastiveDenoising, box_noise)[:, 0::2]
    assert moved.max() <= 0.5 * box_noise
    assert moved.max() > 0.48 * box_noise
    assert moved.min() < 0.02 * box_noise


@pytest.mark.parametrize("box_noise", [1.0, 0.4])
def test_corners_of_negatives_move_by_half_to_a_whole_side(box_noise):
    moved = moved_corners(ContrastiveDenoising, box_noise)[:, 1::2]
    assert moved.min() >= 0.5 * box_noise
    assert moved.min() < 0.52 * box_noise
    assert moved.max() <= 1.0 * box_noise
    assert moved.max() > 0.98 * box_noise


@pytest.mark.parametrize(
    ("box_noise", "centre", "size"),
    [(0.4, 0.2, 0.4), ((0.4, 0.4), 0.2, 0.4), ([0.8, 0], 0.4, 0), ((0, 0.3), 0, 0.3)],
    ids=str,
)
def test_dn_moves_centres_by_up_to_half_a_side_and_scales_sides(box_noise, centre, size):
    boxes = torch.tensor([[[[0.5, 0.4, 0.1, 0.2]]]], dtype=torch.float64).repeat(1, 1, 300, 1)
    denoising = make(Denoising, num_groups=1, box_noise=box_noise)
    moved = denoising.noise_boxes(boxes, denoising.draw(1, 2, 300, boxes)) - boxes
    moved = (moved / boxes[..., [2, 3, 2, 3]]).flatten(0, 2)
    bound = torch.tensor([centre, centre, size, size], dtype=torch.float64)
    assert (moved.abs() <= bound + 1e-12).all()
    assert (moved.amax(0) >= 0.95 * bound).all()
    assert (moved.amin(0) <= -0.95 * bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_stay_in_the_image(kind):
    targets = pack(20)
    targets = targets._replace(boxes=torch.rand(20, 4, dtype=torch.float64))
    anchors = make(kind, num_groups=10, box_noise=1.0)(targets).queries.anchors
    assert (anchors > 0).all()
    assert (anchors < 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_noise_of_their_own(kind):
    anchors = make(kind, num_groups=2)(pack(3)).queries.anchors
    first, second = anchors.chunk(2, 1)
    assert (first != second).any(-1).all()


@pytest.mark.parametrize("how", [{}, {"num_queries": 200, "num_groups": 5}], ids=["none", "both"])
def test_either_queries_or_groups_are_given(how):
    with pytest.raises(ValueError, match="either num_queries or num_groups"):
        Denoising(NUM_CLASSES, 4, **how)


@pytest.mark.parametrize(
    ("kind", "box_noise", "allowed"),
    [
        (ContrastiveDenoising, (0.4, 0.2), "a number"),
        (Denoising, (0.4, 0.2, 0.1), "a number or a pair"),
    ],
)
def test_box_noise_of_too_many_numbers_is_an_error(kind, box_noise, allowed):
    with pytest.raises(ValueError, match=f"box_noise of {kind.__name__} must be {allowed}: "):
        make(kind, num_groups=1, box_noise=box_noise)


def test_a_bound_below_one_object_is_an_error():
    with pytest.raises(ValueError, match="max_queries 1 leaves no room"):
        ContrastiveDenoising(NUM_CLASSES, 4, num_queries=10, max_queries=1)
