"""The generated data set: reproducible, valid COCO, and hard enough to measure something."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dino_d2.data.shapes import SETTINGS, SHAPES, make_shapes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # in pycocotools


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """24 images of the hard setting, large enough for all three of COCO's size classes."""
    out = tmp_path_factory.mktemp("hard")
    make_shapes(out, 24, 448, 0, "hard")
    return out


@pytest.fixture(scope="module")
def content(hard):
    return json.loads((hard / "annotations.json").read_text())


@pytest.fixture(scope="module")
def coco(hard):
    return COCO(str(hard / "annotations.json"))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def of_size(entries, low, high):
    return [e for e in entries if low <= e["area"] < high and not e["iscrowd"]]


def test_same_arguments_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_shapes(tmp_path / name, 6, 96, 3, "hard")
    assert len(files(tmp_path / "a")) == 7
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_another_seed_gives_other_images_and_objects(tmp_path):
    first = make_shapes(tmp_path / "a", 3, 96, 0)
    second = make_shapes(tmp_path / "b", 3, 96, 1)
    assert first.read_text() != second.read_text()
    for name in ("000001.jpg", "000002.jpg", "000003.jpg"):
        assert (first.parent / "images" / name).read_bytes() != (
            second.parent / "images" / name
        ).read_bytes()


def test_a_longer_data_set_starts_with_the_shorter_one(tmp_path):
    short = json.loads(make_shapes(tmp_path / "a", 3, 96, 0).read_text())
    long = json.loads(make_shapes(tmp_path / "b", 5, 96, 0).read_text())
    assert long["images"][:3] == short["images"]
    assert long["annotations"][: len(short["annotations"])] == short["annotations"]


def test_other_random_numbers_do_not_matter(tmp_path):
    first = make_shapes(tmp_path / "a", 2, 96)
    np.random.seed(5)
    assert make_shapes(tmp_path / "b", 2, 96).read_text() == first.read_text()


def test_ids_are_unique_and_refer_to_something(content):
    for kind in ("images", "annotations", "categories"):
        ids = [entry["id"] for entry in content[kind]]
        assert len(set(ids)) == len(ids) > 0
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for entry in content["annotations"]:
        assert entry["image_id"] in images
        assert entry["category_id"] in categories


def test_files_have_the_sizes_that_the_json_names(hard, content):
    sizes = set()
    for image in content["images"]:
        with Image.open(hard / "images" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])
            assert file.mode == "RGB"
        assert max(file.size) == 448
        assert min(file.size) >= 336
        sizes.add(file.size)
    assert len(sizes) > 1


def test_boxes_are_tight_around_masks_inside_the_image(content, coco):
    images = {image["id"]: image for image in content["images"]}
    for entry in content["annotations"]:
        image, mask = images[entry["image_id"]], coco.annToMask(entry)
        assert mask.shape == (image["height"], image["width"])
        x, y, width, height = entry["bbox"]
        assert min(x, y) >= 0
        assert min(width, height) > 0
        assert mask[y : y + height, x : x + width].sum() == mask.sum() == entry["area"]
        for side in (mask[y], mask[y + height - 1], mask[:, x], mask[:, x + width - 1]):
            assert side.any()


def test_objects_of_an_image_do_not_share_pixels(content, coco):
    for image in content["images"]:
        entries = coco.imgToAnns[image["id"]]
        if entries:
            assert sum(coco.annToMask(entry).astype(int) for entry in entries).max() == 1


def test_all_size_classes_occur(content):
    assert len(of_size(content["annotations"], 0, 32**2)) >= 10
    assert len(of_size(content["annotations"], 32**2, 96**2)) >= 10
    assert len(of_size(content["annotations"], 96**2, math.inf)) >= 10


def test_all_classes_occur(content):
    assert len(content["categories"]) == 8
    assert {e["category_id"] for e in content["annotations"]} == {
        category["id"] for category in content["categories"]
    }


