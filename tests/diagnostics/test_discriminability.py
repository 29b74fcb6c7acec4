"""Score maps and shares of foreground, on maps whose answers are known."""

import numpy as np
import pytest
import torch
from tiny import make_memory, tiny_batch, tiny_detector

from dino_d2.diagnostics.discriminability import (
    cross_attention,
    discriminability,
    draw_score_maps,
    foreground,
    foreground_shares,
    level_maps,
    plot_foreground_shares,
)

CENTRE = torch.tensor([[0.5, 0.5, 0.5, 0.5]])


def encode(model, images, mask):
    return model.encoder(model.neck(model.backbone(images), mask))


def test_maps_of_levels_are_cut_in_order_and_zero_on_padding():
    memory = make_memory(((2, 3), (1, 2)), (((2, 2), (1, 1)), ((2, 3), (1, 2))), embed_dim=1)
    tokens = torch.arange(1.0, 17).view(2, 8, 1)
    fine, coarse = level_maps(tokens, memory)
    assert fine[:, 0].tolist() == [[[1, 2, 0], [4, 5, 0]], [[9, 10, 11], [12, 13, 14]]]
    assert coarse[:, 0].tolist() == [[[7, 0]], [[15, 16]]]


def test_scores_are_norms_relative_to_the_level_and_image():
    fine = torch.zeros(2, 2, 2, 2)
    fine[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    fine[0, 0, 1, 1] = -2.5
    fine[1] = 7
    coarse = torch.full((2, 1, 1, 1), 0.1)
    scores = discriminability([fine, coarse], (2, 2))
    expected = (torch.tensor([[1, 0], [0, 0.5]]) + 1) / 2
    torch.testing.assert_close(scores, torch.stack([expected, torch.ones(2, 2)]))


def test_scores_of_nothing_are_zero():
    assert discriminability([torch.zeros(1, 3, 2, 2)], (4, 4)).tolist() == [[[0] * 4] * 4]


def test_foreground_is_what_any_box_covers():
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.125, 1.0, 0.25]])
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[:, :4] = expected[0] = True
    assert torch.equal(foreground(boxes, (4, 8)), expected)
    assert not foreground(torch.zeros(0, 4), (4, 8)).any()


def test_shares_above_thresholds():
    scores = torch.full((4, 4), 0.2)
    scores[1:3, 1:3] = torch.tensor([[0.5, 0.9], [0.9, 0.1]])
    scores[0, 0] = 0.6
    inside, outside = foreground_shares(scores, CENTRE, torch.tensor([0, 0.2, 0.5, 0.6, 1.0]))
    assert inside.tolist() == [1, 0.75, 0.5, 0.5, 0]
    torch.testing.assert_close(outside, torch.tensor([12, 1, 1, 0, 0]) / 12)


def test_a_narrow_range_of_scores_is_swept_as_finely():
    scores = torch.rand(32, 32)
    curves = [foreground_shares(map_, CENTRE) for map_ in (scores, 0.999 + scores.double() / 1000)]
    for wide, narrow in zip(*curves, strict=True):
        torch.testing.assert_close(wide, narrow, atol=0.01, rtol=0)
    assert curves[0][0].unique().numel() > 50


@pytest.mark.parametrize(("box", "undefined"), [([], 0), ([[0.5, 0.5, 1, 1]], 1)])
def test_images_without_foreground_or_background_have_no_shares(box, undefined):
    shares = foreground_shares(torch.rand(4, 4), torch.tensor(box).reshape(-1, 4))
    assert [bool(share.isnan().all()) for share in shares] == [undefined == 0, undefined == 1]


@pytest.mark.parametrize("name", ["dab_detr", "dino", "deformable_detr", "dn_deformable_detr"])
def test_attention_to_padding_is_zero_and_the_rest_adds_up(name):
    model = tiny_detector(name).eval()
    images, mask = tiny_batch()
    mask[1, :, 48:] = True
    memory = encode(model, images, mask)
    received = cross_attention(model, memory)
    assert received.shape == (3, *memory.tokens.shape[:2])
    assert (received >= 0).all()
    assert not received[:, memory.padding_mask].any()
    total = received.sum(-1)
    if name == "dab_detr":  # nothing lies beyond the border
        torch.testing.assert_close(total, torch.full_like(total, 12))
    else:
        assert (total <= 12).all()
        assert (total > 1).all()


def test_attention_is_where_the_samples_are():
    """All 12 queries of all heads look at their anchors' centres, on the finest level alone."""
    model = tiny_detector("dn_deformable_detr").eval()
    memory = encode(model, *tiny_batch(1))
    height, width = memory.spatial_shapes[0]
    with torch.no_grad():
        anchor = torch.tensor([2.5 / width, 1.5 / height, 0.1, 0.1]).double()
        model.query_source.anchors.copy_(anchor.logit().expand(12, 4))
        attention = model.decoder.layers[0].cross_attention
        attention.sampling_offsets.weight.zero_(), attention.sampling_offsets.bias.zero_()
        attention.attention_weights.weight.zero_()
        attention.attention_weights.bias.view(4, 3, 2)[:] = torch.tensor([100, 0, 0])[:, None]
    received = cross_attention(model, memory)[0, 0]
    expected = torch.zeros_like(received)
    expected[width + 2] = 12
    torch.testing.assert_close(received, expected, atol=1e-6, rtol=0)


def test_the_model_is_left_as_it_was():
    model = tiny_detector("dino").eval()
    memory = encode(model, *tiny_batch(1))
    with torch.no_grad():
        cross_attention(model, memory)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_pictures_show_images_boxes_and_maps(tmp_path, figures):
    images = [np.full((20, 40, 3), 99, np.uint8), np.full((30, 30, 3), 9, np.uint8)]
    maps = {"encoder": [torch.rand(20, 40), torch.rand(30, 30)]}
    draw_score_maps(images, [CENTRE, torch.zeros(0, 4)], maps, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 1000
    first, second, map_, _ = figures[0].axes
    assert [patch.get_bbox().bounds for patch in first.patches] == [(10, 5, 20, 10)]
    assert not second.patches
    assert torch.equal(torch.as_tensor(map_.images[0].get_array().data), maps["encoder"][0])


def test_curves_are_means_of_images_that_have_both(tmp_path, figures):
    nan = torch.full((3,), torch.nan)
    pairs = [(torch.tensor([1, 0.8, 0]), torch.tensor([1, 0.2, 0])), (nan, nan)]
    pairs.append((torch.tensor([1, 0.4, 0]), torch.tensor([1, 0.4, 0])))
    plot_foreground_shares({"encoder": pairs, "nothing": [(nan, nan)]}, tmp_path / "curve.png")
    (axes,) = figures[0].axes
    curve, diagonal = axes.lines
    np.testing.assert_allclose(curve.get_xydata(), [[1, 1], [0.3, 0.6], [0, 0]], rtol=1e-6)
    assert diagonal.get_linestyle() == ":"
