"""The criterion against the official one, its definition, and its promises about names."""

import math

import numpy as np
import pytest
import torch
from criterion_unit import ARRAYS, LAYERS, VARIANTS, make_predictions, make_targets
from golden import read_json
from reference import focal_loss_loop
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from dino_d2.box_ops import iou
from dino_d2.losses import Criterion, Group, HungarianMatcher
from dino_d2.losses.focal import quality_focal_loss, sigmoid_focal_loss
from dino_d2.processes import average_count
from dino_d2.transformer import ContrastiveDenoising
from dino_d2.types import Assignment, Predictions, Targets

WEIGHTS = read_json("dino/criterion_unit")["weight_dict"]
NAMES = {"class": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou"}
SUFFIXES = {"": "", "enc": "_interm", "dn": "_dn"}  # ours -> official


def run(variant):
    """The losses of a variant, and the predictions of its groups."""
    targets = make_targets(variant)
    predictions = {group: make_predictions(group) for group in LAYERS}
    matched = {"": "decoder", "enc": "encoder proposals"}
    matched = {name: (predictions[group], targets) for name, group in matched.items()}
    assignments = HungarianMatcher()(matched)
    count = average_count(len(targets.labels), targets.boxes)
    groups = [Group(name, *given, assignments[name], count) for name, given in matched.items()]
    if VARIANTS[variant]["dn"]:
        known = ContrastiveDenoising(91, 4, num_groups=2).double()(targets).assignment
        groups.append(Group("dn", predictions["denoising"], targets, known, 2 * count))
    return Criterion()(groups), predictions


def official_losses(variant, groups):
    """The weighted losses by our names."""
    expected = {}
    for (kind, name), suffix in ((n, s) for n in NAMES.items() for s in groups):
        for layer in ("", "_0", "_1"):
            official = f"{name}{SUFFIXES[suffix]}{layer}"
            if official in VARIANTS[variant]["losses"]:
                ours = f"loss_{kind}{'_' if suffix else ''}{suffix}{layer}"
                loss = VARIANTS[variant]["losses"][official]
                expected[ours] = WEIGHTS[official] * loss
    return expected


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "world2"])
def test_official_losses(variant):
    losses, _ = run(variant)
    groups = ("", "enc", "dn") if VARIANTS[variant]["dn"] else ("", "enc")
    actual = {name: loss.item() for name, loss in losses.items()}
    assert actual == pytest.approx(official_losses(variant, groups), rel=1e-10, abs=1e-12)
    assert sum(actual.values()) == pytest.approx(VARIANTS[variant]["total"], rel=1e-10)


def test_official_losses_of_one_process_of_two(as_rank_of_two):
    losses, _ = run("world2")
    assert sum(losses.values()).item() == pytest.approx(VARIANTS["world2"]["total"], rel=1e-10)


def test_official_gradients():
    losses, predictions = run("train_dn")
    sum(losses.values()).backward()
    for group, names in LAYERS.items():
        for part in ("logits", "boxes"):
            gradient = getattr(predictions[group], part).grad
            for layer, name in enumerate(names):
                expected = ARRAYS[f"train_dn.grad.{name}.{part}"]
                np.testing.assert_allclose(gradient[layer], expected, rtol=1e-9, atol=1e-12)


TARGETS = Targets(
    torch.tensor([2, 0]),
    torch.tensor([[0.5, 0.5, 0.3, 0.2], [0.2, 0.7, 0.1, 0.2]], dtype=torch.float64),
    (2,),
)


def make_group(name="", num_layers=2, **settings):
    """Every layer predicts the same; queries 1 and 2 of one image answer for objects 1 and 0."""
    logits = torch.randn(1, 1, 4, 3, dtype=torch.float64).repeat(num_layers, 1, 1, 1)
    boxes = torch.rand(1, 1, 4, 4, dtype=torch.float64).repeat(num_layers, 1, 1, 1)
    rows = torch.tensor([[1, 2]]), torch.tensor([[1, 0]])
    assignment = Assignment(torch.tensor([0, 0]), *(row.repeat(num_layers, 1) for row in rows))
    settings = {"normalizer": 1.0, **settings}
    return Group(name, Predictions(logits, boxes), TARGETS, assignment, **settings)


@pytest.mark.parametrize("num_layers", [1, 2, 7])
def test_every_layer_is_weighted_whatever_their_number(num_layers):
    losses = Criterion()([make_group("dn", num_layers)])
    layers = ["", *(f"_{layer}" for layer in range(num_layers - 1))]
    kinds = ("class", "bbox", "giou")
    assert set(losses) == {f"loss_{kind}_dn{layer}" for kind in kinds for layer in layers}
    for kind in kinds:
        values = [losses[f"loss_{kind}_dn{layer}"].item() for layer in layers]
        assert values == pytest.approx([values[0]] * num_layers)
        assert values[0] > 0


def test_losses_follow_their_definition():
    group = make_group(num_layers=1)
    losses = Criterion(2, 3, 5)([group])
    scores = np.zeros((4, 3))
    scores[1, 0] = scores[2, 2] = 1  # the classes of objects 1 and 0
    focal = focal_loss_loop(group.predictions.logits[0, 0].numpy(), scores, 0.25, 2)
    assert losses["loss_class"].item() == pytest.approx(2 * focal.sum())
    distance = (group.predictions.boxes[0, 0, [1, 2]] - TARGETS.boxes[[1, 0]]).abs().sum()
    assert losses["loss_bbox"].item() == pytest.approx(3 * distance.item())


