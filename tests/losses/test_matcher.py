"""Matching against the official one and against all permutations."""

from itertools import permutations

import numpy as np
import pytest
import torch
from criterion_unit import ARRAYS, LAYERS, VARIANTS, make_predictions, make_targets
from golden import pairs_of
from tiny import NUM_CLASSES, tiny_targets

from dino_d2.errors import NonFiniteError
from dino_d2.losses import HungarianMatcher, pack_targets
from dino_d2.types import Predictions

GROUPS = ("decoder", "encoder proposals")


def random_problem(num_queries, *counts, num_layers=2):
    shape = (num_layers, len(counts), num_queries)
    boxes = torch.rand(*shape, 4, dtype=torch.float64) * 0.5 + 0.1
    predictions = Predictions(torch.randn(*shape, NUM_CLASSES, dtype=torch.float64), boxes)
    return predictions, pack_targets(tiny_targets(*counts), NUM_CLASSES, boxes)


def match(predictions, targets):
    return HungarianMatcher()({"decoder": (predictions, targets)})["decoder"]


@pytest.mark.parametrize("group", GROUPS)
def test_official_costs(group):
    predictions, targets = make_predictions(group), make_targets("train_dn")
    for image in range(2):
        cost = HungarianMatcher().cost(predictions, targets, image).detach()
        for layer, name in zip(cost, LAYERS[group], strict=True):
            expected = ARRAYS[f"train_dn.cost.{name}.{image}"]
            np.testing.assert_allclose(layer, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_matching(variant):
    targets = make_targets(variant)
    matched = HungarianMatcher()({g: (make_predictions(g), targets) for g in GROUPS})
    for group in GROUPS:
        for layer, name in enumerate(LAYERS[group]):
            for image in range(2):
                query, target = pairs_of(matched[group], targets.counts, layer, image)
                prefix = f"{variant}.match.{name}.{image}"
                np.testing.assert_array_equal(query, ARRAYS[f"{prefix}.query"])
                np.testing.assert_array_equal(target, ARRAYS[f"{prefix}.target"])


@pytest.mark.parametrize("counts", [(3, 2), (4, 1), (5, 3), (0, 6)], ids=str)
def test_no_permutation_costs_less(counts):
    predictions, targets = random_problem(4, *counts)
    assignment = match(predictions, targets)
    for layer, image in np.ndindex(2, 2):
        cost = HungarianMatcher().cost(predictions, targets, image)[layer]
        cost = cost if cost.shape[0] >= cost.shape[1] else cost.T
        best = min(
            sum(cost[row, column].item() for column, row in enumerate(rows))
            for rows in permutations(range(cost.shape[0]), cost.shape[1])
        )
        query, target = pairs_of(assignment, targets.counts, layer, image)
        cost = HungarianMatcher().cost(predictions, targets, image)[layer]
        assert cost[query, target].sum().item() == pytest.approx(best)


@pytest.mark.parametrize("counts", [(3, 2), (7, 4), (1, 0, 9)], ids=str)
def test_one_query_per_object_and_one_object_per_query(counts):
    predictions, targets = random_problem(4, *counts)
    assignment = match(predictions, targets)
    for layer in range(2):
        for image, count in enumerate(counts):
            query, target = pairs_of(assignment, targets.counts, layer, image)
            assert len(set(query.tolist())) == len(set(target.tolist())) == min(count, 4)
            assert set(query.tolist()) <= set(range(4))
            assert set(target.tolist()) <= set(range(count))


@pytest.mark.parametrize("counts", [(0, 2), (2, 0), (0, 0)], ids=str)
def test_images_without_objects_match_nothing(counts):
    assignment = match(*random_problem(4, *counts))
    assert assignment.query.shape == assignment.target.shape == (2, sum(counts))
    assert assignment.image.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]


