"""From images to the batch that a detector takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .transfer import to_device

# ImageNet statistics of RGB images with values in 0..255
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def batch_images(
    images: Sequence[Tensor],
    pixel_mean: Sequence[float] = PIXEL_MEAN,
    pixel_std: Sequence[float] = PIXEL_STD,
) -> tuple[Tensor, Tensor]:
    """Normalise images and pad them with zeros at the bottom and right to a common size.

    Args:
        images: (3, h, w) each, uint8 or float in 0..255, on one device.

    Returns:
        images (B, 3, H, W) in float32, or float64 if the images are, and padding_mask (B, H, W).

    Raises:
        ValueError: see `check_images`.
    """
    check_images(images)
    dtype = torch.float64 if images[0].dtype == torch.float64 else torch.float32
    mean, std = (to_device(s, dtype, images[0].device) for s in (pixel_mean, pixel_std))
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    batch = mean.new_zeros(len(images), 3, height, width)
    for image, slot in zip(images, batch, strict=True):
        normalised = (image.to(dtype) - mean[:, None, None]) / std[:, None, None]
        slot[:, : image.shape[1], : image.shape[2]] = normalised
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    return batch, make_padding_mask(sizes, batch)


def check_images(images: Sequence[Tensor]) -> None:
    """Look at what is to be batched, without waiting for the device.

    Raises:
        ValueError: there are none, or one is no (3, h, w) in uint8 or floating point.
    """
    if not images:
        raise ValueError("a batch needs at least one image")
    for number, image in enumerate(images):
        wrong = type(image).__name__
        if isinstance(image, Tensor):
            wrong = f"{tuple(image.shape)} in {image.dtype}"
            fine = image.dtype == torch.uint8 or image.is_floating_point()
            if fine and image.ndim == 3 and len(image) == 3 and image.numel():
                continue
        raise ValueError(
            f"image {number} of the batch must be a tensor (3, height, width) in uint8 or floating "
            f"point, with values in 0..255; it is {wrong}"
        )


def make_padding_mask(sizes: Sequence[tuple[int, int]], batch: Tensor) -> Tensor:
    """(B, H, W), False over the (height, width) that each image has in a batch (B, 3, H, W)."""
    mask = torch.ones(len(batch), *batch.shape[-2:], dtype=torch.bool, device=batch.device)
    for (height, width), image_mask in zip(sizes, mask, strict=True):
        image_mask[:height, :width] = False
    return mask
