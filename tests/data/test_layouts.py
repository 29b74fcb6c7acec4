"""Where a data set's files are found, and how it is split."""

import json
import shutil

import pytest
from bad_data import CONTENT, write

from dino_d2.data.findings import DataError
from dino_d2.data.layouts import find_sources, split_content

LAYOUTS = {  # json and image folder of each split, below the data set's folder
    "coco": {
        "train": ("annotations/instances_train2017.json", "train2017"),
        "val": ("annotations/instances_val2017.json", "val2017"),
    },
    "roboflow": {
        "train": ("train/_annotations.coco.json", "train"),
        "val": ("valid/_annotations.coco.json", "valid"),
        "test": ("test/_annotations.coco.json", "test"),
    },
    "shapes": {
        "train": ("train/annotations.json", "train/images"),
        "val": ("val/annotations.json", "val/images"),
    },
    "jsons and one folder": {"train": ("train.json", "images"), "val": ("val.json", "images")},
    "folders of the same names": {
        "train": ("labels/train.json", "images/train"),
        "val": ("labels/val.json", "images/val"),
    },
    "one json": {"train": ("my_labels.json", "pictures")},
    "one json among the images": {"train": ("x.json", ".")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_layouts(tmp_path, layout):
    for json_name, images in LAYOUTS[layout].values():
        path, source = write(tmp_path / "source")
        (tmp_path / "data" / json_name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / images).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data" / json_name)
        for name in ("a.png", "b.png"):
            shutil.copy(source / name, tmp_path / "data" / images / name)
    (tmp_path / "data" / "notes.json").write_text("{}")
    found = find_sources(tmp_path / "data")
    relative = {
        split: tuple(str(path.relative_to(tmp_path / "data")) for path in source)
        for split, source in found.items()
    }
    assert relative == LAYOUTS[layout]
    if layout == "one json":
        assert find_sources(tmp_path / "data" / "my_labels.json") == found


def test_a_pair_is_taken_as_it_is():
    assert [*map(str, find_sources("a/b.json:c/d")["train"])] == ["a/b.json", "c/d"]
    assert [*map(str, find_sources("a:1/b.JSON:c:2")["train"])] == ["a:1/b.JSON", "c:2"]


def test_captions_and_keypoints_of_coco_are_left_alone(tmp_path):
    folder = write(tmp_path / "images")[1]
    (tmp_path / "annotations").mkdir()
    for name in ("instances_train2017", "person_keypoints_train2017", "captions_train2017"):
        (tmp_path / "annotations" / f"{name}.json").write_text(json.dumps(CONTENT))
    (folder / "annotations.json").unlink()
    found = find_sources(tmp_path)
    assert found["train"].annotations.name == "instances_train2017.json"


def test_what_is_not_clear_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no COCO-format json for training"):
        find_sources(tmp_path)
    path, _ = write(tmp_path)
    shutil.copy(path, tmp_path / "other.json")
    with pytest.raises(DataError, match=r"several jsons for train: annotations\.json, other\.json"):
        find_sources(tmp_path)
    with pytest.raises(DataError, match="the name of the data set is empty"):
        find_sources("")
    (tmp_path / "empty.json").write_text(json.dumps({**CONTENT, "images": []}))
    with pytest.raises(DataError, match=r"empty\.json: there are no images"):
        find_sources(tmp_path / "empty.json")
    lonely = tmp_path / "lonely" / "far"
    lonely.mkdir(parents=True)
    shutil.copy(path, lonely / "lonely.json")
    with pytest.raises(DataError, match=r"in no folder near it; give .*lonely\.json:image_folder"):
        find_sources(lonely / "lonely.json")


def test_a_split_whose_json_is_damaged_is_an_error(tmp_path):
    """Rather than to train without it."""
    path, folder = write(tmp_path)
    shutil.copy(path, folder / "val.json")
    assert find_sources(folder)["val"].annotations == folder / "val.json"
    for name in ("val.json", "train.json"):
        (folder / name).write_text(path.read_text()[:-9])
        with pytest.raises(DataError, match=rf"{name}: not valid json, perhaps cut off"):
            find_sources(folder)
        (folder / name).unlink()
    (folder / "val_results.json").write_text("[]")
    way_out = r"holds a list.*; move it away or give 'annotations\.json:image_folder'"
    with pytest.raises(DataError, match=rf"val_results\.json: {way_out}"):
        find_sources(folder)
    (folder / "val_results.json").unlink()
    path.write_text("[]")
    with pytest.raises(DataError, match=r"no COCO-format json .*annotations\.json: holds a list"):
        find_sources(folder)


def test_odd_names_of_files(tmp_path):
    path, folder = write(tmp_path)
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "a" * 5000
    (folder / "LABELS.JSON").write_text(json.dumps(content))
    path.unlink()
    assert find_sources(folder)["train"] == (folder / "LABELS.JSON", folder)


def many(number):
    images = [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 9} for i in range(number)]
    entries = [{"id": i + 1, "image_id": i} for i in range(number)]
    return {"images": images, "annotations": entries, "categories": []}


def test_a_split_is_disjoint_whole_and_always_the_same():
    content = many(101)
    train, val = split_content(content)
    ids = [{image["id"] for image in part["images"]} for part in (train, val)]
    assert [len(part) for part in ids] == [90, 11]
    assert ids[0] | ids[1] == set(range(101))
    for part, own in zip((train, val), ids, strict=True):
        assert {entry["image_id"] for entry in part["annotations"]} == own
    content["images"].reverse()
    assert {image["id"] for image in split_content(content)[1]["images"]} == ids[1]


def test_two_images_are_enough_for_a_split():
    assert [len(part["images"]) for part in split_content(many(2))] == [1, 1]
    with pytest.raises(DataError, match="one image cannot be split"):
        split_content(many(1))
