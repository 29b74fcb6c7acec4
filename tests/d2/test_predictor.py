"""The predictor for LazyConfigs."""

import numpy as np
import pytest
import torch
from shapes_run import make_config, make_data

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    from detectron2.config import LazyCall, instantiate
    from detectron2.data.transforms import ResizeShortestEdge

    from dino_d2.d2 import Predictor
    from dino_d2.d2.data import load_datasets

    folder = tmp_path_factory.mktemp("predictor")
    data = make_data(folder / "data")
    load_datasets(data)
    cfg = make_config(folder, data, 1)
    torch.save({"model": instantiate(cfg.model).state_dict()}, folder / "weights.pth")
    cfg.train.init_checkpoint = str(folder / "weights.pth")
    resize = LazyCall(ResizeShortestEdge)(short_edge_length=64, max_size=96)
    cfg.dataloader.test.mapper.augmentations = [resize]
    return Predictor(cfg)


@pytest.mark.parametrize("colours", ["RGB", "BGR"])
def test_it_finds_what_the_model_does(predictor, colours, monkeypatch):
    monkeypatch.setattr(predictor, "input_format", colours)
    picture = np.random.default_rng(0).integers(0, 256, (50, 100, 3), np.uint8)
    found = predictor(picture)["instances"]
    assert found.image_size == (50, 100)
    assert len(found) > 0
    assert not predictor.model.training
    given = picture if colours == "BGR" else picture[:, :, ::-1]
    resized = predictor.aug.augs[0].get_transform(given).apply_image(given)
    assert resized.shape == (48, 96, 3)
    image = torch.from_numpy(resized.copy()).permute(2, 0, 1)
    with torch.no_grad():
        (expected,) = predictor.model([{"image": image, "height": 50, "width": 100}])
    torch.testing.assert_close(found.scores, expected["instances"].scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected["instances"].pred_boxes.tensor)


def test_it_knows_the_names_of_the_classes(predictor):
    assert predictor.metadata.thing_classes == ["circle", "square", "triangle"]


@pytest.mark.parametrize(
    "picture", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))]
)
def test_what_is_no_picture_is_an_error(predictor, picture):
    with pytest.raises(ValueError, match=r"must be \(height, width, 3\) uint8 in BGR, not \(9, 9"):
        predictor(picture)


@pytest.mark.parametrize("size", [(0, 9, 3), (0, 0, 3)])
def test_an_empty_picture_is_an_error(predictor, size):
    with pytest.raises(ValueError, match="a picture must be"):
        predictor(np.zeros(size, np.uint8))


def test_a_picture_that_opencv_cannot_read_is_an_error(predictor):
    with pytest.raises(ValueError, match=r"not NoneType; cv2\.imread returns None"):
        predictor(None)


def test_it_needs_weights(predictor):
    from dino_d2.d2 import Predictor

    cfg = predictor.cfg.copy()
    cfg.train.init_checkpoint = ""
    with pytest.raises(ValueError, match=r"set train\.init_checkpoint"):
        Predictor(cfg)
