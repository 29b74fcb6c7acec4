"""Multi-scale deformable attention (Deformable DETR, sec. 4.1, eq. 3) as PyTorch operators.

For every query and head it sums bilinear samples of `value`, weighted by attention weights. There
are two entries: `ms_deform_attn` takes the samples' locations and weights, as published;
`ms_deform_attn_fused` takes references, offsets and logits, and does the arithmetic in between
inside the kernel. They agree to rounding.

**Where a sample lies.** Location (x, y) in [0, 1] of a level is pixel `(x * width - 0.5,
y * height - 0.5)` of its map, padding included (`align_corners=False`).

**Border.** A sample takes part only if its pixel lies strictly inside (-1, width) x (-1, height);
corners off the map count as zero and are not read.

**Non-finite input.** A sample that takes no part contributes exactly 0 to the output and to every
gradient, whatever its attention weight; a NaN or infinite location takes no part. NaN and
infinities in `value` and attention weights propagate by IEEE arithmetic through every corner that
is on the map, corners of bilinear weight 0 included. A NaN or +inf among the logits of a query and
head makes all its weights NaN, as in any softmax.

Coordinates and sums are float32, or float64 where `value` is float64, for every stored dtype.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .native import load_native, warn_if_slow

MAX_LEVELS = 16
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

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
    _expect(isinstance(value, Tensor), "value", "be a tensor", type(value).__name__)
    shapes, locations = _host_integers(spatial_shapes), _widen(sampling_locations, value)
    _before_call(_check, value, shapes, locations, attention_weights)
    return torch.ops.dino_d2.ms_deform_attn(value, shapes, locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes | Tensor,
    reference: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` with the softmax and the arithmetic of the locations inside.

    B images, S tokens over all levels, H heads of C channels, Q queries, L levels, P points.

    Args:
        value, spatial_shapes: as in `ms_deform_attn`.
        reference: (B, Q, L, 2) points (x, y) or (B, Q, L, 4) boxes (cx, cy, w, h), relative to the
            level's map; float32, or float64 with a float64 value. Lower precisions are widened.
        sampling_offsets: (B, Q, H, L, P, 2) as (x, y), dtype of `value`. A sample lies at
            `point + offset / (width, height)` of its level, or at
            `(cx, cy) + offset * (w, h) * 0.5 / P`.
        attention_logits: (B, Q, H, L, P), dtype of `value`. The attention weights are their softmax
            over the samples of all levels.

    Returns:
        (B, Q, H * C) in the dtype of `value`. Zero images, queries, levels or points are allowed.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device; the message names it.

    Differentiable once with respect to the four tensors, as accurately as `ms_deform_attn`.
    """
    _expect(isinstance(value, Tensor), "value", "be a tensor", type(value).__name__)
    shapes, reference = _host_integers(spatial_shapes), _widen(reference, value)
    _before_call(_check_fused, value, shapes, reference, sampling_offsets, attention_logits)
    return torch.ops.dino_d2.ms_deform_attn_fused(
        value, shapes, reference, sampling_offsets, attention_logits
    )


def _widen(places: Tensor, value: Tensor) -> Tensor:
    """Locations or references are never of low precision: a map's width needs more bits."""
    low = places.dtype in (torch.float16, torch.bfloat16)
    return places.to(_accumulation_dtype(value)) if low else places


def _before_call(check, value: Tensor, *arguments) -> None:
    if torch.compiler.is_compiling():  # there, the operator's fake kernel checks
        return
    if not torch.is_autocast_enabled(value.device.type):  # there, after the casts
        check(value, *arguments)
    warn_if_slow(value.device.type)


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
    _check_value(value, sampling_locations=locations, attention_weights=weights)
    wide = _accumulation_dtype(value)
    _expect(locations.dtype == wide, "sampling_locations", f"be {wide}", locations.dtype)
    _check_samples(value, shapes, sampling_locations=locations, attention_weights=weights)


