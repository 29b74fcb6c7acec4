"""What Co-DETR adds to the meta-architecture: suppression, and the detections of its heads."""

import pytest
import torch
from detectron2_inputs import make_input
from tiny import tiny_detector

from dino_d2.postprocess import Suppression

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]


def make_model(**options):
    from dino_d2.d2 import CoDETR

    detector = tiny_detector("co_dino", torch.float32)
    return CoDETR(detector=detector, num_detections=7, **options).eval()


@torch.no_grad()
def detect(model):
    torch.manual_seed(0)
    return model([make_input(), make_input(48, 80)])


def test_results_with_and_without_suppression():
    strict = Suppression("nms", 0.01)
    for result in detect(make_model(suppression=strict)):
        kept, everything = result["instances"], result["unsuppressed"]
        assert len(everything) == 7
        assert kept.image_size == everything.image_size
        assert kept.scores.max() == everything.scores.max()
    (plain, _) = detect(make_model())
    assert set(plain) == {"instances"}


def test_suppression_sees_more_than_it_keeps():
    """As many detections as queries go in, so that the best are kept after it, not before."""
    model = make_model(suppression=Suppression("nms", 0.01))
    seen = []
    suppress = model.suppression
    model.suppression = lambda found: seen.append(len(found.scores)) or suppress(found)
    detect(model)
    assert seen == [12, 12]


@pytest.mark.parametrize("head", ["atss", "faster_rcnn"])
def test_detections_of_a_head(head):
    model = make_model(detect_by=head, suppression=Suppression())
    inputs = [make_input(), make_input(48, 80)]
    for result, source in zip(detect(model), inputs, strict=True):
        assert set(result) == {"instances"}
        found = result["instances"]
        assert found.image_size == (source["height"], source["width"])
        height, width = found.image_size
        assert (found.pred_boxes.tensor <= torch.tensor([width, height, width, height])).all()
        assert len(found) <= 7


def test_an_unknown_head():
    with pytest.raises(ValueError, match="no co-head 'rpn'"):
        detect(make_model(detect_by="rpn"))


def test_a_head_whose_scores_are_not_finite_is_named():
    from dino_d2.errors import NonFiniteError

    model = make_model(detect_by="atss")
    model.detector.co_heads.heads["atss"].towers.centerness_head.bias.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="in atss for image 0"):
        detect(model)


def test_evaluation_of_both():
    from detectron2.evaluation import DatasetEvaluator

    from dino_d2.d2.data import UnsuppressedEvaluator

    class Count(DatasetEvaluator):
        def reset(self):
            self.count = 0

        def process(self, inputs, outputs):
            self.count += sum(len(output["instances"]) for output in outputs)

        def evaluate(self):
            return {"bbox": {"count": self.count}}

    evaluator = UnsuppressedEvaluator(Count())
    evaluator.reset()
    evaluator.process([None, None], detect(make_model(suppression=Suppression("nms", 0.01))))
    assert evaluator.evaluate() == {"bbox_unsuppressed": {"count": 14}}
    evaluator.reset()
    evaluator.process([None, None], detect(make_model()))  # was never suppressed
    assert evaluator.evaluate() == {"bbox_unsuppressed": {"count": 14}}
