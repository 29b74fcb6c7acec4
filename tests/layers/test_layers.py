"""Encodings, deformable attention as a layer, and the MLP."""

import numpy as np
import pytest
import torch
from reference import ms_deform_attn_loop, position_encoding_loop, sine_loop
from tiny import add_noise, make_memory

from dino_d2.layers import (
    MLP,
    DeformableAttention,
    FeedForward,
    SinePositionEncoding,
    encode_boxes,
)

SHAPES = ((4, 6), (2, 3))
VALID = (SHAPES, ((2, 4), (1, 2)))  # of each image


def make_attention():
    """With weights and biases far from their initial values."""
    attention = DeformableAttention(16, num_heads=4, num_levels=2, num_points=3)
    return add_noise(attention.double(), 0.3)


@pytest.mark.parametrize(
    ("temperature", "offset"), [(20, 0.0), (10000, -0.5)], ids=["dino", "deformable_detr"]
)
def test_position_encoding_equals_a_loop(temperature, offset):
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 4:] = True, True
    actual = SinePositionEncoding(12, temperature, offset)(mask, torch.float64)
    expected = position_encoding_loop(mask.numpy(), 12, temperature, offset)
    image = ~mask[:, None].expand_as(actual).numpy()
    np.testing.assert_allclose(actual[image], expected[image], rtol=0, atol=1e-12)


def test_position_encoding_does_not_depend_on_the_padding():
    mask = torch.ones(1, 9, 8, dtype=torch.bool)
    mask[:, :5, :7] = False
    encode = SinePositionEncoding(12)
    alone = encode(torch.zeros(1, 5, 7, dtype=torch.bool), torch.float64)
    assert torch.equal(encode(mask, torch.float64)[:, :, :5, :7], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_position_encoding_stays_precise(dtype):
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert SinePositionEncoding(8)(mask, dtype).dtype == torch.float32


def test_boxes_are_encoded_as_y_x_w_h():
    boxes = torch.rand(2, 3, 4, dtype=torch.float64)
    actual = encode_boxes(boxes, 6)
    for b, q in np.ndindex(2, 3):
        x, y, w, h = (2 * np.pi * boxes[b, q]).tolist()
        expected = np.concatenate([sine_loop(angle, 6, 10000) for angle in (y, x, w, h)])
        np.testing.assert_allclose(actual[b, q], expected, rtol=0, atol=1e-12)


def test_boxes_can_be_encoded_in_another_order():
    boxes = torch.rand(3, 4)
    y, x, w, h = encode_boxes(boxes, 6).chunk(4, -1)
    assert torch.equal(encode_boxes(boxes, 6, order=(0, 1, 2, 3)), torch.cat([x, y, w, h], -1))


def test_attention_starts_along_a_direction_per_head():
    attention = DeformableAttention(32, num_heads=8, num_levels=2, num_points=3)
    offsets = attention.sampling_offsets.bias.view(8, 2, 3, 2)
    right, diagonal = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    for level, point in np.ndindex(2, 3):
        torch.testing.assert_close(offsets[0, level, point], right * (point + 1))
        torch.testing.assert_close(offsets[1, level, point], diagonal * (point + 1))
        torch.testing.assert_close(offsets[4:, level, point], -offsets[:4, level, point])


def test_attention_starts_uniform():
    attention = DeformableAttention(16, num_heads=4, num_levels=2, num_points=3)
    for layer in (attention.sampling_offsets, attention.attention_weights):
        assert not layer.weight.any()
    assert not attention.attention_weights.bias.any()
    assert not attention.value_proj.bias.any()
    assert attention.value_proj.weight.any()


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_samples_where_it_says(coordinates):
    attention, memory = make_attention(), make_memory(SHAPES, VALID, 16)
    query = torch.randn(2, 5, 16, dtype=torch.float64)
    reference = torch.rand(2, 5, 2, coordinates, dtype=torch.float64)
    with torch.no_grad():
        actual = attention(query, reference, memory)
        value = attention.value_proj(memory.tokens)
        value[memory.padding_mask] = 0
        offsets = attention.sampling_offsets(query).view(2, 5, 4, 2, 3, 2).numpy()
        weights = attention.attention_weights(query).view(2, 5, 4, 6).softmax(-1)
    locations = np.zeros(offsets.shape)
    for b, q, head, level, p, axis in np.ndindex(*offsets.shape):
        unit = 1 / SHAPES[level][1 - axis]
        if coordinates == 4:
            unit = reference[b, q, level, 2 + axis] / 2 / 3
        locations[b, q, head, level, p, axis] = (
            reference[b, q, level, axis] + unit * offsets[b, q, head, level, p, axis]
        )
    sampled = ms_deform_attn_loop(
        value.view(2, 30, 4, 4), SHAPES, locations, weights.view(2, 5, 4, 2, 3)
    )
    expected = attention.output_proj(torch.from_numpy(sampled))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_tokens_of_padding_do_not_matter():
    attention, memory = make_attention(), make_memory(SHAPES, VALID, 16)
    query = torch.randn(2, 5, 16, dtype=torch.float64)
    reference = torch.rand(2, 5, 2, 2, dtype=torch.float64)
    changed = memory.tokens.masked_fill(memory.padding_mask[..., None], 1e3)
    expected = attention(query, reference, memory)
    assert torch.equal(attention(query, reference, memory._replace(tokens=changed)), expected)
    visible = memory._replace(tokens=changed, padding_mask=torch.zeros_like(memory.padding_mask))
    assert not torch.allclose(attention(query, reference, visible)[1], expected[1])


def test_attention_names_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="embed_dim 30 is not a multiple of num_heads 4"):
        DeformableAttention(30, num_heads=4, num_levels=1, num_points=1)


def test_mlp_has_relu_between_its_layers_only():
    mlp = MLP(3, 7, 2, 3)
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(7, 3), (7, 7), (2, 7)]
    x = torch.randn(4, 5, 3)
    first, second, last = mlp.layers
    expected = last(second(first(x).clamp(min=0)).clamp(min=0))
    torch.testing.assert_close(mlp(x), expected)
    assert (mlp(x) < 0).any()


def test_mlp_of_one_layer_is_linear():
    mlp, x = MLP(3, 7, 2, 1), torch.randn(4, 3)
    torch.testing.assert_close(mlp(x), mlp.layers[0](x))


@torch.no_grad()
@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("prelu", 0.25)])
def test_feed_forward_follows_its_definition(activation, slope):
    ffn, x = add_noise(FeedForward(4, 7, activation)), torch.randn(5, 4)
    if activation == "prelu":
        ffn.activation.weight.fill_(slope)
    hidden = ffn.linear1(x)
    hidden = hidden.where(hidden > 0, slope * hidden)
    torch.testing.assert_close(ffn(x), ffn.norm(x + ffn.linear2(hidden)))
