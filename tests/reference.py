"""Slow literal twins: each follows its definition step by step, without any shared code."""

import math

import numpy as np


def ms_deform_attn_loop(value, shapes, locations, weights, grad_output=None):
    """Multi-scale deformable attention, one scalar at a time, in float64.

    Arrays as in `dino_d2.ops.ms_deform_attn`. Returns the output, or with `grad_output` the tuple
    (output, grad_value, grad_locations, grad_weights).
    """
    value, locations, weights = (np.asarray(a, np.float64) for a in (value, locations, weights))
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = np.zeros((batch, queries, heads, channels))
    grad_value, grad_locations, grad_weights = map(np.zeros_like, (value, locations, weights))
    with np.errstate(invalid="ignore", over="ignore"):
        for b, q, h, level, p in np.ndindex(batch, queries, heads, len(shapes), points):
            height, width = shapes[level]
            start = sum(a * b for a, b in shapes[:level])
            x = locations[b, q, h, level, p, 0] * width - 0.5
            y = locations[b, q, h, level, p, 1] * height - 0.5
            if not (-1 < x < width and -1 < y < height):
                continue
            weight = weights[b, q, h, level, p]
            x0, y0 = math.floor(x), math.floor(y)
            dots = {}  # output gradient times value, by corner; 0 off the map
            for row, column in np.ndindex(2, 2):
                dots[row, column] = 0.0
                if not (0 <= y0 + row < height and 0 <= x0 + column < width):
                    continue
                bilinear = (1 - abs(y0 + row - y)) * (1 - abs(x0 + column - x))
                token = start + (y0 + row) * width + x0 + column
                output[b, q, h] += weight * bilinear * value[b, token, h]
                if grad_output is None:
                    continue
                gradient = np.asarray(grad_output, np.float64).reshape(output.shape)[b, q, h]
                dots[row, column] = float(np.dot(gradient, value[b, token, h]))
                grad_value[b, token, h] += weight * bilinear * gradient
                grad_weights[b, q, h, level, p] += bilinear * dots[row, column]
            # The derivative of a bilinear interpolation of the dots.
            along_x = (1 - (y - y0)) * (dots[0, 1] - dots[0, 0]) + (y - y0) * (
                dots[1, 1] - dots[1, 0]
            )
            along_y = (1 - (x - x0)) * (dots[1, 0] - dots[0, 0]) + (x - x0) * (
                dots[1, 1] - dots[0, 1]
            )
            grad_locations[b, q, h, level, p] = weight * width * along_x, weight * height * along_y
    output = output.reshape(batch, queries, heads * channels)
    return output if grad_output is None else (output, grad_value, grad_locations, grad_weights)
