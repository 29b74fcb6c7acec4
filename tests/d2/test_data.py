"""Data sets by name or by file, and DETR's augmentation."""

import json

import numpy as np
import pytest
from PIL import Image

from dino_d2.data.shapes import make_shapes

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Two images with objects and one without, as the name of a data set."""
    folder = tmp_path_factory.mktemp("shapes")
    path = make_shapes(folder, 3, 96)
    content = json.loads(path.read_text())
    entries = [entry for entry in content["annotations"] if entry["image_id"] != 2]
    path.write_text(json.dumps({**content, "annotations": entries}))
    return f"{path}:{folder / 'images'}"


@pytest.fixture
def mapper():
    """DETR's augmentation, as the configs for COCO have it."""
    from detectron2.config import instantiate

    from dino_d2 import model_zoo

    np.random.seed(0)  # Detectron2's transforms draw from it
    return instantiate(model_zoo.get_config("dino/dino_r50_4scale_12ep").dataloader.train.mapper)


@pytest.fixture
def picture(tmp_path):
    """A red rectangle on black, as an entry of a data set."""
    from detectron2.structures import BoxMode

    pixels = np.zeros((150, 200, 3), np.uint8)
    pixels[40:100, 50:130, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "red.png")
    box = {"bbox": [50, 40, 80, 60], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}
    file = {"file_name": str(tmp_path / "red.png"), "height": 150, "width": 200, "image_id": 9}
    return {**file, "annotations": [box]}


def register(name):
    from dino_d2.d2.data import register_if_file

    return register_if_file(name)


def load(names, **options):
    from dino_d2.d2.data import load_datasets

    return load_datasets(names, **options)


def test_a_file_becomes_a_data_set_of_its_name(shapes):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    assert register(shapes) == shapes
    assert len(DatasetCatalog.get(shapes)) == 3
    metadata = MetadataCatalog.get(shapes)
    assert metadata.thing_classes == ["circle", "square", "triangle"]
    assert metadata.json_file == shapes.split(":")[0]


def test_registering_again_changes_nothing(shapes):
    assert register(register(shapes)) == shapes


def test_a_registered_name_is_returned():
    assert register("coco_2017_val") == "coco_2017_val"


def test_an_unknown_name_is_an_error_that_says_what_to_give():
    with pytest.raises(KeyError, match=r"'my_data' is not registered.*annotations\.json:image"):
        register("my_data")


def test_a_missing_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json'"):
        register(f"{tmp_path}/none.json:{tmp_path}")


def test_a_missing_image_folder_is_named(shapes):
    with pytest.raises(FileNotFoundError, match="'/no/images'"):
        register(f"{shapes.split(':')[0]}:/no/images")


def test_nothing_is_registered_after_an_error(tmp_path):
    from detectron2.data import DatasetCatalog

    name = f"{tmp_path}/none.json:{tmp_path}"
    with pytest.raises(FileNotFoundError):
        register(name)
    assert name not in DatasetCatalog.list()


def test_images_without_objects_stay(shapes):
    assert [bool(entry["annotations"]) for entry in load(shapes)] == [True, False, True]


def test_images_without_objects_can_be_left_out(shapes):
    assert [entry["image_id"] for entry in load(shapes, filter_empty=True)] == [1, 3]


def test_several_data_sets_are_joined(shapes, tmp_path):
    other = make_shapes(tmp_path, 2, 80)
    assert len(load([shapes, f"{other}:{tmp_path / 'images'}"])) == 5


def test_a_batch_of_training_may_hold_images_without_objects(shapes):
    from detectron2.config import instantiate

    from dino_d2 import model_zoo

    loader = model_zoo.get_config("dino/dino_shapes").dataloader.train
    loader.dataset.names, loader.total_batch_size = shapes, 3
    loader.aspect_ratio_grouping = False
    batch = next(iter(instantiate(loader)))
    assert sorted(source["image_id"] for source in batch) == [1, 2, 3]
    counts = {source["image_id"]: len(source["instances"]) for source in batch}
    assert counts[2] == 0
    assert min(counts[1], counts[3]) > 0


def test_the_evaluator_takes_a_file(shapes):
    from detectron2.evaluation import COCOEvaluator

    from dino_d2.d2.data import coco_evaluator

    assert isinstance(coco_evaluator(shapes), COCOEvaluator)
    assert isinstance(coco_evaluator([shapes]), COCOEvaluator)
    with pytest.raises(ValueError, match="one data set at a time"):
        coco_evaluator([shapes, shapes])


def test_the_right_number_of_classes_passes(shapes):
    from dino_d2.d2.data import check_num_classes

    load(shapes)
    check_num_classes(shapes, 3)
    check_num_classes([shapes, shapes], 3)


@pytest.mark.parametrize("as_list", [False, True])
def test_another_number_of_classes_is_an_error_that_says_what_to_set(shapes, as_list):
    from dino_d2.d2.data import check_num_classes

    load(shapes)
    with pytest.raises(ValueError, match=r"3 classes \(circle.*80; set .*num_classes=3"):
        check_num_classes([shapes] if as_list else shapes, 80)


@pytest.mark.parametrize("names", [[], (), ""])
def test_classes_of_no_data_set_are_an_error_that_says_what_to_set(names):
    from dino_d2.d2.data import class_names

    message = r"train\.init_classes needs .* dataloader\.train\.dataset\.names .*DATASETS\.TRAIN"
    with pytest.raises(ValueError, match=message):
        class_names("coco", names)


def red_box(image):
    """Corners around the red pixels of a (3, H, W) image."""
    red = (image[0] > 127).numpy()
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_augmented_images_have_the_published_sizes(mapper, picture):
    sizes = {tuple(mapper(picture)["image"].shape) for _ in range(30)}
    assert len(sizes) > 10
    for _, height, width in sizes:
        assert min(height, width) in range(480, 801, 32) or max(height, width) == 1333
        assert max(height, width) <= 1333


def test_boxes_stay_on_their_objects(mapper, picture):
    """Through flips, both resizes and the crop; images are in RGB."""
    for _ in range(30):
        result = mapper(picture)
        if len(result["instances"]):
            (box,) = result["instances"].gt_boxes.tensor.tolist()
            assert red_box(result["image"]) == pytest.approx(box, abs=6)  # a source pixel's width
        else:
            assert (result["image"][0] > 127).float().mean() < 1e-3


def test_half_of_the_images_are_cropped_and_half_are_flipped(mapper, picture):
    cropped = flipped = 0
    for _ in range(60):
        result = mapper(picture)
        _, height, width = result["image"].shape
        whole = abs(width / height - 200 / 150) < 0.01
        cropped += not whole
        if whole:
            flipped += red_box(result["image"])[0] > width * 0.3  # 50 or 70 of 200 pixels
    assert 18 <= cropped <= 42
    assert 0.2 < flipped / (60 - cropped) < 0.8


def test_crowds_are_no_targets(mapper, picture):
    crowd = {**picture["annotations"][0], "iscrowd": 1}
    assert len(mapper({**picture, "annotations": [crowd]})["instances"]) == 0


def test_testing_resizes_only(picture):
    from detectron2.config import instantiate

    from dino_d2 import model_zoo

    loader = model_zoo.get_config("dino/dino_r50_4scale_12ep").dataloader
    result = instantiate(loader.test.mapper)(picture)
    assert result["image"].shape == (3, 800, 1067)
    assert "instances" not in result
    scaled = [side * 16 / 3 for side in (50, 40, 130, 100)]
    assert red_box(result["image"]) == pytest.approx(scaled, abs=6)
