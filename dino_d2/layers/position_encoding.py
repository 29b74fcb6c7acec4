"""Sinusoidal encodings of pixel positions and of boxes."""

import math

import torch
from torch import Tensor, nn


def _sine(angles: Tensor, dim: int, temperature: float) -> Tensor:
    """(...,) -> (..., dim): sin and cos interleaved, at geometric frequencies."""
    channel = torch.arange(dim, device=angles.device, dtype=angles.dtype)
    frequencies = temperature ** -(channel.div(2, rounding_mode="floor") * 2 / dim)
    phases = angles.unsqueeze(-1) * frequencies
    return torch.stack([phases[..., 0::2].sin(), phases[..., 1::2].cos()], -1).flatten(-2)


class SinePositionEncoding(nn.Module):
    """Encodes each pixel's position in its image, padding left out (DETR, sec. A.4).

    Positions count from `1 + offset` and are divided by the image's size, so that they run to
    2 pi. DINO uses temperature 20 and offset 0; Deformable DETR 10000 and -0.5.
    """

    def __init__(self, embed_dim: int, temperature: float = 20, offset: float = 0.0):
        super().__init__()
        self.dim_per_axis = embed_dim // 2
        self.temperature = temperature
        self.offset = offset

    def forward(self, padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, h, w) -> (B, D, h, w), channels y then x; float64 for float64, else float32."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        valid = (~padding_mask).to(dtype)
        y, x = valid.cumsum(1), valid.cumsum(2)
        y = (y + self.offset) / (y[:, -1:, :] + 1e-6) * 2 * math.pi
        x = (x + self.offset) / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        encoded = [_sine(axis, self.dim_per_axis, self.temperature) for axis in (y, x)]
        return torch.cat(encoded, -1).permute(0, 3, 1, 2)


def encode_boxes(
    boxes: Tensor, dim: int, temperature: float = 10000, order: tuple[int, ...] = (1, 0, 2, 3)
) -> Tensor:
    """Positional queries of boxes (DAB-DETR, sec. 4.1).

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        dim: channels per coordinate.
        order: of the coordinates in the result.

    Returns:
        (..., 4 * dim), by default y, x, w, h, as published.
    """
    encoded = _sine(boxes * 2 * math.pi, dim, temperature)  # (..., 4, dim)
    return torch.cat([encoded[..., i, :] for i in order], -1)
