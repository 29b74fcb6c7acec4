import pytest
import torch
from test_dense import CLASSES, DIM, NONE, ONE, SIZES, STRIDES, TWO, make_maps
from torch.nn import functional
from torchvision.ops import generalized_box_iou, roi_align

from dino_d2.co_heads import FasterRCNN


def make(**options):
    torch.manual_seed(0)
    options = {"fc_dim": 24, **options}
    head = FasterRCNN(DIM, CLASSES, STRIDES, **options).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return head


@pytest.mark.parametrize("options", [{}, {"class_agnostic": True, "num_convs": 1, "num_fcs": 1}])
@pytest.mark.parametrize("given", [(TWO, ONE), (NONE, ONE), (NONE, NONE)], ids=["2+1", "0+1", "0"])
def test_losses_from_the_samples(given, options, monkeypatch):
    head, maps = make(**options), make_maps()
    samples, draw = [], head._sample
    monkeypatch.setattr(head, "_sample", lambda *x: samples.append(draw(*x)) or samples[-1])
    losses, _ = head(maps, SIZES, given)
    total_class = total_giou = count = 0
    for image, ((boxes, matched), known) in enumerate(zip(samples, given, strict=True)):
        for box, t in zip(boxes, matched.tolist(), strict=True):
            row = torch.cat([torch.tensor([image]), box])[None]
            region = roi_align(maps[0], row, 7, 1 / STRIDES[0], aligned=True)
            (logits,), (deltas,) = head._score(region)
            label = int(known.labels[t]) if t >= 0 else CLASSES
            total_class += functional.cross_entropy(logits, torch.tensor(label))
            count += 1
            if t >= 0:
                moves = deltas[0 if head.class_agnostic else label]
                found = head.coder.decode(box, moves)[None]
                total_giou += 10 * (1 - generalized_box_iou(found, known.boxes[t][None])[0, 0])
    assert losses["class"].item() == pytest.approx(float(total_class) / count, rel=1e-6)
    assert losses["giou"].item() == pytest.approx(float(total_giou) / count, rel=1e-6)
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_objects_are_among_the_candidates():
    """They come first, and images hand over equally many."""
    _, candidates = make()(make_maps(), SIZES, (TWO, ONE))
    for of_image, known in zip(candidates, (TWO, ONE), strict=True):
        torch.testing.assert_close(of_image.boxes[: len(known.boxes)], known.boxes)
        assert of_image.matched[: len(known.boxes)].tolist() == list(range(len(known.boxes)))
        assert of_image.features.shape == (len(of_image.boxes), DIM)
    assert len(candidates[0].boxes) == len(candidates[1].boxes)


def test_regions_come_from_the_level_of_their_size():
    head = FasterRCNN(DIM, CLASSES, (8, 16, 32), fc_dim=8).double()
    maps = [
        torch.full((1, DIM, s, s), float(i), dtype=torch.float64)
        for i, s in enumerate((64, 32, 16))
    ]
    sides = torch.tensor([50.0, 111, 113, 223, 225, 500], dtype=torch.float64)
    boxes = torch.cat([torch.zeros(6, 2, dtype=torch.float64), sides[:, None].expand(-1, 2)], 1)
    regions = head._regions(maps, [boxes])
    assert regions.amax((1, 2, 3)).tolist() == [0, 0, 0, 0, 1, 1]


def test_proposals_are_distinct_and_within_the_image():
    _, proposals = make().proposals(make_maps(), SIZES)
    for boxes, (width, height) in zip(proposals, SIZES, strict=True):
        assert not boxes.requires_grad
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_detections():
    for found in make().detect(make_maps(), SIZES):
        scores, labels, boxes = found
        assert 0 < len(scores) <= 100
        assert (scores[:-1] >= scores[1:]).all()
        assert labels.max() < CLASSES
        assert boxes.shape == (len(scores), 4)


def test_weights_that_are_not_finite_reach_the_losses():
    """Who checks the losses says so; nothing fails for want of proposals before."""
    head = make()
    torch.nn.init.constant_(head.proposals.box_head.bias, torch.nan)
    losses, candidates = head(make_maps(), SIZES, (NONE, ONE))
    assert losses["rpn_bbox"].isnan()
    assert [len(of_image.boxes) for of_image in candidates] == [1, 1]
