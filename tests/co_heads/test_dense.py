"""Dense heads: their losses against literal ones, and what they hand over and detect."""

import pytest
import torch
from torchvision.ops import generalized_box_iou

from dino_d2.co_heads import ATSS, FCOS, IGNORED, Objects, RetinaNet
from dino_d2.co_heads.dense import centerness_of

DIM, CLASSES, STRIDES = 32, 4, (4, 8)
SIZES = [(60, 40), (64, 48)]
HEADS = {"atss": ATSS, "retinanet": RetinaNet, "fcos": FCOS}
heads = pytest.mark.parametrize("name", HEADS)


def make(name, **options):
    torch.manual_seed(0)
    head = HEADS[name](DIM, CLASSES, STRIDES, **options).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return head


def make_maps():
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, DIM, 12, 16), (2, DIM, 6, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def objects(*boxes):
    labels = torch.arange(len(boxes)) % CLASSES
    return Objects(labels, torch.tensor(boxes, dtype=torch.float64).view(-1, 4))


TWO, ONE, NONE = objects((3, 4, 35, 38), (30, 2, 58, 30)), objects((10, 6, 50, 46)), objects()


def literal_losses(head, maps, given):
    """One anchor after the other."""
    outputs, levels = head.towers(maps), head.anchors(maps)
    anchors = torch.cat(levels)
    positives = sum_class = sum_giou = sum_weight = sum_centerness = 0
    for image, (size, of_image) in enumerate(zip(SIZES, given, strict=True)):
        matched = head._match(anchors, head.anchors.inside(maps, size), of_image.boxes)
        positives += max(int((matched >= 0).sum()), 1)
        for a, t in enumerate(matched.tolist()):
            if t == IGNORED:
                continue
            for k in range(CLASSES):
                p = outputs.logits[image, a, k].sigmoid()
                wanted = t >= 0 and k == of_image.labels[t]
                sum_class += (
                    -0.25 * (1 - p) ** 2 * p.log() if wanted else -0.75 * p**2 * (1 - p).log()
                )
            if t < 0:
                continue
            box = head.coder.decode(anchors[a], outputs.deltas[image, a])
            giou = generalized_box_iou(box[None], of_image.boxes[t][None])[0, 0]
            weight = torch.ones(())
            if outputs.centerness is not None:
                centre = (anchors[a, :2] + anchors[a, 2:]) / 2
                weight = centerness_of(centre[None], of_image.boxes[t][None])[0]
                c = outputs.centerness[image, a].sigmoid()
                sum_centerness -= weight * c.log() + (1 - weight) * (1 - c).log()
            sum_giou, sum_weight = sum_giou + 2 * weight * (1 - giou), sum_weight + weight
    if outputs.centerness is None:
        return {"class": sum_class / positives, "giou": sum_giou / positives}
    return {
        "class": sum_class / positives,
        "giou": sum_giou / max(sum_weight, 1),
        "centerness": sum_centerness / positives,
    }


@heads
@pytest.mark.parametrize("given", [(TWO, ONE), (NONE, ONE), (NONE, NONE)], ids=["2+1", "0+1", "0"])
def test_losses(name, given):
    head, maps = make(name), make_maps()
    losses, _ = head(maps, SIZES, given)
    expected = literal_losses(head, maps, given)
    assert set(losses) == set(expected)
    for kind, loss in losses.items():
        assert loss.item() == pytest.approx(float(expected[kind]), rel=1e-6, abs=1e-12), kind
    sum(losses.values()).backward()
    for parameter_name, parameter in head.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@heads
def test_candidates(name):
    head, maps = make(name), make_maps()
    _, candidates = head(maps, SIZES, (TWO, NONE))
    boxes = torch.cat(head.anchors(maps))
    for of_image, image_maps in zip(candidates, zip(*maps, strict=True), strict=True):
        positive = of_image.matched >= 0
        torch.testing.assert_close(of_image.boxes[positive], boxes[positive])
        tokens = torch.cat([m.flatten(1).T for m in image_maps])
        torch.testing.assert_close(of_image.features, tokens)
        assert len(of_image.boxes) == len(tokens) * head.anchors.per_cell
    assert set(candidates[0].matched[candidates[0].matched >= 0].tolist()) == {0, 1}
    assert (candidates[1].matched < 0).all()


def test_anchors_outside_the_image_are_boxes_of_no_size():
    maps = make_maps()
    narrow = [(30, 20), (64, 48)]
    _, (published, _) = make("atss")(maps, narrow, (NONE, NONE))
    _, (clean, _) = make("atss", pad_with_outside=False)(maps, narrow, (NONE, NONE))
    outside = clean.matched == IGNORED
    assert outside.any()
    assert (published.boxes[outside] == 0).all()
    assert (published.matched == -1).all()
    assert (clean.boxes[outside] != 0).any()


@heads
def test_detections(name):
    head, maps = make(name), make_maps()
    for found, (width, height) in zip(head.detect(maps, SIZES), SIZES, strict=True):
        scores, labels, boxes = found
        assert 0 < len(scores) <= 100
        assert (scores[:-1] >= scores[1:]).all()
        assert ((labels >= 0) & (labels < CLASSES)).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()


@heads
def test_heads_learn_to_find_an_object(name):
    torch.manual_seed(0)
    head, maps = HEADS[name](DIM, CLASSES, STRIDES).double(), make_maps()
    optimizer = torch.optim.Adam(head.parameters(), 0.01)
    for _ in range(40):
        losses, _ = head(maps, SIZES, (TWO, ONE))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    best = head.detect(maps, SIZES)[1]
    assert best.labels[0] == ONE.labels[0]
    assert generalized_box_iou(best.boxes[:1], ONE.boxes).item() > 0.6
