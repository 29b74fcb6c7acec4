"""What an evaluation refuses, and what ends it."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.detectron2


class Counting:
    """An evaluator that counts."""

    def reset(self):
        self.count = 0

    def process(self, inputs, outputs):
        self.count += len(inputs)

    def evaluate(self):
        return {"count": self.count}


def make(num_images, number=0):
    from dino_d2.d2.evaluation import CheckedEvaluator

    evaluator = CheckedEvaluator(Counting(), num_images, SimpleNamespace(number=number))
    evaluator.reset()
    return evaluator


def output(score=0.5, x=1.0):
    from detectron2.structures import Boxes, Instances

    boxes = Boxes(torch.tensor([[x, 1, 5, 5]]))
    return {"instances": Instances((8, 8), scores=torch.tensor([score]), pred_boxes=boxes)}


def process(evaluator, *ids):
    for image in ids:
        evaluator.process([{"image_id": image, "file_name": f"{image}.jpg"}], [output()])


def test_every_image_once_is_passed_on():
    evaluator = make(2)
    process(evaluator, 7, "a")
    assert evaluator.evaluate() == {"count": 2}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["score", "x"])
def test_what_is_not_finite_is_refused(what, bad):
    from dino_d2.d2.evaluation import EvaluationError

    name = {"score": "score", "x": "box"}[what]
    with pytest.raises(EvaluationError, match=rf"a {name} is not finite: 3\.jpg, id 3"):
        make(1).process([{"image_id": 3, "file_name": "3.jpg"}], [output(**{what: bad})])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 2], "1 images were evaluated twice, as id 2"),
        ([1], "1 images were .* has 2"),
        ([], "0"),
    ],
)
def test_images_seen_twice_or_not_at_all_are_refused(ids, message):
    from dino_d2.d2.evaluation import EvaluationError

    evaluator = make(2)
    process(evaluator, *ids)
    with pytest.raises(EvaluationError, match=message):
        evaluator.evaluate()


def test_images_of_all_processes_count(monkeypatch):
    from dino_d2.d2 import evaluation

    evaluator = make(3)
    process(evaluator, 1)
    monkeypatch.setattr(evaluation.comm, "all_gather", lambda x: [x, [2, 3] if x == [1] else x])
    assert evaluator.evaluate() == {"count": 1}


def test_a_signal_in_any_process_ends_all(monkeypatch):
    from dino_d2.d2 import evaluation

    monkeypatch.setattr(evaluation.comm, "all_gather", lambda x: [x, 15])
    with pytest.raises(SystemExit) as ended:
        make(1).evaluate()
    assert ended.value.code == 143


def test_a_signal_ends_the_images():
    from dino_d2.d2.evaluation import UntilStopped

    signals, seen = SimpleNamespace(number=0), []
    for batch in UntilStopped(range(5), signals):
        seen.append(batch)
        signals.number = 15 if batch == 2 else 0
    assert seen == [0, 1, 2]
