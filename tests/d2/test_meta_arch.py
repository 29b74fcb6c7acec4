"""The contract of Detectron2's models: what goes in, what comes out, what is saved."""

import pytest
import torch
from detectron2_inputs import make_input, tiny_model
from tiny import NUM_CLASSES, tiny_dino

from dino_d2.errors import TargetError

pytestmark = pytest.mark.detectron2


def seen_by_detector(model, inputs):
    """The arguments that the detector gets: images, padding mask, in training also targets."""
    seen = []
    hook = model.detector.register_forward_pre_hook(lambda module, args: seen.extend(args))
    model(inputs)
    hook.remove()
    return seen


def test_importing_the_package_registers_dino():
    from detectron2.modeling import META_ARCH_REGISTRY

    import dino_d2  # noqa: F401

    assert META_ARCH_REGISTRY.get("DINO").__module__ == "dino_d2.d2.meta_arch"


def test_training_returns_losses_that_can_be_minimised():
    model = tiny_model()
    losses = model([make_input(), make_input(48, 80)])
    assert {"loss_class", "loss_bbox", "loss_giou", "loss_class_enc", "loss_class_dn"} <= {*losses}
    for loss in losses.values():
        assert loss.shape == ()
        assert loss.isfinite()
        assert loss.requires_grad
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_boxes_of_training_are_relative_to_the_image_not_to_its_padding():
    inputs = [make_input(32, 48, [(12, 8, 36, 16)], [3]), make_input(64, 96, boxes=())]
    _, _, targets = seen_by_detector(tiny_model(), inputs)
    assert targets[0].labels.tolist() == [3]
    assert targets[0].boxes.tolist() == [[0.5, 0.375, 0.5, 0.25]]
    assert targets[1].boxes.shape == (0, 4)


def test_a_batch_without_objects_has_finite_losses():
    model = tiny_model()
    losses = model([make_input(boxes=()), make_input(boxes=())])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_bbox"] == losses["loss_giou_dn"] == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_inference_returns_instances_at_the_original_size():
    model = tiny_model().eval()
    inputs = [{**make_input(64, 96), "height": 128, "width": 288}, make_input(48, 80)]
    results = model(inputs)
    assert [set(result) for result in results] == [{"instances"}] * 2
    for result, source in zip(results, inputs, strict=True):
        found = result["instances"]
        assert found.image_size == (source["height"], source["width"])
        assert 0 < len(found) <= 7
        assert found.pred_classes.dtype == torch.int64
        assert (found.scores.diff() <= 0).all()
        boxes = found.pred_boxes.tensor
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0
        assert (boxes <= torch.tensor([source["width"], source["height"]] * 2)).all()


@torch.no_grad()
def test_original_size_only_scales_boxes():
    model, source = tiny_model().eval(), make_input(64, 96)
    small, large = model([source, {**source, "height": 128, "width": 288}])
    scaled = small["instances"].pred_boxes.tensor * torch.tensor([3.0, 2, 3, 2])
    torch.testing.assert_close(large["instances"].pred_boxes.tensor, scaled)


@torch.no_grad()
def test_without_an_original_size_boxes_are_in_the_image_given():
    source = make_input(64, 96)
    (found,) = tiny_model().eval()([{"image": source["image"]}])
    assert found["instances"].image_size == (64, 96)


def test_inference_works_with_gradients_too():
    source = {**make_input(64, 96), "height": 128, "width": 192}
    (found,) = tiny_model().eval()([source])
    found["instances"].scores.sum().backward()
    assert found["instances"].image_size == (128, 192)


def test_training_without_annotations_names_the_file():
    source = make_input(file_name="street.jpg")
    del source["instances"]
    with pytest.raises(KeyError, match=r"instances.*street\.jpg"):
        tiny_model()([source])


def test_a_class_out_of_range_names_file_and_image():
    inputs = [make_input(), make_input(classes=[NUM_CLASSES], file_name="a.jpg", image_id=42)]
    with pytest.raises(ValueError, match=rf"class id {NUM_CLASSES} .*a\.jpg, id 42"):
        tiny_model()(inputs)


def test_a_non_finite_prediction_names_file_and_image():
    bad = {**make_input(file_name="b.jpg", image_id=3), "image": torch.full((3, 64, 96), torch.nan)}
    with pytest.raises(FloatingPointError, match=r"image 1 of the batch \(b\.jpg, id 3\)"):
        tiny_model()([make_input(), bad])


def test_images_are_normalised_in_the_order_given():
    model = tiny_model(pixel_mean=[1, 2, 3], pixel_std=[1, 2, 4]).eval()
    source = make_input()
    images, _ = seen_by_detector(model, [source])
    expected = (source["image"] - torch.tensor([1, 2, 3]).view(3, 1, 1)) / torch.tensor(
        [1, 2, 4]
    ).view(3, 1, 1)
    torch.testing.assert_close(images[0], expected)


def test_padding_mask_marks_what_pads_images_to_a_common_size():
    model = tiny_model().eval()
    images, mask = seen_by_detector(model, [make_input(64, 80), make_input(48, 96)])
    assert images.shape[2:] == mask.shape[1:] == (64, 96)
    for padding, (height, width) in zip(mask, [(64, 80), (48, 96)], strict=True):
        assert not padding[:height, :width].any()
        assert padding.sum() == 64 * 96 - height * width


