"""DAB-DETR's encoder."""

import numpy as np
import pytest
import torch
from reference import attention_loop
from tiny import add_noise, make_pyramid, random_maps

from dino_d2.transformer import DenseEncoder

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = 2


def make_encoder(activation="prelu"):
    return add_noise(DenseEncoder(2, 32, HEADS, 12, activation).double(), 0.2)


def images():
    """Of 3 x 4 and 2 x 3 cells."""
    return make_pyramid([random_maps([(3, 4)]), random_maps([(2, 3)])])


@torch.no_grad()
def test_positions_are_weighed_by_the_tokens_before_every_layer():
    encoder, pyramid = make_encoder(), images()
    memory = encoder(pyramid)
    for image in range(2):
        tokens, places = (m[0][image].flatten(1).T for m in (pyramid.maps, pyramid.positions))
        blocked = pyramid.padding_masks[0][image].flatten().expand(12, 12)
        torch.testing.assert_close(memory.positions[image], places)
        for layer in encoder.layers:
            placed = tokens + places * encoder.scale(tokens)
            projections = zip(
                (placed, placed, tokens),
                layer.attention.in_proj_weight.chunk(3),
                layer.attention.in_proj_bias.chunk(3),
                strict=True,
            )
            projected = [x @ weight.T + bias for x, weight, bias in projections]
            attended = torch.from_numpy(attention_loop(*projected, HEADS, blocked))
            tokens = layer.attention_norm(tokens + layer.attention.out_proj(attended))
            tokens = layer.ffn(tokens)
        inside = ~blocked[0]
        np.testing.assert_allclose(memory.tokens[image, inside], tokens[inside], atol=1e-12)


@torch.no_grad()
def test_images_do_not_depend_on_their_padding():
    encoder, maps = make_encoder(), random_maps([(3, 4)])
    alone = encoder(make_pyramid([maps]))
    memory = encoder(make_pyramid([maps, random_maps([(5, 6)])]))
    tokens = memory.tokens[0, ~memory.padding_mask[0]]
    torch.testing.assert_close(tokens, alone.tokens[0], rtol=0, atol=1e-12)


def test_every_layer_learns_a_slope_of_its_own():
    slopes = [layer.ffn.activation.weight for layer in make_encoder().layers]
    assert len({id(slope) for slope in slopes}) == 2
    assert not [name for name, _ in make_encoder("relu").named_parameters() if "activation" in name]