def test_weight_and_normalizer_scale_all_losses_of_a_group():
    group = make_group()
    plain = Criterion()([group])
    scaled = Criterion()([group._replace(weight=6.0, normalizer=torch.tensor(2.0))])
    for name, loss in plain.items():
        torch.testing.assert_close(scaled[name], 3 * loss)


def test_an_assignment_of_one_layer_serves_all():
    group = make_group(num_layers=3)
    once = group.assignment._replace(
        query=group.assignment.query[:1], target=group.assignment.target[:1]
    )
    expected = Criterion()([group])
    for name, loss in Criterion()([group._replace(assignment=once)]).items():
        assert torch.equal(loss, expected[name])


def test_every_group_has_objects_of_its_own():
    group = make_group()
    other = group._replace(name="other", targets=TARGETS._replace(labels=torch.tensor([1, 1])))
    losses = Criterion()([group, other])
    assert losses["loss_bbox_other"] == losses["loss_bbox"]
    scores = np.zeros((4, 3))
    scores[[1, 2], 1] = 1
    focal = focal_loss_loop(group.predictions.logits[0, 0].numpy(), scores, 0.25, 2)
    assert losses["loss_class_other"].item() == pytest.approx(focal.sum())


def test_ignored_queries_are_not_even_background():
    group = make_group(num_layers=1)
    scores = np.zeros((4, 3))
    scores[1, 0] = scores[2, 2] = 1
    focal = focal_loss_loop(group.predictions.logits[0, 0].numpy(), scores, 0.25, 2)
    ignored = torch.tensor([[False, False, False, True]])
    losses = Criterion()([group._replace(ignored=ignored)])
    assert losses["loss_class"].item() == pytest.approx(focal[:3].sum())
    assert losses["loss_bbox"] == Criterion()([group])["loss_bbox"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_computed_in_single(dtype):
    group = make_group()
    half = Predictions(*(part.to(dtype) for part in group.predictions))
    targets = TARGETS._replace(boxes=TARGETS.boxes.float())
    group = group._replace(predictions=half, targets=targets)
    for loss in Criterion()([group]).values():
        assert loss.dtype == torch.float32


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.7, 0.0), (0.5, 1.5)])
def test_focal_loss(alpha, gamma):
    logits = torch.randn(6, 5, dtype=torch.float64) * 3
    scores = torch.randint(2, (6, 5)).double()
    actual = sigmoid_focal_loss(logits, scores, alpha, gamma)
    expected = focal_loss_loop(logits.numpy(), scores.numpy(), alpha, gamma)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    torch.testing.assert_close(actual, torchvision_focal_loss(logits, scores, alpha, gamma))


def test_focal_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([-200.0, 200.0]).repeat(2).requires_grad_()
    loss = sigmoid_focal_loss(logits, torch.tensor([0.0, 0.0, 1.0, 1.0]), 0.25, 2.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_quality_focal_loss():
    """Literal, and the focal loss without its alpha where the qualities are 0 and 1."""
    logits = torch.randn(6, 5, dtype=torch.float64) * 3
    scores = torch.rand(6, 5, dtype=torch.float64)
    actual = quality_focal_loss(logits, scores, 2.0)
    for logit, score, loss in zip(
        logits.flatten(), scores.flatten(), actual.flatten(), strict=True
    ):
        p = 1 / (1 + math.exp(-logit))
        entropy = -(score * math.log(p) + (1 - score) * math.log(1 - p))
        assert loss.item() == pytest.approx(abs(score - p) ** 2 * entropy)
    scores = scores.round()
    plain = sigmoid_focal_loss(logits, scores, 0.5, 2.0) * 2
    torch.testing.assert_close(quality_focal_loss(logits, scores, 2.0), plain)


def test_quality_is_the_overlap_of_the_box():
    """It is a target, not trained; only the matched class has it."""
    group = make_group()
    predictions = Predictions(*(t.requires_grad_() for t in group.predictions))
    group = group._replace(predictions=predictions)
    losses = Criterion(quality=True).of_layers(group)
    image, query, target = group.assignment
    expected = torch.zeros(len(predictions.logits), dtype=torch.float64)
    for layer in range(len(predictions.logits)):
        scores = torch.zeros_like(predictions.logits[layer])
        for b, q, t in zip(
            image,
            query.expand(len(losses["class"]), -1)[layer],
            target.expand(len(losses["class"]), -1)[layer],
            strict=True,
        ):
            box = predictions.boxes[layer, b, q].detach()
            scores[b, q, group.targets.labels[t]] = iou(box, group.targets.boxes[t])
        loss = quality_focal_loss(predictions.logits[layer], scores, 2.0)
        expected[layer] = loss.sum() / group.normalizer
    torch.testing.assert_close(losses["class"], expected)
    (gradient,) = torch.autograd.grad(losses["class"].sum(), predictions.boxes, allow_unused=True)
    assert gradient is None or not gradient.any()
