"""EVA-02 as a detector's backbone: a plain ViT with windows, and a simple feature pyramid.

EVA-02 (Fang et al., 2023) is a ViT with rotary position embedding and SwiGLU. Most blocks attend to
windows, and the pyramid grows from the last map alone (ViTDet, Li et al., ECCV 2022). Details are
those of Co-DETR's published ViT-L models.
"""

from collections.abc import Collection
from functools import partial

import torch
from timm.layers import DropPath, LayerNorm2d, PatchEmbed, SwiGLU, build_rotary_pos_embed
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .shape import FeatureShape

_PATCH = 16
_ROPE_SIZE = 16  # patches per side of the pre-training images: the unit of rotary positions


class EVA02Block(nn.Module):
    """Attention with rotary positions, then SwiGLU with a norm inside; pre-norm.

    Args:
        window_size: patches per side of the windows that attention stays in; None for all.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        drop_path: float,
        window_size: int | None,
    ):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.window_size = window_size
        self.norm1 = norm(embed_dim)
        self.attn = EvaAttention(
            embed_dim, num_heads, qkv_fused=False, num_prefix_tokens=0, scale_norm=False
        )
        self.norm2 = norm(embed_dim)
        self.mlp = SwiGLU(embed_dim, ffn_dim, norm_layer=norm)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> the same; windows at the border attend to zeros beyond it as well."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        height, width = size = x.shape[1:3]
        window = (self.window_size, self.window_size) if self.window_size else size
        padding = (-width % window[1], -height % window[0])
        x = functional.pad(x, (0, 0, 0, padding[0], 0, padding[1]))
        x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # (B, n, wh, m, ww, D)
        grid = x.transpose(2, 3)
        tokens = grid.flatten(0, 2).flatten(1, 2)  # (B * n * m, wh * ww, D)
        tokens = self.attn(tokens, rotary_positions(window, self.attn.head_dim, x))
        x = tokens.view(grid.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, :height, :width]


class EVA02(nn.Module):
    """EVA-02 without its classifier, for images of any size.

    Args:
        embed_dim: D, a multiple of 4 * `num_heads`.
        global_blocks: blocks that attend to the whole image; the others to windows.
        window_size: patches per side of a window.
        drop_path: stochastic depth rate of the last block; it grows linearly from 0.
        pretrain_size: pixels per side for which position embeddings are sized; other sizes
            interpolate them.
        recompute: trade time for memory in training: keep no activations inside of blocks, compute
            them once more for gradients.

    Raises:
        ValueError: another `embed_dim`, or a global block beyond the last.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        window_size: int,
        global_blocks: Collection[int],
        drop_path: float = 0.0,
        pretrain_size: int = 512,
        recompute: bool = False,
    ):
        super().__init__()
        if embed_dim % (4 * num_heads):
            raise ValueError(f"embed_dim {embed_dim} is no multiple of 4 * num_heads {num_heads}")
        if not set(global_blocks) <= set(range(depth)):
            raise ValueError(f"global_blocks {list(global_blocks)} are not among {depth} blocks")
        self.recompute = recompute
        self.patch_embed = PatchEmbed(
            None, _PATCH, embed_dim=embed_dim, output_fmt="NHWC", dynamic_img_pad=True
        )
        # The first is the class token's: of no use here, but published weights have it.
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (pretrain_size // _PATCH) ** 2, embed_dim))
        ffn_dim = embed_dim * 8 // 3
        self.blocks = nn.ModuleList(
            EVA02Block(
                embed_dim, num_heads, ffn_dim, rate, None if i in global_blocks else window_size
            )
            for i, rate in enumerate(torch.linspace(0, drop_path, depth, device="cpu").tolist())
        )
        self.out_norm = nn.LayerNorm(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, H / 16, W / 16), rounded up."""
        x = self.patch_embed(images)  # (B, h, w, D)
        x = x + self._positions(x.shape[1:3])
        for block in self.blocks:
            if self.recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.out_norm(x).permute(0, 3, 1, 2).contiguous()

    def _positions(self, size: torch.Size) -> Tensor:
        """(1, h, w, D)"""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        positions = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        if size != (side, side):
            positions = functional.interpolate(positions, size, mode="bicubic")
        return positions.permute(0, 2, 3, 1)


def rotary_positions(size: tuple[int, int], dim: int, like: Tensor) -> Tensor:
    """(h * w, 2 * dim): sine and cosine for `EvaAttention`, of a grid of h x w patches.

    The grid spans the same positions whatever its size.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    waves = build_rotary_pos_embed(
        list(size),
        dim=dim,
        in_pixels=False,
        ref_feat_shape=[_ROPE_SIZE, _ROPE_SIZE],
        device=like.device,
        dtype=dtype,
    )
    return torch.cat(waves, -1)


class SimpleFeaturePyramid(nn.Module):
    """Maps of strides 4 to 64 from one of stride 16, each by convolutions of its own.

    Its maps are what a detector's neck returns: it needs no further projection.

    Args:
        net: returns (B, in_channels, h, w) of stride 16.
        out_channels: of every map.
    """

    def __init__(self, net: nn.Module, in_channels: int, out_channels: int):
        super().__init__()
        self.net = net
        half, quarter = in_channels // 2, in_channels // 4
        self.p2 = nn.Sequential(
            nn.Upsample(scale_factor=2),
            *_convolution(in_channels, half, 3),
            nn.GELU(),
            nn.Upsample(scale_factor=2),
            *_convolution(half, quarter, 3),
            nn.GELU(),
            *_output(quarter, out_channels),
        )
        self.p3 = nn.Sequential(
            nn.Upsample(scale_factor=2),
            *_convolution(in_channels, half, 3),
            nn.GELU(),
            *_output(half, out_channels),
        )
        self.p4 = nn.Sequential(*_output(in_channels, out_channels))
        self.p5 = nn.Sequential(nn.MaxPool2d(3, 2, padding=1), *_output(in_channels, out_channels))
        self.p6 = nn.Sequential(
            nn.MaxPool2d(3, 2, padding=1),
            *_convolution(in_channels, in_channels, 3, stride=2),
            nn.GELU(),
            *_output(in_channels, out_channels),
        )
        self.size_divisibility = 32  # as published; 16 is what the patches need
        self._shapes = {f"stride{1 << i}": FeatureShape(out_channels, 1 << i) for i in range(2, 7)}

    def output_shape(self) -> dict[str, FeatureShape]:
        """Channels and stride of every returned map, finest first."""
        return dict(self._shapes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps by name."""
        x = self.net(images)
        maps = [level(x) for level in (self.p2, self.p3, self.p4, self.p5, self.p6)]
        return dict(zip(self._shapes, maps, strict=True))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.xavier_uniform_(convolution.weight)
    return [convolution, LayerNorm2d(outputs, eps=1e-6)]


def _output(inputs: int, outputs: int) -> list[nn.Module]:
    return [*_convolution(inputs, outputs, 1), nn.GELU(), *_convolution(outputs, outputs, 3)]


def build_eva02(
    embed_dim: int = 1024,
    depth: int = 24,
    num_heads: int = 16,
    window_size: int = 24,
    global_blocks: Collection[int] = (3, 7, 11, 15, 19, 23),
    drop_path: float = 0.4,
    recompute: bool = False,
    out_channels: int = 256,
) -> SimpleFeaturePyramid:
    """EVA-02 with its pyramid; by default the ViT-L of Co-DINO on COCO.

    That on LVIS has windows of 16, global blocks (2, 5, 8, 11, 14, 17, 20, 23) and 0.3. Arguments
    are those of `EVA02`; `out_channels` of the maps "stride4" to "stride64".
    """
    net = EVA02(
        embed_dim,
        depth,
        num_heads,
        window_size,
        global_blocks,
        drop_path,
        recompute=recompute,
    )
    return SimpleFeaturePyramid(net, embed_dim, out_channels)