def test_padding_mask_marks_what_makes_sizes_divisible():
    model = tiny_model().eval()
    model.detector.backbone.size_divisibility = 32
    images, mask = seen_by_detector(model, [make_input(50, 70)])
    assert images.shape[2:] == (64, 96)
    assert not images[0, :, mask[0]].any()
    assert not mask[0, :50, :70].any()
    assert mask[0, 50:].all()
    assert mask[0, :, 70:].all()


def test_padding_mask_marks_what_makes_images_square():
    model = tiny_model().eval()
    model.detector.backbone.padding_constraints = {"square_size": 128}
    images, mask = seen_by_detector(model, [make_input(64, 96), make_input(48, 48)])
    assert images.shape[2:] == (128, 128)
    assert (~mask).flatten(1).sum(1).tolist() == [64 * 96, 48 * 48]


@torch.no_grad()
def test_padding_to_a_divisible_size_does_not_change_what_is_found():
    """As if the image had come in a batch with a larger one."""
    model, source = tiny_model().eval(), make_input(64, 96)
    batched = model([source, make_input(128, 128)])[0]["instances"]
    model.detector.backbone.padding_constraints = {"square_size": 128}
    alone = model([source])[0]["instances"]
    torch.testing.assert_close(alone.scores, batched.scores)


@torch.no_grad()
def test_a_plain_vit_with_its_own_sizes_works():
    from dino_d2.d2 import DINO
    from dino_d2.d2.backbones import build_vitdet
    from dino_d2.models import build_dino

    backbone = build_vitdet(32, 2, 2, 0.0, [1], image_size=64)
    detector = build_dino(backbone, ["p3", "p4", "p5", "p6"], encoder_layers=1, decoder_layers=1)
    model = DINO(detector=detector, num_detections=5).eval()
    images, mask = seen_by_detector(model, [make_input(70, 100)])
    assert {side % backbone.size_divisibility for side in images.shape[2:]} == {0}
    assert images.shape[2:] > (70, 100)
    assert (~mask).sum() == 70 * 100


def test_device_follows_the_model():
    model = tiny_model()
    assert model.device == torch.device("cpu")
    model.to("meta")
    assert model.device == model.pixel_std.device == torch.device("meta")


@pytest.mark.cuda
def test_images_are_moved_to_the_model():
    assert tiny_model().cuda()([make_input()])["loss_class"].is_cuda


def test_statistics_of_pixels_are_settings_not_weights():
    assert not [name for name in tiny_model().state_dict() if "pixel" in name]


@pytest.mark.parametrize("prefix", ["", "detector."])
def test_detectron2s_checkpointer_loads_a_plain_detectors_weights(tmp_path, prefix):
    from detectron2.checkpoint import DetectionCheckpointer

    model, other = tiny_model(), tiny_dino(torch.float32)
    weights = {prefix + name: tensor for name, tensor in other.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "weights.pth")
    incompatible = []
    checkpointer = DetectionCheckpointer(model)
    checkpointer._log_incompatible_keys = incompatible.append
    checkpointer.load(str(tmp_path / "weights.pth"))
    for name, tensor in model.detector.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert not incompatible[0].missing_keys
    assert not incompatible[0].unexpected_keys


def test_a_prediction_that_is_not_finite_is_named():
    model = tiny_model().eval()
    model.detector.heads.class_heads[0].bias.data[1] = torch.nan
    inputs = [make_input(file_name="a.jpg", image_id=1), make_input(file_name="b.jpg", image_id=2)]
    with pytest.raises(FloatingPointError, match=r"image 0 of the batch \(a\.jpg, id 1\)"):
        model(inputs)


def test_scores_of_mixed_precision_rank_as_finely_as_single():
    model = tiny_model().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        scores = model([make_input()])[0]["instances"].scores
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_swin_takes_images_of_any_size():
    """Detectron2's misspells its divisibility and raises when asked for it."""
    from detectron2.config import instantiate

    from dino_d2 import model_zoo

    cfg = model_zoo.get_config("dino/dino_swin_tiny_224_4scale_12ep")
    cfg.model.detector.encoder_layers = cfg.model.detector.decoder_layers = 1
    model = instantiate(cfg.model).eval()
    with torch.no_grad():
        (found,) = model([{"image": torch.zeros(3, 101, 131, dtype=torch.uint8)}])
    assert found["instances"].image_size == (101, 131)


def test_what_is_no_image_is_named():
    image = make_input()["image"]
    with pytest.raises(ValueError, match=r"image 0 of the batch must be .* it is \(1, 64, 96\)"):
        tiny_model().eval()([{"image": image[:1]}])
    with pytest.raises(ValueError, match="at least one image"):
        tiny_model().eval()([])


def test_objects_of_another_size_of_image_are_an_error():
    source = {**make_input(32, 48), "image": make_input()["image"], "file_name": "b.png"}
    with pytest.raises(TargetError, match=r"of an image of \(32, 48\), not of \(64, 96\) \(b\.png"):
        tiny_model()([make_input(), source])
