"""Weights of other repositories, renamed to ours."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.coco import COCO_CATEGORY_IDS
from .backbones import common_names, from_mmdetection
from .io import CheckpointError
from .load import check_names, translate_backbone
from .names import (
    detrex,
    official_co_detr,
    official_dab,
    official_deformable_detr,
    official_dino,
    rename,
    split,
)

# What to change in our configs so that the model runs as detrex's does, by `detrex_model`.
_TOP_300 = {"num_detections": 300}
_DETREX_DEFORMABLE = {"detector.reference_eps": 1e-3, **_TOP_300}
DETREX_SETTINGS: dict[str, dict[str, object]] = {
    "dino": {
        "detector.share_heads": False,
        "detector.position_temperature": 10000,
        "detector.position_offset": -0.5,
    },
    "dab_detr": {},
    "dn_detr": {},
    "dab_deformable_detr": _TOP_300,
    "dab_deformable_detr_two_stage": {"detector.two_stage": True, **_TOP_300},
    "dn_deformable_detr": _TOP_300,
    "deformable_detr": _DETREX_DEFORMABLE,
    "deformable_detr_refine": {"detector.box_refinement": True, **_DETREX_DEFORMABLE},
    "deformable_detr_two_stage": {
        "detector.box_refinement": True,
        "detector.two_stage": True,
        **_DETREX_DEFORMABLE,
    },
}

SOURCES = {
    "co-detr": official_co_detr,
    "dino": official_dino,
    "dn-detr": official_dab,
    "dab-detr": official_dab,
    "deformable-detr": official_deformable_detr,
    "detrex": detrex,
}


def convert(
    weights: Mapping[str, Tensor],
    source: str,
    num_classes: int | None = None,
    wanted: Mapping[str, Tensor] | None = None,
    co_heads: bool = True,
) -> dict[str, Tensor]:
    """Rename the weights of another repository's detector.

    Args:
        weights: by their official names, as published.
        source: where they come from: "dino", "dn-detr" or "dab-detr" (IDEA-Research),
            "deformable-detr" (fundamentalvision), "co-detr" (Sense-X), or "detrex".
        num_classes: 80 picks Detectron2's contiguous COCO classes out of a head for the 91 COCO
            ids. By default the head stays as it is.
        wanted: state dict of the model that the result is for. Backbone names follow it, and every
            name and shape is checked. By default backbones are named as in the shipped configs.
        co_heads: False leaves out Co-DETR's auxiliary heads, which only training needs.

    Raises:
        CheckpointError: a name is unknown, weights that must be equal differ, or the result does
            not fit `wanted`.
    """
    if source not in SOURCES:
        raise CheckpointError(f"unknown source {source!r}; known are {', '.join(SOURCES)}")
    if source == "co-detr":
        weights = from_mmdetection(weights)
    table = SOURCES[source](weights)
    result = {}
    for name, tensor in weights.items():
        target = rename(name, table)
        if target is None:
            continue
        if target in result and not torch.equal(result[target], tensor):
            raise CheckpointError(f"{name!r} should equal another copy of {target!r}, but does not")
        result[target] = tensor
    result = split(result)
    if not co_heads:
        result = {name: t for name, t in result.items() if not name.startswith("co_heads.")}
    result = _merge_shared_heads(result) if source != "detrex" else result
    result = _fit_classes(result, num_classes)
    result = _drop_unused_norm(result)
    if wanted is None:
        return _name_backbone_as_shipped(result)
    result = translate_backbone(result, wanted)
    check_names(result, wanted, (), ())
    return result


def _merge_shared_heads(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official heads have a name per layer and are one; keep the first if all are equal."""
    result = {}
    for name, tensor in weights.items():
        first = name
        for kind in ("heads.class_heads.", "heads.box_heads."):
            if name.startswith(kind):
                first = kind + "0." + name.removeprefix(kind).split(".", 1)[1]
        if name != first and not torch.equal(weights[first], tensor):
            return weights  # one pair of heads per layer
        result[first] = tensor
    return result


def _fit_classes(weights: dict[str, Tensor], num_classes: int | None) -> dict[str, Tensor]:
    """Cut the unused rows of label embeddings, and pick COCO classes if asked to."""
    heads = [name for name in weights if "class_head" in name and not name.startswith("co_heads.")]
    if not heads:
        raise CheckpointError("there is no class head, so this is no detector of the family")
    embedding = "denoising.label_embed.weight"
    given = len(weights[heads[0]])
    rows = torch.arange(given)
    if num_classes not in (None, given):
        if (given, num_classes) != (91, 80):
            raise CheckpointError(f"cannot turn {given} classes into {num_classes}")
        rows = torch.tensor(COCO_CATEGORY_IDS)
    chosen = [*heads, *([embedding] if embedding in weights else [])]
    result = {**weights, **{name: weights[name][rows] for name in chosen}}
    if "query_source.from_box.weight" in weights:  # two-stage: the first output means any object
        for name in heads:
            if name.startswith("query_source."):
                result[name][0] = weights[name][0]
    return result


def _drop_unused_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official ConvNeXt norms all four maps, though the 4-scale model takes three."""
    convolutions = [f"neck.projections.{i}.0.weight" for i in range(4)]
    if all(name in weights and weights[name].shape[-1] == 1 for name in convolutions):
        return weights
    return {name: t for name, t in weights.items() if not name.startswith("backbone.norm0.")}


def _name_backbone_as_shipped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "backbone."
    names = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    common = common_names(names)
    in_timm = any(name and name.startswith("stages_") for name in common.values())
    result = {}
    for name, tensor in weights.items():
        if not name.startswith(prefix):
            result[name] = tensor
            continue
        target = common[name.removeprefix(prefix)]
        if target is not None:
            body = "body." if in_timm and not target.startswith("norms.") else ""
            result[prefix + body + target] = tensor
    return result
