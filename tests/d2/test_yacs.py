"""DINO in Detectron2's yacs pipeline: a config of keys, build_model, DefaultPredictor."""

import numpy as np
import pytest
import torch
from tiny import NUM_CLASSES

pytestmark = pytest.mark.detectron2


def make_config(*options):
    """A small ResNet; the transformer is of the published size."""
    from detectron2.config import get_cfg

    from dino_d2.d2 import add_dino_d2_config

    cfg = get_cfg()
    add_dino_d2_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DINO"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.DINO.IN_FEATURES = ["res4", "res5"]
    cfg.MODEL.DINO.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.DINO.NUM_LEVELS = 3
    cfg.MODEL.DINO.NUM_QUERIES = 20
    cfg.MODEL.DINO.NUM_DETECTIONS = 6
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.merge_from_list(list(options))
    return cfg


def build(*options):
    from detectron2.modeling import build_model

    return build_model(make_config(*options))


def test_missing_feature_maps_are_named():
    with pytest.raises(ValueError, match=r"no feature maps \['res3'\], only \['res4', 'res5'\]"):
        build("MODEL.DINO.IN_FEATURES", ["res3", "res4"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A saved checkpoint of a model, and the model."""
    from detectron2.checkpoint import DetectionCheckpointer

    torch.manual_seed(0)
    model = build()
    folder = tmp_path_factory.mktemp("weights")
    DetectionCheckpointer(model, str(folder)).save("model")
    return folder / "model.pth", model.eval()


def test_build_model_makes_what_the_keys_say(weights):
    _, model = weights
    detector = model.detector
    assert type(model).__name__ == "DINO"
    assert type(detector.backbone).__module__ == "detectron2.modeling.backbone.resnet"
    assert model.num_classes == detector.denoising.num_classes == NUM_CLASSES
    assert detector.query_source.num_queries == 20
    assert detector.denoising.num_queries == 200
    assert model.num_detections == 6
    assert model.input_format == "BGR"


def test_statistics_of_pixels_are_detectron2s(weights):
    cfg, (_, model) = make_config(), weights
    torch.testing.assert_close(model.pixel_mean.flatten().tolist(), cfg.MODEL.PIXEL_MEAN)
    torch.testing.assert_close(model.pixel_std.flatten().tolist(), cfg.MODEL.PIXEL_STD)


def test_denoising_can_be_switched_off():
    assert build("MODEL.DINO.DENOISING", "").detector.denoising is None


@pytest.mark.parametrize("colours", ["BGR", "RGB"])
def test_default_predictor_finds_what_the_model_does(weights, colours):
    """It takes BGR pictures and turns them if the model wants RGB."""
    from detectron2.engine import DefaultPredictor

    path, model = weights
    picture = np.random.default_rng(0).integers(0, 256, (50, 100, 3), np.uint8)
    predictor = DefaultPredictor(make_config("MODEL.WEIGHTS", str(path), "INPUT.FORMAT", colours))
    found = predictor(picture)["instances"]
    assert found.image_size == (50, 100)
    assert len(found) == 6
    picture = picture if colours == "BGR" else picture[:, :, ::-1]
    resized = predictor.aug.get_transform(picture).apply_image(picture)
    assert resized.shape == (48, 96, 3)
    image = torch.from_numpy(resized.copy()).permute(2, 0, 1)
    with torch.no_grad():
        (expected,) = model([{"image": image, "height": 50, "width": 100}])
    torch.testing.assert_close(found.scores, expected["instances"].scores)
    torch.testing.assert_close(found.pred_boxes.tensor, expected["instances"].pred_boxes.tensor)
