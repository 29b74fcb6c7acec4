"""From predictions to detections, against a loop over every pair."""

import torch

from dino_d2.postprocess import postprocess
from dino_d2.types import Predictions


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
