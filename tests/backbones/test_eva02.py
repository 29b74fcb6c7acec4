"""The ViT-L of Co-DINO, by parts."""

import pytest
import torch
from reference import rotary_window_attention_loop
from timm.layers import DropPath

from dino_d2.backbones import EVA02, FeatureShape, build_eva02
from dino_d2.backbones.eva02 import EVA02Block
from dino_d2.checkpoint import load_backbone
from dino_d2.checkpoint.names import CO_DETR_EVA02, rename

SMALL = {"embed_dim": 128, "depth": 3, "num_heads": 2, "window_size": 3, "global_blocks": (1,)}
TIMM_TO_AUTHORS = {"fc1_g": "w1", "fc1_x": "w2", "mlp.norm": "mlp.ffn_ln", "fc2": "w3"}
TIMM_TO_AUTHORS |= {"q_proj.bias": "q_bias", "v_proj.bias": "v_bias"}


@pytest.fixture
def small():
    torch.manual_seed(1)
    net = EVA02(**SMALL, pretrain_size=64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net


def authors_name(name):
    for ours, theirs in TIMM_TO_AUTHORS.items():
        name = name.replace(ours, theirs)
    return name


def test_the_published_models_have_as_many_parameters():
    with torch.device("meta"):
        backbone = build_eva02()
    counts = [sum(p.numel() for p in m.parameters()) for m in (backbone.net, backbone)]
    assert counts == [304238528, 304238528 + 23995904]
    windows = [block.window_size for block in backbone.net.blocks]
    assert windows == [24, 24, 24, None] * 6


def test_maps_have_the_names_channels_and_sizes_that_are_said():
    with torch.device("meta"):
        backbone = build_eva02(**SMALL, out_channels=32)
        maps = backbone(torch.empty(2, 3, 96, 160))
    assert backbone.output_shape() == {
        f"stride{s}": FeatureShape(32, s) for s in (4, 8, 16, 32, 64)
    }
    sizes = {f"stride{s}": (2, 32, -(-96 // s), -(-160 // s)) for s in (4, 8, 16, 32, 64)}
    assert {name: tuple(m.shape) for name, m in maps.items()} == sizes


@pytest.mark.parametrize("window", [None, 2], ids=["global", "windows"])
@torch.no_grad()
def test_attention_equals_its_literal_twin(window):
    block = EVA02Block(128, 2, 16, 0.0, window).double()
    weights = {name: p.normal_(std=0.3).numpy() for name, p in block.named_parameters()}
    x = torch.randn(2, 3, 5, 128, dtype=torch.float64)
    attended = block._attend(x)
    for image, found in zip(x, attended, strict=True):
        expected = rotary_window_attention_loop(image.numpy(), weights, window)
        # timm computes frequencies in float32
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_mlp_is_swiglu_with_a_norm_inside():
    block = EVA02Block(128, 2, 16, 0.0, None).eval()
    block.attn.proj.weight.zero_(), block.attn.proj.bias.zero_()
    x = torch.randn(1, 2, 2, 128)
    mlp, y = block.mlp, block.norm2(x)
    hidden = torch.nn.functional.silu(mlp.fc1_g(y)) * mlp.fc1_x(y)
    torch.testing.assert_close(block(x), x + mlp.fc2(mlp.norm(hidden)))


@torch.no_grad()
def test_windows_do_not_see_each_other_and_global_blocks_see_all(small):
    small.eval()
    images = torch.randn(1, 3, 96, 96)
    changed = images.clone()
    changed[..., 80:, 80:] += 1  # the last patch of 6 x 6, in the last window of 2 x 2
    x, y = (small.patch_embed(i) for i in (images, changed))
    for block, is_global in zip(small.blocks, (False, True, False), strict=True):
        moved = (block(x) - block(y)).abs().amax(-1)[0] > 0
        assert moved[3:, 3:].all()
        assert moved[:3].any() == is_global


@torch.no_grad()
def test_position_embeddings_fit_any_size_without_the_class_token(small):
    small.pos_embed[:, 0] = 1e9
    grid = small._positions(torch.Size((4, 4)))
    torch.testing.assert_close(grid, small.pos_embed[:, 1:].unflatten(1, (4, 4)))
    assert small._positions(torch.Size((3, 7))).shape == (1, 3, 7, 128)
    assert small._positions(torch.Size((3, 7))).abs().max() < 10


def test_images_of_any_size(small):
    assert small(torch.randn(1, 3, 50, 33)).shape == (1, 128, 4, 3)


def test_drop_path_grows_with_depth():
    with torch.device("meta"):
        net = EVA02(**SMALL, drop_path=0.4)
    rates = [m.drop_prob for m in net.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0.2, 0.4])


def test_recomputing_changes_no_gradient(small):
    gradients = []
    for recompute in (False, True):
        small.recompute = recompute
        small.zero_grad()
        small.train()(torch.ones(1, 3, 48, 64)).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in small.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(*gradients)


def test_published_names():
    with torch.device("meta"):
        ours = {f"backbone.{name}" for name in build_eva02(**SMALL).state_dict()}
    theirs = []
    for name in ours:
        is_neck = name.startswith("backbone.p")
        theirs.append(
            name.replace("backbone.", "neck.")
            if is_neck
            else authors_name(name.replace("backbone.net.", "backbone."))
        )
    assert {rename(name, CO_DETR_EVA02) for name in theirs} == ours
    for buffer in ("rope_win.freqs_cos", "rope_glb.freqs_sin", "blocks.3.attn.rope.freqs_cos"):
        assert rename(f"backbone.{buffer}", CO_DETR_EVA02) is None


@pytest.mark.parametrize("library", ["timm", "authors"])
@torch.no_grad()
def test_image_net_weights_with_patches_of_14_pixels(small, library):
    backbone = build_eva02(**SMALL)
    weights = {n: torch.randn_like(p) for n, p in backbone.net.state_dict().items()}
    del weights["out_norm.weight"], weights["out_norm.bias"]
    weights["patch_embed.proj.weight"] = torch.ones(128, 3, 14, 14)
    given = {
        "cls_token": torch.ones(1),
        "head.bias": torch.ones(1),
        "fc_norm.weight": torch.ones(1),
    }
    for name, tensor in weights.items():
        given[authors_name(name) if library == "authors" else name] = tensor
    if library == "authors":
        given["blocks.0.attn.rope.freqs_cos"] = given["rope.freqs_cos"] = torch.ones(1)
    load_backbone(backbone, given)
    loaded = backbone.net.state_dict()
    torch.testing.assert_close(loaded["patch_embed.proj.weight"], torch.ones(128, 3, 16, 16))
    for name in weights.keys() - {"patch_embed.proj.weight"}:
        torch.testing.assert_close(loaded[name], weights[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 130}, "embed_dim 130 is no multiple of 4 \\* num_heads 2"),
        ({"global_blocks": (1, 3)}, r"global_blocks \[1, 3\] are not among 3 blocks"),
    ],
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        EVA02(**{**SMALL, **change})
