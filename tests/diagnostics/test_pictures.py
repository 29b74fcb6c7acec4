"""Pictures are written, show what they should, and cope with having little to show."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dino_d2.diagnostics.curves import plot_curves
from dino_d2.diagnostics.detections import draw_detections

LOSSES = {"total_loss": 9.0, "loss_class": 1.0, "loss_bbox": 2.0, "loss_giou": 3.0}
PRECISION = {"bbox/AP": 10, "bbox/AP50": 30, "bbox/AP75": 5, "ema/bbox/AP": 12}


@pytest.fixture
def data(tmp_path):
    """Three images with 2, 0 and 1 objects."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": 20, "width": 30 + 10 * i} for i in range(3)
    ]
    for image in images:
        pixels = np.full((image["height"], image["width"], 3), 80 * image["id"], np.uint8)
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    entries = [
        {"id": 1, "image_id": 0, "category_id": 5, "bbox": [1, 2, 10, 8], "iscrowd": 0},
        {"id": 2, "image_id": 0, "category_id": 3, "bbox": [5, 5, 10, 8], "iscrowd": 1},
        {"id": 3, "image_id": 2, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 0},
    ]
    categories = [{"id": 5, "name": "cat"}, {"id": 3, "name": "dog"}]
    content = {"images": images, "annotations": entries, "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return tmp_path


def draw(data, results, **options):
    (data / "results.json").write_text(json.dumps(results))
    out = data / "picture.png"
    draw_detections(data / "annotations.json", data, data / "results.json", out, **options)
    return check_png(out)


def plot(folder, lines):
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_curves(folder / "metrics.json", folder / "curves.png")
    return check_png(folder / "curves.png")


def check_png(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 1
        return image.size


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_curves_show_losses_and_precision(tmp_path, figures):
    lines = [{"iteration": i, **LOSSES} for i in range(3)]
    plot(tmp_path, [*lines, {"iteration": 2, **PRECISION}])
    left, right = figures[0].axes
    assert [line.get_label() for line in left.lines] == list(LOSSES)
    assert left.lines[0].get_xydata().tolist() == [[0, 9], [1, 9], [2, 9]]
    assert [line.get_label() for line in right.lines] == ["AP", "AP50", "AP75", "ema/AP"]


def test_curves_without_an_evaluation(tmp_path, figures):
    plot(tmp_path, [{"iteration": 0, **LOSSES}])
    assert not figures[0].axes[1].lines


def test_a_single_evaluation_is_visible(tmp_path, figures):
    plot(
        tmp_path, [{"iteration": i, **LOSSES} for i in range(2)] + [{"iteration": 1, "bbox/AP": 9}]
    )
    left, right = figures[0].axes
    assert (left.lines[0].get_linestyle(), left.lines[0].get_marker()) == ("-", "None")
    assert right.lines[0].get_marker() == "o"


def test_curves_with_an_undefined_precision(tmp_path, figures):
    plot(tmp_path, [{"iteration": 0, **LOSSES, "bbox/AP": float("nan")}])
    assert np.isnan(figures[0].axes[1].lines[0].get_ydata()).all()


def test_curves_skip_blank_lines(tmp_path, figures):
    (tmp_path / "metrics.json").write_text('{"iteration": 4, "total_loss": 2}\n\n')
    plot_curves(tmp_path / "metrics.json", tmp_path / "curves.png")
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [[4, 2]]


def test_curves_of_nothing(tmp_path):
    assert plot(tmp_path, [])


def test_a_line_that_a_killed_run_left_unfinished_is_passed_over(tmp_path, figures):
    whole = '{"iteration": 4, "total_loss": 2}\n'
    (tmp_path / "metrics.json").write_text('{"iteration": 3, "tot' + whole + whole)
    plot_curves(tmp_path / "metrics.json", tmp_path / "curves.png")
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [[4, 2]]


def test_of_runs_in_the_same_folder_the_last_one_counts(tmp_path, figures):
    plot(tmp_path, [{"iteration": i, "total_loss": v} for v, i in ((9, 0), (8, 1), (5, 0), (4, 1))])
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [[0, 5], [1, 4]]


def test_the_users_matplotlib_is_left_alone():
    """Its backend, and its list of open figures."""
    code = (
        "import matplotlib; matplotlib.use('svg'); import dino_d2.diagnostics.curves, "
        "dino_d2.diagnostics.detections; assert matplotlib.get_backend() == 'svg'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_detections_are_below_the_truth(data, figures):
    found = {"image_id": 0, "category_id": 5, "bbox": [2, 2, 9, 9], "score": 0.876}
    draw(data, [found])
    upper, lower = figures[0].axes[0], figures[0].axes[3]
    assert texts(upper) == ["cat", "dog"]
    assert texts(lower) == ["cat 0.88"]
    assert lower.patches[0].get_bbox().bounds == (2, 2, 9, 9)


def test_crowds_are_dashed(data, figures):
    draw(data, [])
    assert [patch.get_linestyle() for patch in figures[0].axes[0].patches] == ["-", "--"]


def test_images_with_most_objects_are_chosen(data, figures):
    draw(data, [], num_images=2)
    assert [len(axes.patches) for axes in figures[0].axes] == [2, 1, 0, 0]


def test_weak_detections_are_left_out(data, figures):
    found = {"image_id": 0, "category_id": 5, "bbox": [2, 2, 9, 9]}
    draw(data, [{**found, "score": 0.3}, {**found, "score": 0.29}])
    assert texts(figures[0].axes[3]) == ["cat 0.30"]


def test_fewer_images_than_wanted_are_all_drawn(data, figures):
    draw(data, [], num_images=50)
    assert len(figures[0].axes) == 2 * 3


def test_one_image(data):
    width, height = draw(data, [], num_images=1)
    assert height > width