def _check_fused(
    value: Tensor, shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> None:
    _check_value(value, reference=reference, sampling_offsets=offsets, attention_logits=logits)
    wide = _accumulation_dtype(value)
    _expect(reference.dtype == wide, "reference", f"be {wide}", reference.dtype)
    _expect(offsets.dtype == value.dtype, "sampling_offsets", f"be {value.dtype}", offsets.dtype)
    _check_samples(value, shapes, sampling_offsets=offsets, attention_logits=logits)
    expected = (value.shape[0], offsets.shape[1], len(shapes) // 2)
    _expect(
        tuple(reference.shape) in ((*expected, 2), (*expected, 4)),
        "reference",
        f"have shape {(*expected, 2)} or {(*expected, 4)} to fit sampling_offsets",
        tuple(reference.shape),
    )


def _check_value(value: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        device = f"be on the device of value, {value.device}"
        _expect(tensor.device == value.device, name, device, f"on {tensor.device}")
    _expect(value.dim() == 4, "value", "have shape (B, S, H, C)", tuple(value.shape))
    _expect(value.dtype in _FLOATS, "value", f"be one of {_FLOATS}", value.dtype)


def _check_samples(value: Tensor, shapes: list[int], **samples: Tensor) -> None:
    """Of what there is per sample: (x, y), then a weight; by the names of the arguments."""
    (places, xy), (weighing, weights) = samples.items()
    _expect(weights.dtype == value.dtype, weighing, f"be {value.dtype}", weights.dtype)
    _expect(xy.dim() == 6, places, "have shape (B, Q, H, L, P, 2)", tuple(xy.shape))
    _check_levels(value, shapes)
    expected = (value.shape[0], xy.shape[1], value.shape[2], len(shapes) // 2, xy.shape[4])
    _expect(
        tuple(xy.shape) == (*expected, 2),
        places,
        f"have shape {(*expected, 2)} to fit value and spatial_shapes",
        tuple(xy.shape),
    )
    _expect(
        tuple(weights.shape) == expected,
        weighing,
        f"have shape {expected} to fit {places}",
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


class _Fusion:
    """What the fused operator does before the samples are taken, and its derivative.

    weights (B, Q, H, L, P) are the softmax of the logits; locations (B, Q, H, L, P, 2) lie `unit`
    times the offsets from the reference.
    """

    def __init__(
        self, shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
    ) -> None:
        self.reference = reference[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        self.offsets = offsets.to(reference.dtype)
        self.weights = logits.to(reference.dtype).flatten(3).softmax(-1).view(logits.shape)
        self.part = 0.5 / max(offsets.shape[4], 1)
        if reference.shape[-1] == 2:
            heights_widths = reference.new_tensor(shapes).view(-1, 2)
            self.unit = 1 / heights_widths.flip(-1)[:, None]
        else:
            self.unit = self.reference[..., 2:] * self.part
        self.locations = self.reference[..., :2] + self.offsets * self.unit

    def backward(self, grad_locations: Tensor, grad_weights: Tensor) -> tuple[Tensor, ...]:
        """Gradients of reference, offsets and logits; a sample outside contributes exactly 0."""
        moves = grad_locations != 0
        grad_offsets = (grad_locations * self.unit).where(moves, 0)
        grad_reference = grad_locations.sum((2, 4))
        if self.reference.shape[-1] == 4:
            along = (grad_locations * self.offsets).where(moves, 0)
            grad_reference = torch.cat([grad_reference, along.sum((2, 4)) * self.part], -1)
        mean = (self.weights * grad_weights).sum((3, 4), keepdim=True)
        return grad_reference, grad_offsets, self.weights * (grad_weights - mean)


def ms_deform_attn_fused_pytorch(
    value: Tensor, shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The fused operator in plain PyTorch, for every device."""
    fusion = _Fusion(shapes, reference, offsets, logits)
    return ms_deform_attn_pytorch(value, shapes, fusion.locations, fusion.weights)


def ms_deform_attn_fused_backward_pytorch(
    grad_output: Tensor,
    value: Tensor,
    shapes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    with_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, reference (0 unless `with_reference`), offsets and logits."""
    fusion = _Fusion(shapes, reference, offsets, logits)
    grad_value, grad_locations, grad_weights = ms_deform_attn_backward_pytorch(
        grad_output, value, shapes, fusion.locations, fusion.weights
    )
    grad_reference, grad_offsets, grad_logits = fusion.backward(grad_locations, grad_weights)
    if not with_reference:
        grad_reference = torch.zeros_like(grad_reference)
    return grad_value, grad_reference, grad_offsets.to(offsets.dtype), grad_logits.to(logits.dtype)


def _fake_forward(value, shapes, locations, weights):
    _check(value, shapes, locations, weights)
    return _new_output(value, weights)


def _fake_fused_forward(value, shapes, reference, offsets, logits):
    _check_fused(value, shapes, reference, offsets, logits)
    return _new_output(value, logits)


def _new_output(value: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])


def _new_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _fake_backward(grad_output, value, shapes, locations, weights):
    return _new_gradients(value, locations, weights)


def _fake_fused_backward(grad_output, value, shapes, reference, offsets, logits, with_reference):
    return _new_gradients(value, reference, offsets, logits)


def _setup_context(ctx, inputs, output):
    value, ctx.shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _backward(ctx, grad_output):
    _refuse_if_not_deterministic(grad_output)
    value, *others = ctx.saved_tensors
    grad_value, *gradients = torch.ops.dino_d2.ms_deform_attn_backward(
        grad_output, value, ctx.shapes, *others
    )
    return grad_value, None, *gradients


def _fused_backward(ctx, grad_output):
    _refuse_if_not_deterministic(grad_output)
    value, *others = ctx.saved_tensors
    grad_value, *gradients = torch.ops.dino_d2.ms_deform_attn_fused_backward(
        grad_output, value, ctx.shapes, *others, ctx.needs_input_grad[2]
    )
    return grad_value, None, *gradients


def _refuse_if_not_deterministic(grad_output: Tensor) -> None:
    """The CUDA kernels add with atomics; the twin's additions answer the mode themselves."""
    uses_kernel = grad_output.is_cuda and load_native().cuda
    if not (uses_kernel and torch.are_deterministic_algorithms_enabled()):
        return
    message = "the CUDA backward of ms_deform_attn adds with atomics and is not deterministic"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def _no_second_derivative(ctx, *gradients):
    raise RuntimeError("ms_deform_attn cannot be differentiated twice")


def _autocast(device_type: str, name: str, check):
    """Under autocast all tensors take its dtype but the third, the places: it stays float32."""

    def call(value, shapes, places, *weighing):
        dtype = torch.get_autocast_dtype(device_type)
        if value.dtype != torch.float64:
            value, places = value.to(dtype), places.float()
            weighing = [tensor.to(dtype) for tensor in weighing]
        check(value, shapes, places, *weighing)
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.dino_d2, name)(value, shapes, places, *weighing)

    return call


class _Entry(NamedTuple):
    """All that one operator and its backward need."""

    name: str
    tensors: str  # arguments behind value and spatial_shapes
    option: str  # last argument of the backward
    gradients: int
    check: Callable
    twins: tuple[Callable, Callable]
    fakes: tuple[Callable, Callable]
    backward: Callable


_ENTRIES = (
    _Entry(
        "ms_deform_attn",
        "Tensor sampling_locations, Tensor attention_weights",
        "",
        3,
        _check,
        (ms_deform_attn_pytorch, ms_deform_attn_backward_pytorch),
        (_fake_forward, _fake_backward),
        _backward,
    ),
    _Entry(
        "ms_deform_attn_fused",
        "Tensor reference, Tensor sampling_offsets, Tensor attention_logits",
        ", bool with_reference",
        4,
        _check_fused,
        (ms_deform_attn_fused_pytorch, ms_deform_attn_fused_backward_pytorch),
        (_fake_fused_forward, _fake_fused_backward),
        _fused_backward,
    ),
)


def _register(entry: _Entry) -> None:
    forward, backward = f"dino_d2::{entry.name}", f"dino_d2::{entry.name}_backward"
    arguments = f"Tensor value, SymInt[] spatial_shapes, {entry.tensors}"
    results = ", ".join(["Tensor"] * entry.gradients)
    tags = (torch.Tag.pt2_compliant_tag,)
    torch.library.define(forward, f"({arguments}) -> Tensor", tags=tags)
    torch.library.define(
        backward, f"(Tensor grad_output, {arguments}{entry.option}) -> ({results})", tags=tags
    )
    for op, twin, fake in zip((forward, backward), entry.twins, entry.fakes, strict=True):
        torch.library.impl(op, "CompositeExplicitAutograd", twin)
        torch.library.register_fake(op, fake)
    torch.library.register_autograd(forward, entry.backward, setup_context=_setup_context)
    torch.library.register_autograd(
        backward, _no_second_derivative, setup_context=lambda ctx, inputs, output: None
    )
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        torch.library.impl(forward, key, _autocast(device_type, entry.name, entry.check))


load_native()  # registers the CPU and CUDA kernels; all other devices take the twins
for _entry in _ENTRIES:
    _register(_entry)
