"""Annotations that are wrong: refused, dropped or converted, with a message that names them."""

import copy
import json
import random
import time

import numpy as np
import pytest
from bad_data import CONTENT, GONE, added, changed, with_boxes

from dino_d2.data.annotations import check_annotations, read_annotations
from dino_d2.data.findings import DataError, Findings
from dino_d2.data.writing import write_annotations


def check(content):
    findings = Findings("x.json")
    return check_annotations(content, findings), findings


def lines(findings, level):
    return [str(finding) for finding in findings.all(level)]


def test_good_data_passes_as_it_is():
    content, findings = check(CONTENT)
    assert findings.count("error", "dropped", "converted") == 0
    assert content["annotations"] == CONTENT["annotations"]
    assert [category["id"] for category in content["categories"]] == [2, 5]


BROKEN = {
    "": "not valid json",
    '{"images": [': "not valid json",
    "[" * 100_000: "not valid json",
    "[]": "holds a list",
    '{"images": []}': "'annotations' must be a list; it is null",
    '{"images": {}, "annotations": [], "categories": []}': "'images' must be a list",
    '{"images": [3], "annotations": [], "categories": []}': r"images\[0\] is 3",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:20])
def test_a_broken_json_is_named(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"broken.json: {BROKEN[text]}"):
        read_annotations(path)


def test_a_missing_json_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: there is no such file"):
        read_annotations(tmp_path / "none.json")


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(CONTENT), "utf-8-sig")
    assert read_annotations(tmp_path / "a.json") == CONTENT


OBJECT = "image 7, annotation 2 (annotations[1]): "
REFUSED = {
    "box of 3": (changed(annotations={"bbox": [1, 2, 3]}), OBJECT + "bbox [1, 2, 3]"),
    "box of 5": (changed(annotations={"bbox": [1, 2, 3, 4, 5]}), OBJECT + "bbox [1, 2, 3, 4, 5]"),
    "box of strings": (changed(annotations={"bbox": ["1", 2, 3, 4]}), OBJECT + 'bbox ["1"'),
    "box with null": (changed(annotations={"bbox": [1, 2, None, 4]}), OBJECT + "bbox [1, 2, null"),
    "box with true": (changed(annotations={"bbox": [1, 2, True, 4]}), OBJECT + "bbox"),
    "box null": (changed(annotations={"bbox": None}), OBJECT + "bbox null"),
    "box absent": (changed(annotations={"bbox": GONE}), OBJECT + "bbox null"),
    "class unknown": (changed(annotations={"category_id": 3}), OBJECT + "category_id 3"),
    "class null": (changed(annotations={"category_id": None}), OBJECT + "category_id null"),
    "class string": (changed(annotations={"category_id": "5"}), OBJECT + 'category_id "5"'),
    "class negative": (changed(annotations={"category_id": -1}), OBJECT + "category_id -1"),
    "class true": (changed(annotations={"category_id": True}), OBJECT + "category_id true"),
    "image null": (changed(annotations={"image_id": None}), "image null, annotation 2"),
    "crowd of 2": (changed(annotations={"iscrowd": 2}), OBJECT + "iscrowd 2"),
    "image id twice": (added("images"), "images[2], id 9"),
    "image id null": (changed(images={"id": None}), "images[1], id null"),
    "image id of half a character": (changed(images={"id": "\ud800"}), r'id "\ud800"'),
    "image of half a character": (
        changed(annotations={"image_id": "\ud800"}),
        r'image "\ud800", annotation 2',
    ),
    "image ids mixed": (changed(images={"id": "9"}), "some image ids are integers"),
    "no file name": (changed(images={"file_name": GONE}), "id 9, file_name null"),
    "width 0": (changed(images={"width": 0}), "id 9, width 0, height 50"),
    "height a string": (changed(images={"height": "50"}), 'id 9, width 40, height "50"'),
    "no images": ({**CONTENT, "images": []}, "there are no images"),
    "no classes": ({**CONTENT, "categories": []}, "categories is empty"),
    "class id twice": (added("categories", name="cow"), "category id twice: 1 (2, 2 times)"),
    "class name twice": (
        changed(categories={"name": "cat"}),
        "category name twice: 1 ('cat', 2 times)",
    ),
    "class id a string": (changed(categories={"id": "2"}), 'categories[1]: id "2"'),
    "class without a name": (changed(categories={"name": " "}), 'categories[1], id 2: " "'),
    "class of half a character": (changed(categories={"name": "\ud800"}), r'id 2: "\ud800"'),
    "file of half a character": (changed(images={"file_name": "\ud800"}), r'file_name "\ud800"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    content, message = REFUSED[case]
    findings = check(content)[1]
    with pytest.raises(DataError) as failure:
        findings.raise_errors()
    assert message in str(failure.value)
    assert str(failure.value).startswith("x.json: ")


def test_ids_from_0_are_recognised():
    content = changed(annotations={"category_id": 0})
    content["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert any("begin at 0" in line for line in lines(check(content)[1], "error"))


DROPPED = {
    "not finite": ([1, 2, float("nan"), 4], "box is not finite"),
    "infinite": ([1, 2, float("inf"), 4], "box is not finite"),
    "an endless integer": ([1, 2, 10**400, 4], "box is not finite"),
    "huge": ([0, 0, 1e30, 5], "box is more than twice as large as its image"),
    "zero": ([1, 2, 0, 4], "box has no area"),
    "a speck": ([1, 2, 1e-6, 4], "box has no area"),
    "negative": ([10, 20, -5, 4], "box has a negative width or height"),
    "right of the image": ([80, 2, 5, 4], "box lies outside its image"),
    "above the image": ([8, -9, 5, 4], "box lies outside its image"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_dropped(case):
    box, reason = DROPPED[case]
    content, findings = check(changed(annotations={"bbox": box}))
    assert [entry["id"] for entry in content["annotations"]] == [1]
    (line,) = lines(findings, "dropped")
    assert line.startswith(f"dropped: {reason}: 1 ({OBJECT}bbox [")


def test_an_object_of_no_image_is_dropped():
    content, findings = check(changed(annotations={"image_id": 8}))
    assert len(content["annotations"]) == 1
    assert "image 8, annotation 2" in lines(findings, "dropped")[0]


def test_drops_are_counted_and_some_places_named():
    content = with_boxes([[1, 1, 0, 5]] * 9 + [[1, 1, 5, 5]] * 100)
    kept, findings = check(content)
    assert len(kept["annotations"]) == 100
    (line,) = lines(findings, "dropped")
    assert ": 9 (" in line
    assert "and 4 more)" in line
    findings.raise_errors()


def test_too_many_drops_are_an_error():
    findings = check(with_boxes([[1, 1, 0, 5]] * 20 + [[1, 1, 5, 5]] * 100))[1]
    with pytest.raises(DataError, match=r"20 of 120 .* more than 10%: 20 x box has no area"):
        findings.raise_errors()


@pytest.mark.parametrize("number", [1, 6])
def test_to_drop_all_is_an_error_however_few(number):
    findings = check(with_boxes([[1, 1, 0, 5]] * number))[1]
    with pytest.raises(DataError, match=f"{number} of {number} annotations would be dropped"):
        findings.raise_errors()


def random_boxes(number=40, width=80, height=60):
    rng = np.random.default_rng(0)
    corners = rng.random((number, 2)) * 0.6 * (width, height)
    return np.hstack([corners, (rng.random((number, 2)) * 0.3 + 0.1) * (width, height)])


READINGS = {
    "two corners": lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]]),
    "two corners, y first": lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]])[:, [1, 0, 3, 2]],
    "y first": lambda b: b[:, [1, 0, 3, 2]],
    "centre and size": lambda b: np.hstack([b[:, :2] + b[:, 2:] / 2, b[:, 2:]]),
    "relative to the image": lambda b: b / (160, 60, 160, 60),
}


