"""Annotations and image files together."""

import copy
import logging

import pytest
from bad_data import CONTENT, GONE, changed, write
from PIL import Image

from dino_d2.data.check import check_data_set, check_splits_apart, load_checked, read_entry
from dino_d2.data.coco import CocoBoxes
from dino_d2.data.findings import DataError
from dino_d2.data.layouts import find_images


def messages(checked, *levels):
    return "\n".join(map(str, checked.findings.all(*levels)))


@pytest.mark.parametrize("files", ["decode", "heads", "none"])
def test_good_data_passes(tmp_path, files):
    checked = check_data_set(*write(tmp_path), files=files)
    assert not checked.changed
    assert messages(checked, "error") == ""
    assert checked.classes == ["dog", "cat"]
    assert len(checked.content["images"]) == 2


def test_missing_sizes_are_read_from_the_files(tmp_path):
    paths = write(tmp_path, changed(images={"width": GONE, "height": None}))
    checked = load_checked(*paths)
    assert checked.content["images"][1]["width"] == 40
    assert checked.content["images"][1]["height"] == 50
    assert "taken from the file: 1" in messages(checked, "converted")
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"without a size.*image 9: .*b\.png: does not exist"):
        load_checked(*paths)


def test_file_names_of_windows_are_converted(tmp_path):
    content = changed(images={"file_name": r"c\b.png"})
    content["images"][0]["file_name"] = r"c\a.png"
    path, _ = write(tmp_path, content)
    (tmp_path / "c").mkdir()
    (tmp_path / "b.png").rename(tmp_path / "c" / "b.png")
    (tmp_path / "a.png").rename(tmp_path / r"c\a.png")  # has this name
    assert find_images(path) == tmp_path
    checked = check_data_set(path, tmp_path)
    (finding,) = checked.findings.all("error", "converted")
    assert finding.reason == "file_name with backslashes, which become slashes"
    assert finding.places == (r"c\b.png",)
    assert [i["file_name"] for i in checked.content["images"]] == [r"c\a.png", "c/b.png"]


def test_file_names_of_windows_are_cut_where_slashes_belong(tmp_path):
    content = changed(images={"file_name": r"c/d\b.png"})
    content["images"][0]["file_name"] = r"c\d\a.png"
    path, _ = write(tmp_path, content)
    checked = load_checked(path, tmp_path, file_parts=1)
    assert [i["file_name"] for i in checked.content["images"]] == ["a.png", "b.png"]
    assert checked.findings.count("converted") == 2
    (tmp_path / "b.png").rename(tmp_path / r"d\b.png")  # has this name
    checked = load_checked(path, tmp_path, file_parts=1)
    assert [i["file_name"] for i in checked.content["images"]] == ["a.png", r"d\b.png"]
    assert checked.findings.count("converted") == 1


HALF = "\ud800"
HALVES = {
    "id": {"id": HALF},
    "id, no file": {"id": HALF, "file_name": "none.png", "width": GONE},
    "file": {"file_name": HALF},
    "file, no size": {"file_name": HALF, "width": GONE},
    "file of Windows": {"file_name": rf"{HALF}\b.png"},
}


@pytest.mark.parametrize("fields", HALVES.values(), ids=HALVES)
def test_findings_about_halves_of_characters_can_be_printed(tmp_path, fields):
    checked = check_data_set(*write(tmp_path, changed(images=fields)))
    assert rb"\ud800" in messages(checked, "error").encode()
    messages(checked).encode()


def test_a_path_that_leaves_the_folder_is_an_error(tmp_path):
    paths = write(tmp_path, changed(images={"file_name": "../b.png"}))
    with pytest.raises(DataError, match=r"image 9: file_name '../b.png' leads out"):
        load_checked(*paths)


def turned(size):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", size)
    picture.info["exif"] = exif.tobytes()
    return picture


SIZES = {
    "swapped": (Image.new("RGB", (50, 40)), "width and height are swapped"),
    "other": (Image.new("RGB", (41, 50)), "40 x 50 in the json, 41 x 50 in the file"),
    "turned": (turned((40, 50)), r"before the file's EXIF turn \(6\)"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_disagree_are_errors(tmp_path, case):
    picture, message = SIZES[case]
    paths = write(tmp_path)
    picture.save(tmp_path / "b.png", exif=picture.info.get("exif", b""))
    checked = check_data_set(*paths, files="heads")
    with pytest.raises(DataError, match=rf"image 9: b\.png: .*{message}"):
        checked.findings.raise_errors()
    assert [image["id"] for image in checked.content["images"]] == [7]
    with pytest.raises(DataError, match=message):
        CocoBoxes(*paths)[1]


def test_all_bad_images_are_told_at_once(tmp_path):
    paths = write(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").unlink()
    checked = check_data_set(*paths)
    assert "a.png: is empty" in messages(checked, "error")
    assert "b.png: does not exist" in messages(checked, "error")
    assert checked.content["annotations"] == []


def test_conversions_of_images_are_told(tmp_path):
    checked = check_data_set(*write(tmp_path, b=Image.new("RGBA", (40, 50))), files="heads")
    assert "image: transparent parts made white: 1 (image 9: b.png)" in messages(checked)


def test_symbolic_links_are_told(tmp_path):
    paths = write(tmp_path / "data")
    (tmp_path / "data" / "b.png").rename(tmp_path / "elsewhere.png")
    (tmp_path / "data" / "b.png").symlink_to(tmp_path / "elsewhere.png")
    checked = check_data_set(*paths)
    assert "symbolic links, which are followed: 1" in messages(checked, "note")


def test_images_of_both_splits_are_told(tmp_path):
    paths = write(tmp_path)
    first, second = check_data_set(*paths), check_data_set(*paths)
    check_splits_apart(first, second)
    assert "images that are in " in messages(second, "note")


def test_reading_tells_of_a_conversion_once(tmp_path, caplog):
    write(tmp_path, b=Image.new("LA", (40, 50)))
    entry = CONTENT["images"][1]
    with caplog.at_level(logging.WARNING, "detectron2.dino_d2"):
        assert read_entry(entry, tmp_path / "b.png").shape == (50, 40, 3)
        count = len(caplog.records)
        read_entry(entry, tmp_path / "b.png")
    assert len(caplog.records) == count <= 1


def test_a_file_that_changes_is_noticed(tmp_path):
    data = CocoBoxes(*write(tmp_path))
    data[1]
    Image.new("RGB", (30, 30)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="30 x 30 in the file"):
        data[1]


def test_plain_data_sets_are_checked(tmp_path):
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["category_id"] = 77
    with pytest.raises(DataError, match=r"image 7, annotation 1 .*category_id 77"):
        CocoBoxes(*write(tmp_path, content))
