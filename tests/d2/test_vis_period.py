"""`vis_period`: pictures of training in the event storage."""

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2_inputs import make_input, tiny_model
from shapes_run import make_config, make_data

pytestmark = pytest.mark.detectron2


@pytest.fixture
def opencv(monkeypatch):
    """Detectron2's Visualizer imports OpenCV, but boxes are drawn without it."""
    if importlib.util.find_spec("cv2") is None:
        monkeypatch.setitem(sys.modules, "cv2", ModuleType("cv2"))


def show(model, iteration, boxes=((8, 8, 40, 32),)):
    """The pictures that a training step of this iteration leaves in the event storage."""
    from detectron2.utils.events import EventStorage

    with EventStorage(iteration) as storage:
        model([make_input(64, 96, boxes), make_input(48, 80)])
    return storage._vis_data


def test_vis_period_shows_truth_and_predictions(opencv):
    ((name, picture, iteration),) = show(tiny_model(vis_period=5), 10)
    assert "ground truth" in name
    assert picture.shape == (3, 64, 2 * 96)
    assert picture.dtype == np.uint8
    assert iteration == 10


@pytest.mark.parametrize(("period", "iteration"), [(5, 9), (0, 0)])
def test_vis_period_leaves_other_iterations_alone(period, iteration, opencv):
    assert not show(tiny_model(vis_period=period), iteration)


def test_a_missing_opencv_is_missed_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    tiny_model(vis_period=0)
    with pytest.raises(ImportError, match="cv2"):
        tiny_model(vis_period=1)


def test_vis_period_draws_no_boxes_where_there_are_none(opencv):
    assert show(tiny_model(vis_period=1), 0, boxes=())


def test_vis_period_works_with_mixed_precision(opencv):
    with torch.autocast("cpu", torch.bfloat16):
        assert show(tiny_model(vis_period=1), 0)


def test_vis_period_does_not_change_training(opencv):
    from detectron2.utils.events import EventStorage

    model, source = tiny_model(vis_period=1), make_input()
    numpy_state, torch_state = np.random.get_state()[1:3], torch.get_rng_state()
    with EventStorage(0):
        model.visualize_training([source])
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_equal(np.random.get_state()[1:3], numpy_state)


def test_vis_period_of_a_config_reaches_tensorboard(opencv, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from dino_d2.d2 import train

    cfg = make_config(tmp_path / "out", make_data(tmp_path / "data"), 1, "model.vis_period=1")
    del cfg.dataloader.evaluator
    train(cfg)
    events = EventAccumulator(str(tmp_path / "out")).Reload()
    (name,) = events.Tags()["images"]
    assert "ground truth" in name