@pytest.mark.parametrize("name", READINGS)
def test_boxes_of_another_format_are_refused(name):
    findings = check(with_boxes(READINGS[name](random_boxes(width=160)), width=160))[1]
    assert any(f"boxes look like {name}" in line or f"boxes are {name}" in line
               for line in lines(findings, "error"))  # fmt: skip


def test_boxes_of_the_right_format_are_not():
    boxes = random_boxes()
    boxes[::2, :2] += boxes[::2, 2:]  # a half reaches out of the image, or nearly
    findings = check(with_boxes(boxes))[1]
    assert lines(findings, "error") == []
    assert findings.count("converted") > 0


CONVERTED = {
    "id 0": ({"id": 0}, "numbered anew"),
    "id twice": ({"id": 1}, "numbered anew"),
    "id absent": ({"id": GONE}, "numbered anew"),
    "id a string": ({"id": "2"}, "numbered anew"),
    "no area": ({"area": GONE}, "area is missing"),
    "area not finite": ({"area": float("nan")}, "area is missing or no number"),
    "no crowd flag": ({"iscrowd": GONE}, "iscrowd is missing"),
    "ignored": ({"ignore": 1}, "ignore: 1 becomes iscrowd: 1"),
    "reaching out": ({"bbox": [70, 50, 40, 40]}, "reaches out of its image"),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_converted(case):
    fields, message = CONVERTED[case]
    content, findings = check(changed(annotations=fields))
    assert message in lines(findings, "converted")[0]
    assert lines(findings, "error") == lines(findings, "dropped") == []
    ids = [entry["id"] for entry in content["annotations"]]
    assert ids == [1, 2]
    last = content["annotations"][1]
    assert last["iscrowd"] == (case == "ignored")
    assert last["area"] == (1600 if case == "reaching out" else 12) or "area" in last


def test_a_placeholder_among_the_classes_is_left_out():
    """As Roboflow writes the name of the data set."""
    content, findings = check(added("categories", id=0))
    assert content["categories"] == [{"id": 2, "name": "dog"}, {"id": 5, "name": "cat"}]
    (line,) = lines(findings, "converted")
    assert "class without annotations left out: another has its name: 1 (id 0, 'dog')" in line
    assert findings.count("error") == 0


MASKS = [
    [[1, 2, 3, 4]],
    [[float("nan")] * 6],
    [[1e9] * 6],
    {"size": [2**20, 2**20], "counts": "x"},
    {"size": [8, 8], "counts": [1]},
    "garbage",
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_reach_nobody(mask):
    content, findings = check(changed(annotations={"segmentation": mask}))
    assert all("segmentation" not in entry for entry in content["annotations"])
    assert findings.count("error", "dropped") == 0


def test_run_lengths_are_pycocotools():
    from pycocotools import mask as coco_mask

    from dino_d2.data.annotations import _run_lengths

    generator = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.5, 1.0):
        mask = np.asfortranarray((generator.random((37, 53)) < density).astype(np.uint8))
        pixels = mask.flatten(order="F")
        changes = np.flatnonzero(np.diff(pixels)) + 1
        expected = np.diff([0, *changes, len(pixels)]).tolist()
        expected = [0, *expected] if pixels[0] else expected
        assert _run_lengths(coco_mask.encode(mask)["counts"].decode()) == expected


def test_well_formed_masks_stay():
    image = CONTENT["images"][0]
    size = [image["height"], image["width"]]
    half = image["height"] * image["width"] // 2
    rest = image["height"] * image["width"] - half
    for mask in ([[1, 1, 5, 1, 5, 5]], {"size": size, "counts": [half, rest]}):
        content, _ = check(changed(annotations={"segmentation": mask}))
        assert [e["segmentation"] for e in content["annotations"] if "segmentation" in e] == [mask]


@pytest.mark.parametrize("entries", [[], [{**CONTENT["annotations"][0], "iscrowd": 1}]])
def test_nothing_to_detect_is_allowed_and_told(entries):
    findings = check({**CONTENT, "annotations": entries})[1]
    assert findings.count("error") == 0
    notes = "\n".join(lines(findings, "note"))
    assert "images without objects: trained on as background: 2" in notes
    assert "classes without any object: 2 (dog; cat)" in notes


def test_class_names_that_look_the_same_are_told():
    findings = check(changed(categories={"name": "Cat "}))[1]
    assert "class names that differ in case or spaces only: 1 (cat)" in lines(findings, "note")[0]


def test_what_is_there_twice_is_told():
    notes = "\n".join(lines(check(added("annotations", id=3))[1], "note"))
    assert "objects that are there twice" in notes
    notes = "\n".join(lines(check(added("images", id=10))[1], "note"))
    assert "image file under several ids: 1 (b.png: ids 9 and 10)" in notes


def test_what_is_left_passes_again(tmp_path):
    content = with_boxes([[1, 1, 0, 5], [1, 1, 5, 5], [float("nan")] * 4])
    write_annotations(check(content)[0], tmp_path / "a" / "clean.json")
    again, findings = check(read_annotations(tmp_path / "a" / "clean.json"))
    assert findings.count("error", "dropped", "converted") == 0
    assert len(again["annotations"]) == 1


NAN, INF, LONG = float("nan"), float("inf"), 10**400
ODD = [None, True, 0, -1, 1, 0.5, LONG, 1e308, NAN, -INF, "", "x", "7", [], [1], {}, {"a": 1},
       [None] * 4, ["1"] * 4, [NAN] * 4, [1e308] * 4, [-INF, 0, INF, 1], [LONG] * 4]  # fmt: skip


def test_no_value_in_any_field_passes_unseen_or_crashes():
    """Random entries of random values: what is left can be trained on, and written."""
    rng = random.Random(0)
    for _ in range(3000):
        content = copy.deepcopy(CONTENT)
        for _ in range(rng.choice([1, 1, 2, 3])):
            entry = rng.choice(content[rng.choice(list(content))])
            field = rng.choice([*entry, "ignore", "segmentation", "other"])
            entry[field] = copy.deepcopy(rng.choice(ODD))
        left, findings = check(content)
        json.dumps(left, allow_nan=False)
        if findings.count("error"):
            continue
        images = {image["id"]: image for image in left["images"]}
        classes = {category["id"] for category in left["categories"]}
        for entry in left["annotations"]:
            image, (x, y, w, h) = images[entry["image_id"]], entry["bbox"]
            assert entry["category_id"] in classes
            assert 0 < w <= 2 * image["width"] + 2
            assert 0 < h <= 2 * image["height"] + 2
            assert x < image["width"]
            assert y < image["height"]


def test_large_data_is_checked_in_seconds():
    content = with_boxes(np.tile(random_boxes(100), (500, 1)))
    start = time.process_time()
    check(content)
    assert time.process_time() - start < 5  # 50,000 boxes; about a half is usual