def test_only_rings_have_a_hole(content, coco):
    """In an image's last object, which nothing covers."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    last = {e["image_id"]: e for e in content["annotations"] if not e["iscrowd"]}
    assert "ring" in {names[entry["category_id"]] for entry in last.values()}
    for entry in last.values():
        x, y, width, height = entry["bbox"]
        filled = coco.annToMask(entry)[y + height // 2, x + width // 2]
        assert bool(filled) == (names[entry["category_id"]] != "ring")


def test_some_images_are_empty_and_some_have_crowds(content):
    with_objects = {entry["image_id"] for entry in content["annotations"]}
    assert 0 < len(content["images"]) - len(with_objects) < 8
    crowds = [entry for entry in content["annotations"] if entry["iscrowd"]]
    assert 0 < len(crowds) < len(content["images"])


def test_hard_objects_overlap(content):
    """Boxes of different objects of an image intersect by a good part."""
    overlaps = 0
    for image in content["images"]:
        boxes = [e["bbox"] for e in content["annotations"] if e["image_id"] == image["id"]]
        for i, (x, y, w, h) in enumerate(boxes):
            for x2, y2, w2, h2 in boxes[:i]:
                inner = (min(x + w, x2 + w2) - max(x, x2), min(y + h, y2 + h2) - max(y, y2))
                overlaps += min(inner) > 0.25 * min(w, h, w2, h2)
    assert overlaps >= 10


def test_an_object_stands_out_from_what_surrounds_it(hard, content, coco):
    entry = max(of_size(content["annotations"], 0, math.inf), key=lambda entry: entry["area"])
    name = coco.imgs[entry["image_id"]]["file_name"]
    pixels = np.asarray(Image.open(hard / "images" / name), dtype=float)
    mask = coco.annToMask(entry).astype(bool)
    spread = pixels[mask].std(0).mean()
    assert spread < 40  # one colour and noise, though later objects may blur its edge
    assert np.abs(pixels[mask].mean(0) - pixels[~mask].mean(0)).max() > 10


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_of_the_area_that_geometry_says(name):
    areas = {
        "circle": math.pi,
        "square": 2,
        "triangle": 3 * math.sqrt(3) / 4,
        "ring": math.pi * (1 - 0.55**2),
        "cross": 4 * 0.6 * 0.9 - 0.6**2,
        "diamond": 1,
        "hexagon": 3 * math.sqrt(3) / 2,
        "star": math.pi * (0.4**2 + 2 * 0.4 * 0.6 / 2.5 + 0.6**2 / 4),  # radius .4 + .6 x^1.5
    }
    v, u = (np.mgrid[:800, :800] + 0.5) / 400 - 1
    assert SHAPES[name](u, v).mean() * 4 == pytest.approx(areas[name], rel=0.01)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_class_of_a_setting_can_be_drawn(setting):
    assert set(SETTINGS[setting].classes) <= set(SHAPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"setting": "medium"}, "easy, hard"),
        ({"size": 79}, "size >= 80"),
        ({"num_images": 0}, "num_images >= 1"),
    ],
)
def test_impossible_arguments_are_errors(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_shapes(tmp_path / "out", **{"num_images": 1, "size": 96, **arguments})
    assert not (tmp_path / "out").exists()


def test_smallest_size_works(tmp_path):
    path = make_shapes(tmp_path, 4, 80)
    assert len(json.loads(path.read_text())["images"]) == 4


def test_progress_counts_every_image(tmp_path):
    seen = []
    make_shapes(tmp_path, 3, 80, progress=seen.append)
    assert seen == [1, 2, 3]


def test_command_line_writes_what_the_function_does(tmp_path):
    command = [sys.executable, "-m", "dino_d2.tools.make_shapes", "--out", str(tmp_path / "a")]
    command += ["--images", "3", "--size", "96", "--seed", "7", "--setting", "hard"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote 3 images" in done.stderr
    make_shapes(tmp_path / "b", 3, 96, 7, "hard")
    assert files(tmp_path / "a") == files(tmp_path / "b")
