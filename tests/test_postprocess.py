"""From predictions to detections, against a loop over every pair."""

import pytest
import torch
from torchvision.ops import box_iou

from dino_d2.postprocess import Suppression, postprocess
from dino_d2.types import Detections, Predictions


def random_predictions(layers=2, batch=2, queries=6, classes=4):
    logits = torch.randn(layers, batch, queries, classes, dtype=torch.float64)
    return Predictions(logits, torch.rand(layers, batch, queries, 4, dtype=torch.float64))


def postprocess_loop(predictions, sizes, count):
    """For every image the best (score, class, corners), one pair of query and class at a time."""
    found = []
    for logits, boxes, (height, width) in zip(
        predictions.logits[-1].tolist(), predictions.boxes[-1].tolist(), sizes, strict=True
    ):
        pairs = []
        for query_logits, (x, y, w, h) in zip(logits, boxes, strict=True):
            corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            scaled = [c * side for c, side in zip(corners, [width, height] * 2, strict=True)]
            for label, logit in enumerate(query_logits):
                score = 1 / (1 + torch.tensor(-logit, dtype=torch.float64).exp().item())
                pairs.append((score, label, scaled))
        found.append(sorted(pairs, key=lambda pair: -pair[0])[:count])
    return found


def test_equals_the_loop():
    predictions, sizes = random_predictions(), [(30, 40), (100, 50)]
    detections = postprocess(predictions, torch.tensor(sizes), 9)
    for image, pairs in enumerate(postprocess_loop(predictions, sizes, 9)):
        scores, labels, boxes = zip(*pairs, strict=True)
        assert detections.labels[image].tolist() == list(labels)
        torch.testing.assert_close(detections.scores[image], torch.tensor(scores).double())
        torch.testing.assert_close(detections.boxes[image], torch.tensor(boxes).double())


def test_only_the_last_layer_counts():
    predictions = random_predictions(layers=3)
    last = Predictions(*(tensor[-1:] for tensor in predictions))
    sizes = torch.tensor([(30, 40), (100, 50)])
    for a, b in zip(postprocess(predictions, sizes, 5), postprocess(last, sizes, 5), strict=True):
        assert torch.equal(a, b)


def test_fewer_pairs_than_wanted_are_all_returned():
    detections = postprocess(random_predictions(queries=2, classes=3), torch.ones(2, 2), 100)
    assert detections.scores.shape == detections.labels.shape == (2, 6)
    assert detections.boxes.shape == (2, 6, 4)
    assert detections.labels.sort().values.tolist() == [[0, 0, 1, 1, 2, 2]] * 2


def test_best_comes_first():
    scores = postprocess(random_predictions(), torch.ones(2, 2), 10).scores
    assert (scores.diff(dim=1) <= 0).all()


def test_a_query_may_be_of_several_classes():
    logits = torch.tensor([[[[-9.0, 3, 2], [0, -9, -9]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 1, 1], [0.25, 0.25, 0.5, 0.5]]]])
    detections = postprocess(Predictions(logits, boxes), torch.tensor([(10, 20)]), 3)
    assert detections.labels.tolist() == [[1, 2, 0]]
    assert detections.boxes.tolist() == [[[0, 0, 20, 10], [0, 0, 20, 10], [0, 0, 10, 5]]]


def test_scores_are_probabilities():
    logits = torch.tensor([[[[0.0, 100, -100]]]])
    detections = postprocess(Predictions(logits, torch.rand(1, 1, 1, 4)), torch.ones(1, 2), 3)
    assert detections.scores.tolist() == [[1, 0.5, torch.tensor(-100.0).sigmoid().item()]]


def test_an_empty_batch_has_no_detections():
    predictions = Predictions(torch.zeros(1, 0, 5, 2), torch.zeros(1, 0, 5, 4))
    detections = postprocess(predictions, torch.zeros(0, 2), 3)
    assert detections.boxes.shape == (0, 3, 4)


def test_boxes_are_clipped_on_request():
    predictions = random_predictions()
    predictions.boxes[..., 2:] = 0.9
    sizes = torch.tensor([[20, 30], [40, 10]])
    plain, clipped = (postprocess(predictions, sizes, 5, clip=clip) for clip in (False, True))
    limits = sizes.flip(1).repeat(1, 2)[:, None].double()
    assert (plain.boxes > limits).any()
    torch.testing.assert_close(clipped.boxes, plain.boxes.clamp(min=0).minimum(limits))
    torch.testing.assert_close(clipped.scores, plain.scores)


def random_detections(count=40, classes=3):
    low, size = torch.rand(2, count, 2, dtype=torch.float64) * 20
    boxes = torch.cat([low, low + size + 5], 1)
    scores = torch.rand(count, dtype=torch.float64).sort(descending=True).values
    return Detections(scores, torch.randint(classes, (count,)), boxes)


def soft_nms_loop(detections, threshold, least):
    """Take the best, lower the rest of its class, and again."""
    left = [[float(s), int(c), box] for s, c, box in zip(*detections, strict=True)]
    found = []
    while left:
        best = max(left, key=lambda row: row[0])
        left = [row for row in left if row is not best]
        found.append(best)
        for row in left:
            overlap = float(box_iou(best[2][None], row[2][None]))
            if row[1] == best[1] and overlap >= threshold:
                row[0] *= 1 - overlap
        left = [row for row in left if row[0] >= least]
    return found


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.8])
def test_soft_nms(threshold):
    for seed in range(5):
        torch.manual_seed(seed)
        detections = random_detections()
        found = Suppression("soft_nms", threshold, 0.05)(detections)
        expected = soft_nms_loop(detections, threshold, 0.05)
        assert found.scores.tolist() == pytest.approx([row[0] for row in expected])
        assert found.labels.tolist() == [row[1] for row in expected]
        torch.testing.assert_close(found.boxes, torch.stack([row[2] for row in expected]))


def test_nms_drops_duplicates_of_a_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [20, 20, 30, 30]])
    detections = Detections(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 1, 2, 1]), boxes)
    found = Suppression("nms", 0.5)(detections)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert found.labels.tolist() == [1, 2, 1]


@pytest.mark.parametrize("kind", ["nms", "soft_nms"])
def test_suppression_of_nothing(kind):
    none = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    assert [len(tensor) for tensor in Suppression(kind)(none)] == [0, 0, 0]


def test_unknown_suppression():
    with pytest.raises(ValueError, match="but is 'hard'"):
        Suppression("hard")
