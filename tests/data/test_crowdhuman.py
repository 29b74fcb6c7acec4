"""CrowdHuman's format."""

import json

import pytest
from PIL import Image

from dino_d2.data.check import check_data_set
from dino_d2.data.findings import DataError
from dino_d2.tools import convert_crowdhuman

PERSON = {
    "tag": "person",
    "fbox": [-3, 5, 20, 40],
    "vbox": [0, 5, 17, 30],
    "hbox": [4, 5, 6, 7],
    "head_attr": {"ignore": 0},
    "extra": {"occ": 1},
}
GROUP = {"tag": "mask", "fbox": [30, 5, 9, 9], "vbox": [30, 5, 9, 9], "extra": {"ignore": 1}}
IGNORED = {**PERSON, "extra": {"ignore": 1}, "head_attr": {"ignore": 1}}
LINES = [{"ID": "273271,c9db", "gtboxes": [PERSON, GROUP, IGNORED]}, {"ID": "2,b", "gtboxes": []}]


@pytest.fixture
def source(tmp_path):
    for line in LINES:
        Image.new("RGB", (64, 48)).save(tmp_path / f"{line['ID']}.jpg")
    (tmp_path / "a.odgt").write_text("\n".join(map(json.dumps, LINES)))
    return tmp_path


def convert(folder, *options):
    paths = [folder / "a.odgt", folder, folder / "a.json"]
    convert_crowdhuman.main([*map(str, paths), *options])
    return check_data_set(folder / "a.json", folder)


def test_what_is_written_is_usable(source, capsys):
    checked = convert(source)
    assert checked.findings.count("error", "dropped") == 0
    assert checked.classes == ["person"]
    assert [image["width"] for image in checked.content["images"]] == [64, 64]
    entries = checked.content["annotations"]
    assert [entry["bbox"] for entry in entries] == [x["fbox"] for x in (PERSON, GROUP, IGNORED)]
    assert [entry["iscrowd"] for entry in entries] == [0, 1, 1]
    assert [entry["area"] for entry in entries] == [800, 81, 800]
    assert "2 images, 3 annotations" in capsys.readouterr().out


def test_other_boxes(source):
    assert convert(source, "--boxes", "visible").content["annotations"][0]["bbox"] == PERSON["vbox"]
    heads = convert(source, "--boxes", "head").content["annotations"]
    assert [(entry["bbox"], entry["iscrowd"]) for entry in heads] == [
        (PERSON["hbox"], 0),
        (PERSON["hbox"], 1),
    ]


@pytest.mark.parametrize("line", ["{", '{"ID": "x"}', "[]", '{"ID": "x", "gtboxes": [{}]}'])
def test_a_broken_line_is_named(source, line):
    if line.endswith("[{}]}"):
        line = '{"ID": "2,b", "gtboxes": [{"fbox": [1, 2, 3, 4]}]}'
    (source / "a.odgt").write_text(f"{json.dumps(LINES[0])}\n{line}")
    with pytest.raises(SystemExit, match=r"not converted: .*a\.odgt, line 2"):
        convert(source)


def test_a_missing_image_is_named(source):
    (source / "2,b.jpg").unlink()
    with pytest.raises(SystemExit, match=r"2,b\.jpg: does not exist"):
        convert(source)
    with pytest.raises(DataError):
        convert_crowdhuman.convert_crowdhuman(source / "a.odgt", source, source / "b.json")
