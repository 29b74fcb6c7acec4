"""Puts weights into a model, every name accounted for."""

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backbones import common_names, is_derived
from .classes import ClassNames, map_classes
from .io import CheckpointError, read_weights

_WRAPPER = "detector."  # the prefix under which a Detectron2 meta-architecture holds a detector

# What classifiers have not: norms and pyramids of the returned features.
_OF_FEATURES = (
    "backbone.norm[0-3].*",
    "backbone.norms.stride*",
    "backbone.simfp_*",
    "backbone.net.out_norm.*",
    "backbone.p[2-6].*",
)


def load_weights(
    model: nn.Module,
    source: str | os.PathLike | Mapping[str, Tensor],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    skip: Sequence[str] = (),
    classes: ClassNames | None = None,
) -> None:
    """Load a file, or weights by name, into a detector or its Detectron2 meta-architecture.

    Backbones of the same kind are translated between the names that Detectron2, torchvision and
    timm give them.

    Args:
        allow_missing, allow_unexpected: patterns (`fnmatch`) of names that the source may lack,
            or have beyond the model's.
        skip: patterns of names that stay as they are in the model, whatever the source has.
        classes: names of the source's and the model's classes, see `map_classes`.

    Raises:
        CheckpointError: names are missing or unexpected, shapes differ, or weights are not finite
            or no floating-point numbers; the message lists them, and the model is unchanged.
    """
    weights = dict(source) if isinstance(source, Mapping) else read_weights(source)
    wanted = model.state_dict()
    if weights.keys() != wanted.keys():
        weights = translate_prefix(weights, wanted)
        weights = translate_backbone(weights, wanted)
    weights, wanted = _without(skip, weights), _without(skip, wanted)
    if classes is not None:
        weights = map_classes(weights, wanted, classes)
    check_names(weights, wanted, allow_missing, allow_unexpected)
    known = {name: tensor for name, tensor in weights.items() if name in wanted}
    model.load_state_dict(known, strict=False)


def load_backbone(backbone: nn.Module, source: str | os.PathLike | Mapping[str, Tensor]) -> None:
    """Load classification weights (ImageNet) into a detector's backbone.

    What only a detector has may be missing: norms of returned features, relative positions, a
    feature pyramid. Patches of another size are interpolated (EVA-02's 14 pixels to 16).

    Raises:
        CheckpointError: see `load_weights`.
    """
    weights = dict(source) if isinstance(source, Mapping) else read_weights(source)
    wanted = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    weights = translate_backbone(weights, wanted)
    _resize_patches(weights, wanted)
    check_names(weights, wanted, (*_OF_FEATURES, "*.rel_pos_[hw]"), ())
    known = {name.removeprefix("backbone."): t for name, t in weights.items() if name in wanted}
    backbone.load_state_dict(known, strict=False)


def translate_prefix(weights: Mapping[str, Tensor], wanted: Mapping) -> dict[str, Tensor]:
    """Add or remove the meta-architecture's prefix, as the wanted names have it."""
    has = any(name.startswith(_WRAPPER) for name in weights)
    wants = any(name.startswith(_WRAPPER) for name in wanted)
    if has and not wants:
        return {name.removeprefix(_WRAPPER): tensor for name, tensor in weights.items()}
    if wants and not has:
        return {_WRAPPER + name: tensor for name, tensor in weights.items()}
    return dict(weights)


def translate_backbone(weights: Mapping[str, Tensor], wanted: Mapping) -> dict[str, Tensor]:
    """Rename the weights below "backbone." to the wanted names of the same meaning."""
    prefix = (_WRAPPER if any(name.startswith(_WRAPPER) for name in wanted) else "") + "backbone."
    theirs = common_names(_below(prefix, weights))
    ours = {common: name for name, common in common_names(_below(prefix, wanted)).items()}
    result = {}
    for name, tensor in weights.items():
        if not name.startswith(prefix):
            result[name] = tensor
            continue
        common = theirs[name.removeprefix(prefix)]
        if common is not None:
            result[prefix + ours.get(common, common)] = tensor
    return result


def _resize_patches(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Interpolate the kernel of a ViT's patches where its size is not the wanted one."""
    for name in weights.keys() & wanted.keys():
        size = wanted[name].shape[2:]
        if name.endswith("patch_embed.proj.weight") and weights[name].shape[2:] != size:
            kernel = weights[name].float()
            weights[name] = functional.interpolate(kernel, size, mode="bicubic")


def _below(prefix: str, names: Mapping) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def all_finite(tensor: Tensor) -> Tensor:
    """Whether all numbers are, as a tensor (); by the extremes, far faster than one by one."""
    if not tensor.numel():
        return tensor.new_ones((), dtype=torch.bool)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()


def check_names(
    weights: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    allow_missing: Sequence[str],
    allow_unexpected: Sequence[str],
) -> None:
    """Raise a CheckpointError that lists every missing, unexpected and unusable name."""
    missing = [
        name
        for name in wanted
        if name not in weights and not is_derived(name) and not _any_match(name, allow_missing)
    ]
    unexpected = [
        name for name in weights if name not in wanted and not _any_match(name, allow_unexpected)
    ]
    misshapen = [
        f"{name}: {tuple(weights[name].shape)} given, {tuple(wanted[name].shape)} wanted"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    both = [name for name in wanted if name in weights]
    integers = [
        f"{name}: {weights[name].dtype}"
        for name in both
        if wanted[name].is_floating_point() and not weights[name].is_floating_point()
    ]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": misshapen,
        "not floating-point numbers": integers,
        "not finite": [
            name for name in both if not weights[name].is_meta and not all_finite(weights[name])
        ],
    }
    lines = [
        f"{len(names)} {kind}:\n" + "\n".join(f"  {name}" for name in names)
        for kind, names in problems.items()
        if names
    ]
    if misshapen:
        lines.append(
            "`skip` (train.init_skip, in yacs MODEL.WEIGHTS_SKIP) leaves names out, by patterns; "
            "`classes` (train.init_classes, MODEL.WEIGHTS_CLASSES) takes classes over by names."
        )
    if lines:
        raise CheckpointError("the weights do not fit the model. " + "\n".join(lines))


def _without(patterns: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not _any_match(name, patterns)}


def _any_match(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
