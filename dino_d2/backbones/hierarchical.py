"""Hierarchical models of timm and torchvision, with maps of strides 4 to 32."""

from collections.abc import Sequence

import timm
import torch
import torchvision
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from .shape import FeatureShape

# How torchvision names the outputs of a model's four stages, and whether channels come last.
_TORCHVISION_STAGES = {
    "resn": ([f"layer{i}" for i in (1, 2, 3, 4)], False),
    "wide_resnet": ([f"layer{i}" for i in (1, 2, 3, 4)], False),
    "regnet": ([f"trunk_output.block{i}" for i in (1, 2, 3, 4)], False),
    "convnext": ([f"features.{i}" for i in (1, 3, 5, 7)], False),
    "swin": ([f"features.{i}" for i in (1, 3, 5, 7)], True),
}


class _Backbone(nn.Module):
    """What the two libraries' wrappers share."""

    def __init__(self, body: nn.Module, shapes: dict[str, FeatureShape], channels_last: bool):
        super().__init__()
        self.body = body
        self.channels_last = channels_last
        self._shapes = shapes
        self.size_divisibility = 0  # any image size will do

    def output_shape(self) -> dict[str, FeatureShape]:
        """Channels and stride of every returned map, finest first."""
        return dict(self._shapes)

    def _as_channels_first(self, feature: Tensor) -> Tensor:
        return feature.permute(0, 3, 1, 2).contiguous() if self.channels_last else feature


class TimmBackbone(_Backbone):
    """A hierarchical model of timm.

    Args:
        name: as `timm.create_model` takes it, for example "resnet50" or "convnext_tiny".
        strides: the maps to return, out of 4, 8, 16 and 32.
        pretrained: True downloads timm's weights.
        drop_path: stochastic depth rate.
        norm: "BN" leaves batch norm as it is, "FrozenBN" fixes its statistics and weights.
        freeze_at: 1 freezes the stem, 2 the first stage as well, and so on; 0 nothing.
        output_norm: eps of a LayerNorm over the channels of every map, as detectors put on Swin
            (1e-5) and ConvNeXt (1e-6); None for none.
        options: further arguments of the timm model, such as
            `{"strict_img_size": False, "always_partition": True}` for a Swin on images of any size.

    Raises:
        ValueError: the model has no map of some stride, or its stages cannot be frozen.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (8, 16, 32),
        pretrained: bool = False,
        drop_path: float = 0.0,
        norm: str = "BN",
        freeze_at: int = 0,
        output_norm: float | None = None,
        options: dict | None = None,
    ):
        options = {**(options or {}), **({"drop_path_rate": drop_path} if drop_path else {})}
        with torch.device("meta"):
            stages = timm.create_model(name, features_only=True, **options).feature_info
        reductions = stages.reduction()
        _check_strides(name, strides, reductions)
        indices = [reductions.index(stride) for stride in strides]
        body = timm.create_model(
            name, pretrained=pretrained, features_only=True, out_indices=indices, **options
        )
        if hasattr(body, "patch_embed"):
            body.patch_embed.dynamic_img_pad = True
        channels = [stages.channels()[i] for i in indices]
        shapes = {
            f"stride{stride}": FeatureShape(c, stride)
            for stride, c in zip(strides, channels, strict=True)
        }
        super().__init__(body, shapes, getattr(body, "output_fmt", "NCHW") == "NHWC")
        names = [module.replace(".", "_") for module in stages.module_name()]
        first_stage = next(i for i, reduction in enumerate(reductions) if reduction >= 4)
        _freeze(body, names[first_stage:], freeze_at, norm)
        self.norms = None
        if output_norm is not None:
            self.norms = nn.ModuleDict(
                {name: nn.LayerNorm(shape.channels, output_norm) for name, shape in shapes.items()}
            )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps by name."""
        maps = [self._as_channels_first(feature) for feature in self.body(images)]
        if self.norms is not None:
            maps = [
                norm(feature.movedim(1, -1)).movedim(-1, 1)
                for norm, feature in zip(self.norms.values(), maps, strict=True)
            ]
        return dict(zip(self._shapes, maps, strict=True))


class TorchvisionBackbone(_Backbone):
    """A hierarchical classification model of torchvision: ResNets, RegNets, ConvNeXts, Swins.

    Args:
        name: as `torchvision.models.get_model` takes it, for example "resnet50".
        strides: the maps to return, out of 4, 8, 16 and 32.
        weights: torchvision's name of weights to download, for example "IMAGENET1K_V1".
        norm, freeze_at: see `TimmBackbone`.
        dilated: the last stage of a ResNet keeps the stride of 16 by dilation (DC5), and is the map
            of that stride.

    Raises:
        ValueError: an unknown kind of model, or a stride that it has not.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (8, 16, 32),
        weights: str | None = None,
        norm: str = "BN",
        freeze_at: int = 0,
        dilated: bool = False,
    ):
        known = [prefix for prefix in _TORCHVISION_STAGES if name.startswith(prefix)]
        if not known:
            raise ValueError(f"no stages known for torchvision's {name}; use TimmBackbone")
        nodes, channels_last = _TORCHVISION_STAGES[known[0]]
        available = {4: nodes[0], 8: nodes[1], 16: nodes[2], 32: nodes[3]}
        options = {}
        if dilated:
            options["replace_stride_with_dilation"] = [False, False, True]
            available[16] = available.pop(32)
        _check_strides(name, strides, list(available))
        outputs = {available[s]: f"stride{s}" for s in strides}
        model = torchvision.models.get_model(name, weights=weights, **options)
        _freeze(model, nodes, freeze_at, norm)
        body = create_feature_extractor(model, outputs)
        with torch.no_grad():
            example = body.eval()(torch.zeros(1, 3, 64, 64))
        body.train()
        axis = -1 if channels_last else 1
        shapes = {
            name: FeatureShape(example[name].shape[axis], stride)
            for name, stride in zip(outputs.values(), strides, strict=True)
        }
        super().__init__(body, shapes, channels_last)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> maps by name."""
        return {name: self._as_channels_first(m) for name, m in self.body(images).items()}


def _check_strides(name: str, strides: Sequence[int], available: Sequence[int]) -> None:
    missing = [stride for stride in strides if stride not in available]
    if missing or list(strides) != sorted(strides):
        raise ValueError(
            f"{name} has feature maps of strides {list(available)}; asked for, finest first, "
            f"were {list(strides)}"
        )


def _freeze(body: nn.Module, stages: Sequence[str], freeze_at: int, norm: str) -> None:
    """Freeze the stem and the first stages by name, and batch norms as `norm` says."""
    if norm not in ("BN", "FrozenBN"):
        raise ValueError(f"norm must be 'BN' or 'FrozenBN', but is {norm!r}")
    if norm == "FrozenBN":
        freeze_batch_norm_2d(body)
    if not freeze_at:
        return
    modules = dict(_modules_in_order(body, stages))
    if stages[0] not in modules:
        raise ValueError(f"freeze_at must be 0: the stages of {list(modules)} cannot be told apart")
    frozen_until = stages[freeze_at - 1] if freeze_at <= len(stages) else None
    for name, module in modules.items():
        if name == frozen_until:
            break
        module.requires_grad_(False)
        body.set_submodule(name, freeze_batch_norm_2d(module))


def _modules_in_order(body: nn.Module, stages: Sequence[str]):
    """Children, or grandchildren where the stages are (torchvision's "features.1")."""
    for name, child in body.named_children():
        if any(stage.startswith(name + ".") for stage in stages):
            for inner, grandchild in child.named_children():
                yield f"{name}.{inner}", grandchild
        else:
            yield name, child
