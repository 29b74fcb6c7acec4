"""COCO-format data: what is read, what is written, and the figures between them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dino_d2.data.coco import COCO_CATEGORY_IDS, CocoBoxes, evaluate_boxes, to_coco_results
from dino_d2.data.shapes import make_shapes
from dino_d2.types import Detections

# Category ids out of order and with gaps; image 7 has an object that leaves it, and a
# crowd; the only object of image 5 is outside.
CONTENT = {
    "images": [
        {"id": 7, "file_name": "colour.png", "height": 60, "width": 80},
        {"id": 3, "file_name": "grey.png", "height": 20, "width": 30},
        {"id": 5, "file_name": "empty.png", "height": 16, "width": 16},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 9, "bbox": [8, 6, 16, 12], "area": 192},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 80, 60], "area": 9, "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 4, "bbox": [70, 50, 40, 40], "area": 100},
        {"id": 4, "image_id": 3, "category_id": 2, "bbox": [0, 0, 30, 20], "area": 600},
        {"id": 5, "image_id": 5, "category_id": 2, "bbox": [50, 5, 10, 4], "area": 40},
    ],
    "categories": [{"id": 9, "name": "z"}, {"id": 2, "name": "a"}, {"id": 4, "name": "b"}],
}


@pytest.fixture
def data(tmp_path):
    (tmp_path / "annotations.json").write_text(json.dumps(CONTENT))
    colour = np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    Image.fromarray(np.full((20, 30), 99, np.uint8)).save(tmp_path / "grey.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "empty.png")
    return CocoBoxes(tmp_path / "annotations.json", tmp_path)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Annotations of images that have objects of all sizes, crowds, or nothing at all."""
    return make_shapes(tmp_path_factory.mktemp("shapes"), 12, 384, 0, "hard")


def truth_as_results(path, keep=lambda entry: True):
    entries = json.loads(path.read_text())["annotations"]
    names = ("image_id", "category_id", "bbox")
    wanted = [entry for entry in entries if not entry["iscrowd"] and keep(entry)]
    return [{**{name: entry[name] for name in names}, "score": 0.9} for entry in wanted]


def test_examples_come_in_the_order_of_the_images(data):
    assert len(data) == 3
    assert [data[i].image_id for i in range(3)] == [7, 3, 5]


def test_classes_are_numbered_in_the_order_of_their_ids(data):
    assert data.category_ids == [2, 4, 9]
    assert data[0].target.labels.tolist() == [2, 1]
    assert data[1].target.labels.tolist() == [0]
    assert data[1].target.labels.dtype == torch.int64


def test_crowds_are_left_out(data):
    assert len(data[0].target.labels) == len(data[0].target.boxes) == 2


def test_boxes_are_relative_and_end_at_the_border(data):
    boxes = data[0].target.boxes
    torch.testing.assert_close(boxes[0], torch.tensor([0.2, 0.2, 0.2, 0.2]))
    torch.testing.assert_close(boxes[1], torch.tensor([0.9375, 11 / 12, 0.125, 1 / 6]))
    torch.testing.assert_close(data[1].target.boxes, torch.tensor([[0.5, 0.5, 1, 1]]))


def test_pixels_are_rgb_with_channels_first(data):
    image = data[0].image
    assert image.dtype == torch.uint8
    assert image.shape == (3, 60, 80)
    assert image[:, 0, 1].tolist() == [3, 4, 5]


def test_grey_images_get_three_channels(data):
    assert data[1].image.shape == (3, 20, 30)
    assert (data[1].image == 99).all()


def test_an_image_without_objects_has_empty_targets(data):
    target = data[2].target
    assert target.labels.shape == (0,)
    assert target.labels.dtype == torch.int64
    assert target.boxes.shape == (0, 4)
    assert target.boxes.dtype == torch.float32


def test_results_are_boxes_with_sizes_and_original_ids():
    detections = Detections(
        torch.tensor([[0.75, 0.5], [0.25, 0.125]]),
        torch.tensor([[1, 0], [2, 2]]),
        torch.tensor([[[1.0, 2, 11, 22], [0, 0, 5, 5]], [[3, 3, 4, 5], [1, 1, 1, 1]]]),
    )
    assert to_coco_results(detections, [7, 3], [2, 4, 9]) == [
        {"image_id": 7, "category_id": 4, "bbox": [1, 2, 10, 20], "score": 0.75},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.5},
        {"image_id": 3, "category_id": 9, "bbox": [3, 3, 1, 2], "score": 0.25},
        {"image_id": 3, "category_id": 9, "bbox": [1, 1, 0, 0], "score": 0.125},
    ]


