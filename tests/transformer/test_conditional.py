"""Dense attention, and the decoder layers and positional queries of DAB-DETR."""

import numpy as np
import pytest
import torch
from reference import attention_loop, sine_loop
from tiny import add_noise, make_memory

from dino_d2.layers import attend
from dino_d2.transformer import ConditionalPositions, conditional_layers
from dino_d2.types import Queries

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, DIM = 2, 8
LEVELS = {1: ((4, 3),), 2: ((4, 3), (2, 2))}
VALID = {n: (LEVELS[n], tuple((h - 1, w - 1) for h, w in LEVELS[n])) for n in LEVELS}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def make_layers(num_levels=1, count=3):
    layers = conditional_layers(count, DIM, HEADS, num_levels, 12, "prelu").double()
    return add_noise(layers, 0.3)


def memory(num_levels=1):
    return make_memory(LEVELS[num_levels], VALID[num_levels], DIM)


@pytest.mark.parametrize("shape", [None, (5, 7), (1, 7), (2, 5, 7), (2, 1, 7)], ids=str)
def test_attend_equals_a_loop(shape):
    query, key, value = random(2, 5, 12), random(2, 7, 12), random(2, 7, DIM)
    blocked = None if shape is None else torch.rand(shape) < 0.5
    actual = attend(query, key, value, HEADS, blocked)
    everywhere = torch.zeros(2, 5, 7, dtype=torch.bool)
    everywhere = everywhere if blocked is None else everywhere | blocked
    for image, arrays in enumerate(zip(query, key, value, strict=True)):
        expected = attention_loop(*arrays, HEADS, everywhere[image])
        np.testing.assert_allclose(actual[image], expected, rtol=0, atol=1e-12)


def test_a_query_that_may_see_nothing_gets_zero():
    inputs = [random(1, 3, DIM).requires_grad_() for _ in range(3)]
    blocked = torch.tensor([[False] * 3, [True] * 3, [False] * 3])
    attended = attend(*inputs, HEADS, blocked)
    assert not attended[0, 1].any()
    assert attended[0, [0, 2]].all()
    attended.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert not inputs[0].grad[0, 1].any()


def side_by_side(content, position):
    """In every head, content before position."""
    parts = [x.chunk(HEADS, -1) for x in (content, position)]
    return torch.cat([x for pair in zip(*parts, strict=True) for x in pair], -1)


def literal_layer(layer, content, positions, sine, given, attn_mask, image):
    """One image: content, positions and sine (Q, D), attn_mask (Q, Q)."""
    own, cross = layer.self_attention, layer.cross_attention
    tokens, places = given.tokens[image], given.positions[image]
    query = own["query_content"](content) + own["query_position"](positions)
    key = own["key_content"](content) + own["key_position"](positions)
    attended = attention_loop(query, key, own["value"](content), HEADS, attn_mask)
    shares = [1.0] if layer.level is None else layer.level(query).softmax(-1).T[..., None]
    content = layer.self_attention_norm(content + own["output"](torch.from_numpy(attended)))
    query, key = cross["query_content"](content), cross["key_content"](tokens)
    place = cross["key_position"](places)
    if "query_position" in cross:
        query, key = query + cross["query_position"](positions), key + place
    query, key = side_by_side(query, cross["query_sine"](sine)), side_by_side(key, place)
    value, total, start = cross["value"](tokens), 0, 0
    for share, (height, width) in zip(shares, given.spatial_shapes, strict=True):
        level = slice(start, start + height * width)
        blocked = given.padding_mask[image, level].expand(len(query), -1)
        attended = attention_loop(query, key[level], value[level], HEADS, blocked)
        total, start = total + share * torch.from_numpy(attended), level.stop
    content = layer.cross_attention_norm(content + cross["output"](total))
    return layer.ffn(content)


@torch.no_grad()
@pytest.mark.parametrize("masks", ["none", "common", "of images"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("num_levels", [1, 2])
def test_a_layer_equals_a_literal_computation(num_levels, index, masks):
    layer, given = make_layers(num_levels)[index], memory(num_levels)
    inputs = [random(2, 5, DIM) for _ in range(3)]
    mask = torch.rand(2, 5, 5) < 0.4
    mask[:, range(5), range(5)] = False
    mask = {"none": None, "common": mask[0], "of images": mask}[masks]
    actual = layer(*inputs, given, mask)
    of_images = torch.zeros(2, 5, 5, dtype=torch.bool) if mask is None else mask.expand(2, 5, 5)
    for image in range(2):
        arrays = [x[image] for x in inputs]
        expected = literal_layer(layer, *arrays, given, of_images[image], image)
        torch.testing.assert_close(actual[image], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_only_the_first_layer_attends_to_the_memory_by_positional_queries():
    inputs, given, others = [random(2, 5, DIM) for _ in range(3)], memory(), random(2, 5, DIM)
    changes = []
    for layer in make_layers():
        for name in ("query_position", "key_position"):  # self-attention does not see them
            layer.self_attention[name].weight.zero_()
        before = layer(*inputs, given, None)
        after = layer(inputs[0], others, inputs[2], given, None)
        changes.append(not torch.equal(before, after))
    assert changes == [True, False, False]


@torch.no_grad()
@pytest.mark.parametrize("num_levels", [1, 2])
def test_padding_of_the_memory_does_not_matter(num_levels):
    given, inputs = memory(num_levels), [random(2, 5, DIM) for _ in range(3)]
    padding = given.padding_mask[..., None]
    changed = given._replace(
        tokens=given.tokens.masked_fill(padding, 1e3),
        positions=given.positions.masked_fill(padding, 1e3),
    )
    visible = given._replace(padding_mask=torch.zeros_like(given.padding_mask))
    for layer in make_layers(num_levels):
        expected = layer(*inputs, given, None)
        assert torch.equal(layer(*inputs, changed, None), expected)
        assert not torch.allclose(layer(*inputs, visible, None)[1], expected[1])


def test_layers_of_one_level_have_nothing_to_mix():
    assert [layer.level for layer in make_layers(1)] == [None] * 3
    assert [layer.level.weight.shape for layer in make_layers(2)] == [(2, DIM)] * 3


@torch.no_grad()
@pytest.mark.parametrize(("index", "temperature"), [(0, 10000), (1, 10000), (4, 10000), (1, 20)])
def test_positions_equal_a_literal_computation(index, temperature):
    """The centre's encoding is weighed from the second layer on, and modulated by the size."""
    placement = add_noise(ConditionalPositions(DIM, temperature).double(), 0.3)
    content, anchors = random(2, 5, DIM), torch.rand(2, 5, 4, dtype=torch.float64) * 0.8 + 0.1
    positions, sine = placement(index, content, Queries(content, anchors), memory())
    for image, query in np.ndindex(2, 5):
        x, y, width, height = anchors[image, query].tolist()
        codes = [sine_loop(2 * np.pi * c, DIM // 2, temperature) for c in (y, x, width, height)]
        code = torch.from_numpy(np.concatenate(codes))
        torch.testing.assert_close(positions[image, query], placement.mlp(code))
        scale = placement.scale(content[image, query]) if index else torch.ones(DIM).double()
        wanted_width, wanted_height = placement.size(content[image, query]).sigmoid().tolist()
        expected = code[:DIM] * scale
        expected[: DIM // 2] *= wanted_height / height
        expected[DIM // 2 :] *= wanted_width / width
        torch.testing.assert_close(sine[image, query], expected)
