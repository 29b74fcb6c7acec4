"""Multi-scale deformable attention (Deformable DETR, sec. 4.1, eq. 3) as a PyTorch operator.

For every query and head it sums bilinear samples of `value`, weighted by `attention_weights`.

**Where a sample lies.** Location (x, y) in [0, 1] of a level is pixel `(x * width - 0.5,
y * height - 0.5)` of its map, padding included (`align_corners=False`).

**Border.** A sample takes part only if its pixel lies strictly inside (-1, width) x (-1, height);
corners off the map count as zero and are not read.

**Non-finite input.** A sample that takes no part contributes exactly 0 to the output and to every
gradient, whatever its attention weight; a NaN or infinite location takes no part. NaN and
infinities in `value` and `attention_weights` propagate by IEEE arithmetic through every corner that
is on the map, corners of bilinear weight 0 included.

Coordinates and sums are float32, or float64 where `value` is float64, for every stored dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .native import load_native, warn_if_slow

MAX_LEVELS = 16
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_OP = "dino_d2::ms_deform_attn"
_BACKWARD_OP = "dino_d2::ms_deform_attn_backward"

SpatialShapes = Sequence[tuple[int, int]]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted bilinear samples of multi-scale feature maps.

    B images, S tokens over all levels, H heads of C channels, Q queries, L levels, P points.

    Args:
        value: (B, S, H, C), float64, float32, float16 or bfloat16.
        spatial_shapes: (height, width) of each level as integers, `sum(height * width) == S`. An
            integer tensor (L, 2) works too; on a GPU, reading it waits for the device.
        sampling_locations: (B, Q, H, L, P, 2) as (x, y) in [0, 1] of the level; float32, or
            float64 with a float64 value. Lower precisions are widened.
        attention_weights: (B, Q, H, L, P), dtype of `value`.

    Returns:
        (B, Q, H * C) in the dtype of `value`. Zero images, queries, levels or points are allowed.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device; the message names it.

    Differentiable once with respect to the three tensors. The gradient of `value` is accumulated
    in a fixed order on the CPU, and with atomics on CUDA.
    """
    shapes = _host_integers(spatial_shapes)
    _expect(isinstance(value, Tensor), "value", "be a tensor", type(value).__name__)
    if sampling_locations.dtype in (torch.float16, torch.bfloat16):
        sampling_locations = sampling_locations.to(_accumulation_dtype(value))
    if not torch.compiler.is_compiling():  # there, the operator's fake kernel checks
        if not torch.is_autocast_enabled(value.device.type):  # there, after the casts
            _check(value, shapes, sampling_locations, attention_weights)
        warn_if_slow(value.device.type)
    return torch.ops.dino_d2.ms_deform_attn(value, shapes, sampling_locations, attention_weights)


def _host_integers(spatial_shapes: SpatialShapes | Tensor) -> list[int]:
    """[H0, W0, H1, W1, ...]"""
    if isinstance(spatial_shapes, Tensor):
        torch._check(
            spatial_shapes.ndim == 2
            and spatial_shapes.shape[1] == 2
            and not spatial_shapes.is_floating_point(),
            lambda: (
                "ms_deform_attn: spatial_shapes must be integers of shape (L, 2), but is "
                f"{spatial_shapes.dtype} of shape {tuple(spatial_shapes.shape)}"
            ),
        )
        spatial_shapes = spatial_shapes.tolist()
    flat = []
    for level, shape in enumerate(spatial_shapes):
        ok = isinstance(shape, (tuple, list, torch.Size)) and len(shape) == 2
        ok = ok and all(isinstance(size, (int, torch.SymInt)) for size in shape)
        if not ok:
            raise RuntimeError(
                f"ms_deform_attn: spatial_shapes[{level}] must be (height, width) in integers, "
                f"but is {shape!r}"
            )
        flat.extend(shape)
    return flat


def _accumulation_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _expect(condition: bool, argument: str, expected: str, actual: object) -> None:
    if not condition:
        raise RuntimeError(f"ms_deform_attn: {argument} must {expected}, but is {actual}")


