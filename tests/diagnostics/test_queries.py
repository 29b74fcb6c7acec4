"""Where positive queries start from."""

import pytest
import torch
from tiny import tiny_batch, tiny_detector, tiny_targets

from dino_d2.diagnostics.queries import (
    distances_to_nearest,
    matched_anchors,
    plot_query_positions,
)
from dino_d2.losses import pack_targets


@pytest.mark.parametrize(("name", "size"), [("dino", 4), ("dab_detr", 4), ("deformable_detr", 2)])
def test_matched_anchors_are_those_of_the_matched_queries(name, size):
    model = tiny_detector(name).eval()
    images, mask = tiny_batch()
    memory = model.encoder(model.neck(model.backbone(images), mask))
    targets = tiny_targets(3, 0)
    packed = pack_targets(targets, model.num_classes, images)
    found, none = matched_anchors(model, memory, packed)
    assert found.shape == (3, size)
    assert none.shape == (0, size)
    assignment, _ = model.match(images, mask, targets)
    anchors = model.query_source(memory)[0].anchors[0, assignment.query[-1]]
    torch.testing.assert_close(found, anchors)


def test_distances_are_those_of_centres_to_the_nearest():
    customised = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.5, 0.9, 0.1, 0.2]])
    original = torch.tensor([[0.1, 0.4], [0.5, 0.8]])
    distances = distances_to_nearest(customised, original)
    torch.testing.assert_close(distances, torch.tensor([0.3, 0.1]))
    assert distances_to_nearest(customised, original[:0]).tolist() == [torch.inf] * 2
    assert distances_to_nearest(customised[:0], original).shape == (0,)


def test_the_picture_compares_with_the_original_queries(tmp_path, figures):
    original = [torch.tensor([[0.2, 0.2, 0.1, 0.1]]), torch.zeros(0, 4)]
    atss = [torch.tensor([[0.2, 0.3, 0.1, 0.1], [0.2, 0.5, 0.1, 0.1]]), torch.rand(1, 4)]
    queries = {"decoder": original, "atss": atss}
    plot_query_positions(queries, "decoder", tmp_path / "positions.png")
    left, right = figures[0].axes
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["decoder (1)", "atss (3)"]
    assert left.collections[0].get_offsets().tolist() == [pytest.approx([0.2, 0.2])]
    assert sum(patch.get_height() for patch in right.patches) == 2  # one image has nothing original
    assert max(p.get_x() + p.get_width() for p in right.patches) == pytest.approx(0.3)


def test_the_picture_of_original_queries_alone(tmp_path, figures):
    plot_query_positions({"decoder": [torch.rand(3, 4)]}, "decoder", tmp_path / "positions.png")
    assert len(figures[0].axes) == 1
