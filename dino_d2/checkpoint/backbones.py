"""Backbones by their several names: each library's are translated to one form and back."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from .io import CheckpointError
from .names import EVA02_BLOCKS, Table, rename

# Kept under their own names: Detectron2's ResNet, ViT and Swin (the latter are also those of the
# Swin authors), timm's ConvNeXt.


def _resnet() -> Table:
    """torchvision and timm -> Detectron2"""
    table: Table = [("conv1.weight", "stem.conv1.weight"), ("bn1.*", "stem.conv1.norm.*")]
    for i in (1, 2, 3, 4):
        table += [
            (f"layer{i}.#.downsample.0.*", f"res{i + 1}.#.shortcut.*"),
            (f"layer{i}.#.downsample.1.*", f"res{i + 1}.#.shortcut.norm.*"),
            (f"layer{i}.#.conv#.*", f"res{i + 1}.#.conv#.*"),
            (f"layer{i}.#.bn#.*", f"res{i + 1}.#.conv#.norm.*"),
        ]
    return [*table, ("fc.*", None)]


def _resnet_classifier() -> Table:
    """Detectron2's classifiers -> its detectors' backbones"""
    return [("stem.fc.*", None), ("stem.*", "stem.*"), ("res#.*", "res#.*"), ("linear.*", None)]


def _swin() -> Table:
    """timm -> the authors; timm has a stage's downsampling at its start, not at its end"""
    table: Table = [("patch_embed.*", "patch_embed.*")]
    for i in (1, 2, 3):
        table.append((f"layers_{i}.downsample.*", f"layers.{i - 1}.downsample.*"))
        table.append((f"layers.{i}.downsample.*", f"layers.{i - 1}.downsample.*"))
    table += [(f"norms.stride{4 << i}.*", f"norm{i}.*") for i in range(4)]
    table += [("layers_#.*", "layers.#.*"), ("layers.#.*", "layers.#.*")]
    return [*table, ("norm.*", None), ("head.fc.*", None)]


def _swin_authors() -> Table:
    """Their own, without the classifier"""
    table: Table = [("patch_embed.*", "patch_embed.*"), ("layers.#.blocks.*", "layers.#.blocks.*")]
    # timm has the same names with other numbers, up to 3
    table += [(f"layers.{i}.downsample.*", f"layers.{i}.downsample.*") for i in (0, 1, 2)]
    return [*table, ("norm#.*", "norm#.*"), ("norm.*", None), ("head.*", None)]


def _convnext() -> Table:
    """The authors -> timm"""
    table: Table = [("downsample_layers.0.#.*", "stem_#.*")]
    table += [
        ("downsample_layers.#.#.*", "stages_#.downsample.#.*"),
        ("stages.#.#.dwconv.*", "stages_#.blocks.#.conv_dw.*"),
        ("stages.#.#.norm.*", "stages_#.blocks.#.norm.*"),
        ("stages.#.#.pwconv#.*", "stages_#.blocks.#.mlp.fc#.*"),
        ("stages.#.#.gamma", "stages_#.blocks.#.gamma"),
    ]
    table += [(f"norm{i}.*", f"norms.stride{4 << i}.*") for i in range(4)]
    return [*table, ("norm.*", None), ("head.*", None)]


def _convnext_timm() -> Table:
    """timm's classifier -> timm's feature extractor"""
    table: Table = [
        ("stem.#.*", "stem_#.*"),
        ("stages.#.blocks.*", "stages_#.blocks.*"),
        ("stages.#.downsample.*", "stages_#.downsample.*"),
    ]
    return [*table, ("head.*", None)]


def _eva02() -> Table:
    """EVA-02's authors -> ours; timm's names go by the next table"""
    heads = ("cls_token", "norm.*", "fc_norm.*", "head.*", "rope.*")
    return [*EVA02_BLOCKS, *((name, None) for name in heads)]


def _vit() -> Table:
    """MAE and timm -> Detectron2's ViT inside SimpleFeaturePyramid"""
    table: Table = [("pos_embed", "net.pos_embed"), ("patch_embed.*", "net.patch_embed.*")]
    table += [("blocks.#.*", "net.blocks.#.*")]
    return [*table, ("cls_token", None), ("norm.*", None), ("head.*", None), ("fc_norm.*", None)]


_TABLES = (
    _resnet(),
    _resnet_classifier(),
    _swin_authors(),
    _swin(),
    _convnext(),
    _convnext_timm(),
    _eva02(),
    _vit(),
)

# mmdetection's Swin -> the authors
_SWIN_MMDETECTION: Table = [
    ("backbone.patch_embed.projection.*", "backbone.patch_embed.proj.*"),
    ("backbone.stages.#.blocks.#.attn.w_msa.*", "backbone.layers.#.blocks.#.attn.*"),
    ("backbone.stages.#.blocks.#.ffn.layers.0.0.*", "backbone.layers.#.blocks.#.mlp.fc1.*"),
    ("backbone.stages.#.blocks.#.ffn.layers.1.*", "backbone.layers.#.blocks.#.mlp.fc2.*"),
    ("backbone.stages.#.*", "backbone.layers.#.*"),
    ("*", "*"),
]

# Follow from the architecture; never needed and never missed.
_DERIVED = ("relative_position_index", "attn_mask", "num_batches_tracked")


def is_derived(name: str) -> bool:
    """Whether a buffer holds nothing that was learned."""
    return name.rsplit(".", 1)[-1] in _DERIVED


def common_names(names: Iterable[str]) -> dict[str, str | None]:
    """Each name in the form that all libraries' names are translated to; None: not needed."""
    names = {name: name.removeprefix("body.") for name in names}
    needed = {name: stripped for name, stripped in names.items() if not is_derived(name)}
    for table in _TABLES:
        try:
            translated = {name: rename(stripped, table) for name, stripped in needed.items()}
        except CheckpointError:
            continue
        return {name: translated.get(name) for name in names}
    return {name: needed.get(name) for name in names}


def from_mmdetection(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detector's weights of mmdetection, its Swin as the authors have it; the rest stays.

    mmdetection merges four patches channel by channel and row by row, the authors patch by patch
    and column by column.
    """
    if not any(name.startswith("backbone.stages.") for name in weights):
        return dict(weights)
    renamed = {rename(name, _SWIN_MMDETECTION): tensor for name, tensor in weights.items()}
    return {
        name: _patch_by_patch(tensor) if ".downsample." in name else tensor
        for name, tensor in renamed.items()
    }


def _patch_by_patch(tensor: Tensor) -> Tensor:
    """(..., C * row * column) -> (..., column * row * C)"""
    parts = tensor.unflatten(-1, (-1, 2, 2))
    return parts.transpose(-3, -1).flatten(-3)