def _check(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> None:
    """Every relation between the arguments, from sizes on the host alone."""
    for name, tensor in (("sampling_locations", locations), ("attention_weights", weights)):
        device = f"be on the device of value, {value.device}"
        _expect(tensor.device == value.device, name, device, f"on {tensor.device}")
    _expect(value.dim() == 4, "value", "have shape (B, S, H, C)", tuple(value.shape))
    _expect(value.dtype in _FLOATS, "value", f"be one of {_FLOATS}", value.dtype)
    wide = _accumulation_dtype(value)
    _expect(locations.dtype == wide, "sampling_locations", f"be {wide}", locations.dtype)
    _expect(weights.dtype == value.dtype, "attention_weights", f"be {value.dtype}", weights.dtype)
    _expect(
        locations.dim() == 6,
        "sampling_locations",
        "have shape (B, Q, H, L, P, 2)",
        tuple(locations.shape),
    )
    _check_levels(value, shapes)
    batch, _, heads, _ = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    expected = (batch, queries, heads, len(shapes) // 2, points)
    _expect(
        tuple(locations.shape) == (*expected, 2),
        "sampling_locations",
        f"have shape {(*expected, 2)} to fit value and spatial_shapes",
        tuple(locations.shape),
    )
    _expect(
        tuple(weights.shape) == expected,
        "attention_weights",
        f"have shape {expected} to fit sampling_locations",
        tuple(weights.shape),
    )


def _check_levels(value: Tensor, shapes: list[int]) -> None:
    levels = list(zip(shapes[::2], shapes[1::2], strict=True))
    _expect(
        len(levels) <= MAX_LEVELS,
        "spatial_shapes",
        f"have at most {MAX_LEVELS} levels",
        f"{len(levels)} levels",
    )
    for level, (height, width) in enumerate(levels):
        ok = height > 0 and width > 0
        _expect(ok, f"spatial_shapes[{level}]", "be positive", (height, width))
    tokens = sum(height * width for height, width in levels)
    _expect(
        tokens == value.shape[1],
        "spatial_shapes",
        f"hold as many tokens as value, S = {value.shape[1]}",
        f"{levels}, which holds {tokens}",
    )


class _Corner:
    """One corner of every sample of one level, in plain PyTorch.

    N = B * Q * H. row (N * P,) indexes `value` seen as (B * S * H, C); valid (N, P) says where the
    corner is on the map; weight (N, P) is its bilinear weight, 0 elsewhere.
    """

    def __init__(self, x: Tensor, y: Tensor, inside: Tensor, weight: Tensor, geometry: tuple):
        height, width, start, tokens, heads, queries = geometry
        valid = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        n = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        image, head = n // (queries * heads), n % heads
        token = (start + y * width + x).where(valid, 0)
        self.row = ((image * tokens + token) * heads + head).flatten()
        self.valid = valid
        self.weight = weight.where(valid, 0)

    def read(self, rows: Tensor) -> Tensor:
        """(N, P, C): the corners' values, 0 off the map."""
        corners = rows.index_select(0, self.row).unflatten(0, self.valid.shape)
        return corners.where(self.valid.unsqueeze(-1), 0)


class _Level:
    """The samples of one level: fractional positions (N, P) and their four corners."""

    def __init__(self, locations: Tensor, geometry: tuple):
        height, width = geometry[:2]
        x = locations[..., 0] * width - 0.5
        y = locations[..., 1] * height - 0.5
        self.height, self.width = height, width
        self.inside = (x > -1) & (y > -1) & (x < width) & (y < height)
        x, y = x.where(self.inside, 0), y.where(self.inside, 0)
        x0, y0 = x.floor(), y.floor()
        self.from_left, self.from_top = x - x0, y - y0
        self.to_right, self.to_bottom = 1 - self.from_left, 1 - self.from_top
        x0, y0 = x0.long(), y0.long()
        self.corners = [
            _Corner(x0, y0, self.inside, self.to_bottom * self.to_right, geometry),
            _Corner(x0 + 1, y0, self.inside, self.to_bottom * self.from_left, geometry),
            _Corner(x0, y0 + 1, self.inside, self.from_top * self.to_right, geometry),
            _Corner(x0 + 1, y0 + 1, self.inside, self.from_top * self.from_left, geometry),
        ]


def _levels(value: Tensor, shapes: list[int], locations: Tensor):
    """Yield (level index, _Level), one at a time: a level's samples are large."""
    _, tokens, heads, _ = value.shape
    queries = locations.shape[1]
    by_level = locations.flatten(0, 2)  # (N, L, P, 2)
    start = 0
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        geometry = (height, width, start, tokens, heads, queries)
        yield level, _Level(by_level[:, level], geometry)
        start += height * width


def ms_deform_attn_pytorch(
    value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """The operator in plain PyTorch, for every device; `shapes` as [H0, W0, H1, W1, ...]."""
    wide = _accumulation_dtype(value)
    rows = value.to(wide).flatten(0, 2)
    attention = weights.to(wide).flatten(0, 2)  # (N, L, P)
    output = rows.new_zeros(attention.shape[0], 1, value.shape[3])
    for level, samples in _levels(value, shapes, locations):
        for corner in samples.corners:
            coefficient = (attention[:, level] * corner.weight).where(corner.valid, 0)
            output += torch.bmm(coefficient.unsqueeze(1), corner.read(rows))
    _, _, heads, channels = value.shape
    return output.reshape(*weights.shape[:2], heads * channels).to(value.dtype)


def ms_deform_attn_backward_pytorch(
    grad_output: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights in plain PyTorch."""
    wide = _accumulation_dtype(value)
    rows = value.to(wide).flatten(0, 2)
    attention = weights.to(wide).flatten(0, 2)
    gradient = grad_output.to(wide).reshape(attention.shape[0], 1, value.shape[3])  # (N, 1, C)
    grad_rows = torch.zeros_like(rows)
    grad_locations = torch.empty_like(locations, memory_format=torch.contiguous_format)
    grad_attention = torch.empty_like(attention, memory_format=torch.contiguous_format)
    by_level = grad_locations.flatten(0, 2)
    for level, samples in _levels(value, shapes, locations):
        weight = attention[:, level]
        dots = []
        for corner in samples.corners:
            valid = corner.valid.unsqueeze(-1)
            added = ((weight * corner.weight).unsqueeze(-1) * gradient).where(valid, 0)
            grad_rows.index_add_(0, corner.row, added.flatten(0, 1))
            dot = torch.bmm(corner.read(rows), gradient.transpose(1, 2)).squeeze(-1)
            dots.append(dot.where(corner.valid, 0))
        total = sum(corner.weight * dot for corner, dot in zip(samples.corners, dots, strict=True))
        horizontal = samples.to_bottom * (dots[1] - dots[0]) + samples.from_top * (
            dots[3] - dots[2]
        )
        vertical = samples.to_right * (dots[2] - dots[0]) + samples.from_left * (dots[3] - dots[1])
        grad_attention[:, level] = total.where(samples.inside, 0)
        by_level[:, level, :, 0] = (weight * samples.width * horizontal).where(samples.inside, 0)
        by_level[:, level, :, 1] = (weight * samples.height * vertical).where(samples.inside, 0)
    return (
        grad_rows.view(value.shape).to(value.dtype),
        grad_locations,
        grad_attention.view(weights.shape).to(weights.dtype),
    )


def _fake_forward(value, shapes, locations, weights):
    _check(value, shapes, locations, weights)
    return value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])


def _fake_backward(grad_output, value, shapes, locations, weights):
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _setup_context(ctx, inputs, output):
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad_output):
    value, locations, weights = ctx.saved_tensors
    if value.is_cuda and torch.are_deterministic_algorithms_enabled():
        _alert_not_deterministic()
    grad_value, grad_locations, grad_weights = torch.ops.dino_d2.ms_deform_attn_backward(
        grad_output, value, ctx.shapes, locations, weights
    )
    return grad_value, None, grad_locations, grad_weights


def _alert_not_deterministic() -> None:
    import warnings

    message = "the CUDA backward of ms_deform_attn adds with atomics and is not deterministic"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError("ms_deform_attn cannot be differentiated twice")


def _autocast(device_type: str):
    """Under autocast, value and weights take its dtype; locations stay float32."""

    def call(value, shapes, locations, weights):
        dtype = torch.get_autocast_dtype(device_type)
        if value.dtype != torch.float64:
            value, weights, locations = value.to(dtype), weights.to(dtype), locations.float()
        _check(value, shapes, locations, weights)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.dino_d2.ms_deform_attn(value, shapes, locations, weights)

    return call


def _register() -> None:
    load_native()  # registers the CPU and CUDA kernels; all other devices take the twin
    arguments = "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
    arguments += "Tensor attention_weights"
    tags = (torch.Tag.pt2_compliant_tag,)
    torch.library.define(_OP, f"({arguments}) -> Tensor", tags=tags)
    torch.library.define(
        _BACKWARD_OP,
        f"(Tensor grad_output, {arguments}) -> (Tensor, Tensor, Tensor)",
        tags=tags,
    )
    torch.library.impl(_OP, "CompositeExplicitAutograd", ms_deform_attn_pytorch)
    torch.library.impl(_BACKWARD_OP, "CompositeExplicitAutograd", ms_deform_attn_backward_pytorch)
    torch.library.register_fake(_OP, _fake_forward)
    torch.library.register_fake(_BACKWARD_OP, _fake_backward)
    torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)
    torch.library.register_autograd(
        _BACKWARD_OP, _no_second_derivative, setup_context=lambda ctx, inputs, output: None
    )
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        torch.library.impl(_OP, key, _autocast(device_type))


_register()
