"""The check from the command line, and its page."""

import base64
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from dino_d2.data.check import check_data_set
from dino_d2.data.shapes import make_shapes
from dino_d2.diagnostics.data_page import write_page
from dino_d2.tools import check_dataset


@pytest.fixture
def shapes(tmp_path):
    return make_shapes(tmp_path / "shapes", 6, 96)


def spoil(path, **fields):
    """Change the first annotation."""
    content = json.loads(path.read_text())
    content["annotations"][0].update(fields)
    path.write_text(json.dumps(content))


def test_good_data_ends_well(shapes, tmp_path, capsys):
    page = tmp_path / "page" / "report.html"
    check_dataset.main([str(shapes.parent), "--page", str(page)])
    answer = capsys.readouterr().out
    assert "6 images" in answer
    assert "3 classes: usable" in answer
    assert f"page: {page}" in answer
    assert "error" not in answer


@pytest.mark.parametrize("options", [[], ["--quick"]])
def test_errors_name_the_place_and_end_with_1(shapes, capsys, options):
    spoil(shapes, category_id=99)
    with pytest.raises(SystemExit) as failure:
        check_dataset.main([str(shapes), *options])
    assert failure.value.code == 1
    answer = capsys.readouterr().out
    assert re.search(r"error: category_id is of no category: 1 \(image \d+, annotation 1 ", answer)


def test_no_data_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="no COCO-format json"):
        check_dataset.main([str(tmp_path)])


@pytest.mark.parametrize("option", ["--page", "--write"])
def test_what_cannot_be_written_is_an_error(shapes, tmp_path, option):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"file/x: cannot be written \(Not a directory\)"):
        check_dataset.main([str(shapes), option, str(tmp_path / "file" / "x")])


@pytest.mark.parametrize("option", ["--page", "--write"])
def test_what_is_no_file_is_not_replaced(shapes, tmp_path, option):
    """As a device, which root could replace."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit, match=r"pipe: cannot be written; .* no regular file"):
        check_dataset.main([str(shapes), option, str(tmp_path / "pipe")])
    assert (tmp_path / "pipe").is_fifo()


def test_what_is_usable_can_be_kept(shapes, tmp_path, capsys):
    spoil(shapes, category_id=99)
    (shapes.parent / "images" / "000002.jpg").write_bytes(b"")
    clean = tmp_path / "clean.json"
    with pytest.raises(SystemExit):
        check_dataset.main([str(shapes), "--write", str(clean)])
    checked = check_data_set(clean, shapes.parent / "images")
    assert checked.findings.count("error", "dropped", "converted") == 0
    assert len(checked.content["images"]) == 5


def pictures(page):
    found = re.findall(r"data:image/png;base64,([^']+)", page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(f))).convert("RGB")) for f in found]


def test_the_page_shows_counts_sizes_and_samples(shapes, tmp_path):
    spoil(shapes, bbox=[1, 2, 0, 4])
    checked = check_data_set(shapes, shapes.parent / "images")
    write_page({"<train>": checked}, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "&lt;train&gt;" in text
    assert "<td>images</td><td>6</td>" in text
    assert "box has no area" in text
    assert "http" not in text  # nothing to load
    statistics, samples = pictures(tmp_path / "page.html")
    assert statistics.std() > 10
    assert (samples.min(2) < 250).mean() > 0.3  # images fill a good part of it


def test_a_page_of_nothing(tmp_path):
    """No objects, no readable image; names that a page or a diagram could misread."""
    content = {
        "images": [{"id": 1, "file_name": "$<b>.png", "width": 4, "height": 4}],
        "annotations": [],
        "categories": [{"id": 1, "name": r"\$x<script>$"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    checked = check_data_set(tmp_path / "a.json", tmp_path)
    write_page({"train": checked, "broken": checked._replace(content=content)}, tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "does not exist" in text
    assert "<b>" not in text
    assert len(pictures(tmp_path / "p.html")) == 4
