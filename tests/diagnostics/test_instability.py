"""The instability of the matching, and its picture."""

import json

import numpy as np
import pytest
import torch
from golden import read_arrays, read_json
from matplotlib import pyplot
from PIL import Image

from dino_d2.diagnostics.instability import instability, matched_objects, plot_instability
from dino_d2.types import Assignment

GOLDEN = "dn_detr/instability"


def make_assignment(query, target, images):
    """Of two layers: the last matches query i with target i, the first in reverse."""
    query, target = torch.tensor(query), torch.tensor(target)
    return Assignment(
        torch.tensor(images), torch.stack([query.flip(0), query]), target.expand(2, -1)
    )


def test_golden_assignments():
    arrays, case = read_arrays(GOLDEN), read_json(GOLDEN)
    matched = np.zeros_like(arrays["V"])
    for image, epochs in enumerate(case["pairs_image_epoch"]):
        for epoch, pairs in enumerate(epochs):
            query, target = torch.tensor(pairs).T[:, None]
            assignment = Assignment(torch.zeros(len(pairs), dtype=torch.int64), query, target)
            matched[image, epoch] = matched_objects(assignment, (len(pairs),), 8)[0]
    np.testing.assert_array_equal(matched, arrays["V"])


def test_golden_instability():
    arrays = read_arrays(GOLDEN)
    for epoch, expected in enumerate(arrays["IS"]):
        before, after = arrays["V"][:, epoch], arrays["V"][:, epoch + 1]
        assert instability(before, after) == expected
        for image, of_image in enumerate(arrays["IS_per_image"][:, epoch]):
            assert instability(before[[image]], after[[image]]) == of_image


def test_objects_count_from_the_first_of_their_image():
    """Images of 2, 0 and 3 objects; the last has a query too few."""
    query, target, images = [3, 1, 0, 2], [0, 1, 4, 2], [0, 0, 2, 2]
    assignment = make_assignment(query, target, images)
    expected = [[-1, 1, -1, 0], [-1, -1, -1, -1], [2, -1, 0, -1]]
    np.testing.assert_array_equal(matched_objects(assignment, (2, 0, 3), 4), expected)


def test_the_layer_can_be_chosen():
    assignment = make_assignment([1, 2], [0, 1], [0, 0])
    assert matched_objects(assignment, (2,), 3).tolist() == [[-1, 0, 1]]
    assert matched_objects(assignment, (2,), 3, layer=0).tolist() == [[-1, 1, 0]]


def test_nothing_matched():
    empty = torch.zeros(2, 0, dtype=torch.int64)
    matched = matched_objects(Assignment(empty[0], empty, empty), (0, 0), 3)
    assert matched.tolist() == [[-1] * 3] * 2
    assert instability(matched, matched) == 0


def test_matchings_of_other_shapes_do_not_compare():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\) do not compare"):
        instability(np.zeros((2, 3)), np.zeros((1, 3)))


def write_metrics(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_runs_are_drawn_side_by_side(tmp_path, figures):
    lines = [{"iteration": i, "total_loss": 1.0} for i in range(9)]
    measured = [{"iteration": 4, "instability": 3.0}, {"iteration": 9, "instability": 2.5}]
    runs = {
        "DAB-DETR": write_metrics(tmp_path / "dab.json", lines[:4] + measured),
        "DN-DETR": write_metrics(tmp_path / "dn.json", [{**measured[0], "bbox/AP": 7.0}]),
        "without": write_metrics(tmp_path / "without.json", lines),
    }
    plot_instability(runs, tmp_path / "is.png")
    with Image.open(tmp_path / "is.png") as picture:
        assert picture.format == "PNG"
    axes, right = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["DAB-DETR", "DN-DETR"]
    assert axes.lines[0].get_xydata().tolist() == [[4, 3], [9, 2.5]]
    assert axes.lines[1].get_marker() == "o", "a single value is visible"
    (line,) = right.lines
    assert line.get_xydata().tolist() == [[4, 7]]
    assert line.get_color() == axes.lines[1].get_color(), "a run has one colour"
    assert not pyplot.get_fignums()


@pytest.mark.parametrize("text", ["", "\n", '{"iteration": 1, "total_loss": 2}\n\n'])
def test_nothing_to_draw(tmp_path, figures, text):
    (tmp_path / "metrics.json").write_text(text)
    plot_instability({"run": tmp_path / "metrics.json"}, tmp_path / "is.png")
    assert not any(axes.lines for axes in figures[0].axes)
    assert (tmp_path / "is.png").stat().st_size
