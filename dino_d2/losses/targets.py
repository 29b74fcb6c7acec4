"""Checks a batch's targets and joins them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import TargetError
from ..types import Target, Targets

_ROUNDING = 1e-3  # by how much a relative box may leave [0, 1]


def pack_targets(targets: Sequence[Target], num_classes: int, like: Tensor) -> Targets:
    """Check every image's targets on the host and move them to the device of `like`.

    Hand targets over on the CPU, as data loaders deliver them: reading them from a GPU waits for
    it.

    Raises:
        TargetError: labels or boxes have a wrong shape or dtype, a label is not in
            [0, num_classes), or a box is not finite, not relative to the image, or of negative
            size. The error names the image.
    """
    host = [Target(target.labels.cpu(), target.boxes.cpu()) for target in targets]
    for image, target in enumerate(host):
        _check(image, target, num_classes)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    labels = torch.cat([target.labels for target in host])
    boxes = torch.cat([target.boxes for target in host])
    return Targets(
        labels.to(like.device, torch.int64, non_blocking=True),
        boxes.to(like.device, dtype, non_blocking=True),
        tuple(len(target.labels) for target in host),
    )


def _check(image: int, target: Target, num_classes: int) -> None:
    if target.boxes.dtype not in (torch.float16, torch.float32, torch.float64):
        raise TargetError(image, f"boxes must be float32 or float64, not {target.boxes.dtype}")
    labels, boxes = target.labels.numpy(), target.boxes.numpy()  # no tensor operations
    if labels.ndim != 1 or boxes.shape != (len(labels), 4):
        shapes = f"{labels.shape} and {boxes.shape}"
        raise TargetError(image, f"labels must be (T,) and boxes (T, 4), but they are {shapes}")
    if labels.dtype.kind not in "iu":
        raise TargetError(image, f"labels must be integers, not {labels.dtype}")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise TargetError(
            image,
            f"class id {labels[wrong][0]} is out of range: the model has {num_classes} classes, "
            f"0 to {num_classes - 1}",
        )
    good = (boxes >= (-_ROUNDING, -_ROUNDING, 0, 0)) & (boxes <= 1 + _ROUNDING)  # False for NaN
    if not good.all():
        row = int((~good).any(1).argmax())
        raise TargetError(
            image,
            f"box {row} is {boxes[row].tolist()}; boxes must be finite (cx, cy, w, h) relative to "
            "the image, in [0, 1]",
        )
