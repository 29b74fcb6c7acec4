"""The federated loss: which classes count, and that only they do."""

from collections import Counter

import numpy as np
import pytest
import torch
from reference import federated_classes_loop, focal_loss_loop
from tiny import NUM_CLASSES, tiny_batch, tiny_dino, tiny_targets

from dino_d2.losses import Criterion, FederatedClasses, Group
from dino_d2.types import Assignment, Predictions, Targets

WEIGHTS = [5.0, 0.0, 1.0, 2.0, 1.0, 0.5]


def chosen(choose, *labels):
    mask = choose(torch.tensor(labels, dtype=torch.int64), len(WEIGHTS))
    assert mask.shape == (len(WEIGHTS),)
    assert mask.dtype == torch.bool
    return frozenset(mask.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("labels", [(), (1,), (3, 3, 0), (0, 1, 2, 3)])
def test_choices_are_as_frequent_as_the_loops(labels):
    choose, rng, number = FederatedClasses(WEIGHTS, 3), np.random.default_rng(0), 2000
    ours = Counter(chosen(choose, *labels) for _ in range(number))
    theirs = Counter(
        frozenset(federated_classes_loop(WEIGHTS, labels, 3, rng)) for _ in range(number)
    )
    for choice in ours | theirs:
        assert ours[choice] == pytest.approx(theirs[choice], abs=5 * number**0.5 / 2)


def test_classes_without_weight_count_only_with_objects():
    choose = FederatedClasses(WEIGHTS, 100)
    assert chosen(choose) == {0, 2, 3, 4, 5}
    assert chosen(choose, 1) == {0, 1, 2, 3, 4, 5}


def test_the_loss_counts_the_chosen_classes_only():
    logits = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    boxes = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    targets = Targets(torch.tensor([3, 0]), torch.rand(2, 4, dtype=torch.float64), (2,))
    queries = torch.tensor([[0, 2], [1, 3]])
    assignment = Assignment(torch.zeros(2, dtype=torch.int64), queries, torch.tensor([[0, 1]] * 2))
    group = Group("", Predictions(logits, boxes), targets, assignment, 2.0)

    class Fixed(FederatedClasses):
        def __call__(self, labels, num_classes):
            assert labels.tolist() == [3, 0]
            return torch.tensor([True, False, False, True, True, False])

    losses = Criterion(federated=Fixed([1.0] * 6))([group])
    for layer, name in ((0, "loss_class_0"), (1, "loss_class")):
        scores = np.zeros((4, 6))
        for query, label in zip(queries[layer].tolist(), (3, 0), strict=True):
            scores[query, label] = 1
        loop = focal_loss_loop(logits[layer, 0].numpy(), scores, 0.25, 2.0)
        assert losses[name].item() == pytest.approx(loop[:, [0, 3, 4]].sum() / 2)
    everything = Criterion()([group])
    assert losses["loss_bbox"] == everything["loss_bbox"]
    assert losses["loss_class"] < everything["loss_class"]


def test_classes_left_out_get_no_gradient():
    choose = FederatedClasses([1.0] * NUM_CLASSES, 2)
    model = tiny_dino(criterion=Criterion(federated=choose)).train()
    losses = model(*tiny_batch(), tiny_targets(2, 0))
    losses["loss_class"].backward()
    touched = model.heads.class_heads[0].bias.grad != 0
    assert 1 <= touched.sum() <= 2


@pytest.mark.parametrize("weights", [[-1.0, 1], [float("nan"), 1], [float("inf"), 1], [0.0, 0]])
def test_bad_weights_are_errors(weights):
    with pytest.raises(ValueError, match="weights of classes must be"):
        FederatedClasses(weights)


def test_another_number_of_classes_is_an_error():
    with pytest.raises(ValueError, match="6 weights for 4 classes"):
        FederatedClasses(WEIGHTS)(torch.tensor([0]), 4)