def test_results_need_an_image_id_for_every_image():
    detections = Detections(torch.zeros(2, 1), torch.zeros(2, 1).long(), torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="longer"):
        to_coco_results(detections, [7], [2])


def test_reading_and_writing_are_inverse(shapes):
    """An example's boxes, scaled back and written as results, are the annotations again."""
    data, results = CocoBoxes(shapes, shapes.parent / "images"), []
    for index in range(len(data)):
        image, target, image_id = data[index]
        size = torch.tensor([image.shape[2], image.shape[1]] * 2)
        centre, half = target.boxes[:, :2], target.boxes[:, 2:] / 2
        boxes = torch.cat([centre - half, centre + half], 1) * size
        detections = Detections(torch.ones(1, len(boxes)), target.labels[None], boxes[None])
        results += to_coco_results(detections, [image_id], data.category_ids)
    expected = truth_as_results(shapes)
    assert len(results) == len(expected)
    for result, entry in zip(results, expected, strict=True):
        assert result["category_id"] == entry["category_id"]
        assert result["bbox"] == pytest.approx(entry["bbox"], abs=1e-3)


def test_perfect_detections_reach_100_in_every_figure(shapes):
    precision = evaluate_boxes(shapes, truth_as_results(shapes))
    assert list(precision) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert list(precision.values()) == pytest.approx([100] * 6)


def test_evaluation_says_nothing(shapes, capsys):
    evaluate_boxes(shapes, truth_as_results(shapes))
    assert capsys.readouterr().out == ""


def test_wrong_classes_reach_nothing(shapes):
    results = [{**r, "category_id": r["category_id"] % 8 + 1} for r in truth_as_results(shapes)]
    assert evaluate_boxes(shapes, results)["AP50"] < 5


def test_no_detections_are_a_precision_of_0(shapes):
    assert list(evaluate_boxes(shapes, []).values()) == [0] * 6


def test_missing_the_small_objects_costs_their_figure_only(shapes):
    large = truth_as_results(shapes, lambda entry: entry["area"] >= 32**2)
    precision = evaluate_boxes(shapes, large)
    assert precision["APs"] == 0
    assert precision["APl"] == pytest.approx(100)
    assert 0 < precision["AP"] < 100


def test_detections_in_a_crowd_cost_nothing(shapes):
    entries = json.loads(shapes.read_text())["annotations"]
    crowds = [entry for entry in entries if entry["iscrowd"]]
    inside = [
        {"image_id": e["image_id"], "category_id": e["category_id"], "bbox": e["bbox"], "score": 1}
        for e in crowds
    ]
    assert inside
    assert evaluate_boxes(shapes, truth_as_results(shapes) + inside)["AP"] == pytest.approx(100)


def test_figures_without_objects_are_nan(tmp_path):
    annotations = [{"iscrowd": 0, **entry} for entry in CONTENT["annotations"]]
    (tmp_path / "a.json").write_text(json.dumps({**CONTENT, "annotations": annotations}))
    results = [{"image_id": 7, "category_id": 9, "bbox": [8, 6, 16, 12], "score": 0.9}]
    precision = evaluate_boxes(tmp_path / "a.json", results)
    assert math.isnan(precision["APm"])
    assert math.isnan(precision["APl"])
    assert precision["AP"] == pytest.approx(100 / 3)


def test_coco_has_80_classes():
    assert len(COCO_CATEGORY_IDS) == 80
    assert COCO_CATEGORY_IDS[0] == 1
    assert COCO_CATEGORY_IDS[-1] == 90


@pytest.mark.detectron2
def test_coco_classes_are_numbered_as_by_detectron2():
    from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

    mapping = _get_builtin_metadata("coco")["thing_dataset_id_to_contiguous_id"]
    assert {category: i for i, category in enumerate(COCO_CATEGORY_IDS)} == mapping