def test_an_image_is_matched_with_its_own_objects_only():
    """Predictions of image 0 that fit the object of image 1 perfectly."""
    predictions, targets = random_problem(4, 1, 1)
    predictions.boxes[:, 0] = targets.boxes[1]
    expected = match(*random_problem_of_image(predictions, targets, 0))
    query, target = pairs_of(match(predictions, targets), targets.counts, 0, 0)
    assert target.tolist() == [0]
    assert query.tolist() == expected.query[0].tolist()


def random_problem_of_image(predictions, targets, image):
    alone = Predictions(*(part[:, image : image + 1] for part in predictions))
    start = sum(targets.counts[:image])
    rows = slice(start, start + targets.counts[image])
    return alone, targets._replace(
        labels=targets.labels[rows], boxes=targets.boxes[rows], counts=(targets.counts[image],)
    )


def test_the_weights_of_the_costs_count():
    """Query 0 has the box, query 1 the class."""
    _, targets = random_problem(2, 1)
    logits = torch.full((1, 1, 2, NUM_CLASSES), -4.0, dtype=torch.float64)
    logits[..., 1, targets.labels[0]] = 4
    boxes = torch.stack([targets.boxes[0], torch.tensor([0.9, 0.9, 0.1, 0.1]).double()])
    matched = {"decoder": (Predictions(logits, boxes[None, None]), targets)}
    by_box = HungarianMatcher(class_cost=0)(matched)["decoder"]
    by_class = HungarianMatcher(box_cost=0, giou_cost=0)(matched)["decoder"]
    assert (by_box.query.item(), by_class.query.item()) == (0, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("part", ["logits", "boxes"])
def test_predictions_that_are_not_finite_are_named(part, value):
    predictions, targets = random_problem(4, 1, 2, 0, num_layers=3)
    getattr(predictions, part)[1, 2, 3, 0] = value
    what = {"logits": "class scores", "boxes": "boxes"}[part]
    message = f"non-finite {what} in decoder layer 1 for image 2 of the batch"
    with pytest.raises(NonFiniteError, match=message) as error:
        match(predictions, targets)
    assert error.value.image == 2


@pytest.mark.parametrize("name", ["encoder proposals", "denoising"])
def test_groups_that_are_not_finite_are_named(name):
    good, targets = random_problem(4, 1, 2)
    bad = Predictions(good.logits[:1].clone(), good.boxes[:1])
    bad.logits[0, 0, 0, 0] = torch.nan
    matched, checked = {"decoder": (good, targets)}, {}
    if name == "denoising":
        checked[name] = bad
    else:
        matched[name] = bad, targets
    with pytest.raises(NonFiniteError, match=f"class scores in {name} for image 0"):
        HungarianMatcher()(matched, checked)


def test_groups_that_are_only_checked_are_not_matched():
    predictions, targets = random_problem(4, 1)
    given = {"decoder": (predictions, targets)}
    assert set(HungarianMatcher()(given, {"denoising": predictions})) == {"decoder"}


def test_groups_are_matched_with_their_own_objects():
    """Several at once as each by itself: other classes, other numbers of objects and queries."""
    problems = {name: random_problem(4 + n, 3 - n, n) for n, name in enumerate("abc")}
    together = HungarianMatcher()(problems)
    for name, problem in problems.items():
        for actual, expected in zip(together[name], match(*problem), strict=True):
            assert torch.equal(actual, expected)


def test_confident_half_precision_scores_have_finite_costs():
    """The sigmoid of 20 is 1 in float16, and log(1 - 1 + 1e-8) is not finite there."""
    _, targets = random_problem(3, 2)
    targets = targets._replace(boxes=targets.boxes.float())
    logits = torch.full((1, 1, 3, NUM_CLASSES), 20, dtype=torch.float16)
    predictions = Predictions(logits, torch.full((1, 1, 3, 4), 0.5, dtype=torch.float16))
    assert HungarianMatcher().cost(predictions, targets, 0).isfinite().all()
