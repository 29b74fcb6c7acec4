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


def ms_deform_attn_fused_loop(value, shapes, reference, offsets, logits, grad_output):
    """The fused operator: arithmetic one scalar at a time around `ms_deform_attn_loop`.

    Returns (output, grad_value, grad_reference, grad_offsets, grad_logits).
    """
    reference, offsets, logits = (np.asarray(a, np.float64) for a in (reference, offsets, logits))
    part = 0.5 / max(offsets.shape[4], 1)
    boxes = reference.shape[-1] == 4
    locations, weights = np.zeros(offsets.shape), np.zeros(logits.shape)
    units = np.zeros(offsets.shape)  # pixels or parts of the box, relative to the map
    with np.errstate(invalid="ignore", over="ignore"):
        for b, q, h, level, p, axis in np.ndindex(*offsets.shape):
            size = shapes[level][1 - axis]
            unit = reference[b, q, level, 2 + axis] * part if boxes else 1 / size
            units[b, q, h, level, p, axis] = unit
            offset = offsets[b, q, h, level, p, axis]
            locations[b, q, h, level, p, axis] = reference[b, q, level, axis] + offset * unit
        for b, q, h in np.ndindex(*logits.shape[:3]):
            if logits[b, q, h].size:
                powers = np.exp(logits[b, q, h] - logits[b, q, h].max())
                weights[b, q, h] = powers / powers.sum()
        results = ms_deform_attn_loop(value, shapes, locations, weights, grad_output)
        output, grad_value, grad_locations, grad_weights = results
        grad_reference, grad_offsets = np.zeros(reference.shape), np.zeros(offsets.shape)
        for b, q, h, level, p, axis in np.ndindex(*offsets.shape):
            gradient = grad_locations[b, q, h, level, p, axis]
            if gradient == 0:
                continue  # perhaps outside, where offset or box may be infinite
            grad_offsets[b, q, h, level, p, axis] = gradient * units[b, q, h, level, p, axis]
            grad_reference[b, q, level, axis] += gradient
            if boxes:
                along = gradient * offsets[b, q, h, level, p, axis] * part
                grad_reference[b, q, level, 2 + axis] += along
        mean = (weights * grad_weights).sum((3, 4), keepdims=True)
        grad_logits = weights * (grad_weights - mean)
    return output, grad_value, grad_reference, grad_offsets, grad_logits


def attention_loop(query, key, value, num_heads, blocked):
    """softmax(q k / sqrt(d)) v for (Q, D'), (S, D'), (S, D) and (Q, S); heads lie side by side."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    per_key, per_value = key.shape[1] // num_heads, value.shape[1] // num_heads
    output = np.zeros((len(query), value.shape[1]))
    for q, h in np.ndindex(len(query), num_heads):
        part = slice(h * per_key, (h + 1) * per_key)
        weights = {}
        for s in range(len(key)):
            if not blocked[q][s]:
                dot = sum(query[q, part] * key[s, part])
                weights[s] = math.exp(dot / math.sqrt(per_key))
        part = slice(h * per_value, (h + 1) * per_value)
        for s, weight in weights.items():
            output[q, part] += weight / sum(weights.values()) * value[s, part]
    return output


def generalized_iou_loop(boxes_a, boxes_b, eps=0.0):
    """(A, 4) and (B, 4) cxcywh -> (A, B): Rezatofighi et al., algorithm 1."""
    result = np.zeros((len(boxes_a), len(boxes_b)))
    for i, j in np.ndindex(*result.shape):
        overlap, hull = 1.0, 1.0
        for axis in range(2):
            (low_a, high_a), (low_b, high_b) = (
                (box[axis] - box[axis + 2] / 2, box[axis] + box[axis + 2] / 2)
                for box in (boxes_a[i], boxes_b[j])
            )
            overlap *= max(0.0, min(high_a, high_b) - max(low_a, low_b))
            hull *= max(high_a, high_b) - min(low_a, low_b)
        area_a, area_b = boxes_a[i][2] * boxes_a[i][3], boxes_b[j][2] * boxes_b[j][3]
        union = area_a + area_b - overlap
        result[i, j] = overlap / (union + eps) - (hull - union) / (hull + eps)
    return result


def sine_loop(angle, dim, temperature):
    """A number -> (dim,): sine on even channels, cosine on odd ones."""
    code = []
    for k in range(dim):
        phase = angle / temperature ** (2 * (k // 2) / dim)
        code.append(math.sin(phase) if k % 2 == 0 else math.cos(phase))
    return np.array(code)


def position_encoding_loop(padding_mask, embed_dim, temperature, offset):
    """(B, h, w) -> (B, D, h, w): the share of the image above and left of each pixel."""
    batch, height, width = padding_mask.shape
    encoding = np.zeros((batch, embed_dim, height, width))
    for b, i, j in np.ndindex(batch, height, width):
        column, row = ~padding_mask[b, :, j], ~padding_mask[b, i, :]
        y = (column[: i + 1].sum() + offset) / (column.sum() + 1e-6) * 2 * math.pi
        x = (row[: j + 1].sum() + offset) / (row.sum() + 1e-6) * 2 * math.pi
        parts = [sine_loop(angle, embed_dim // 2, temperature) for angle in (y, x)]
        encoding[b, :, i, j] = np.concatenate(parts)
    return encoding


def focal_loss_loop(logits, scores, alpha, gamma):
    """-alpha_t (1 - p_t)^gamma log(p_t) for arrays of any equal shape."""
    losses = np.zeros(logits.shape)
    for index in np.ndindex(*logits.shape):
        p = 1 / (1 + math.exp(-logits[index]))
        p_t, alpha_t = (p, alpha) if scores[index] == 1 else (1 - p, 1 - alpha)
        losses[index] = -alpha_t * (1 - p_t) ** gamma * math.log(p_t)
    return losses


def rotary_window_attention_loop(x, block, window):
    """Attention of an `EVA02Block` on its normalised input, window by window.

    Args:
        x: (h, w, D) array.
        block: weights by name, as arrays.
        window: patches per side, or None for a single one of the whole map.
    """
    height, width, channels = x.shape
    size = (window, window) if window else (height, width)
    output = np.zeros_like(x)
    for top in range(0, height, size[0]):
        for left in range(0, width, size[1]):
            tokens = np.zeros((*size, channels))
            inside = x[top : top + size[0], left : left + size[1]]
            rows, columns = inside.shape[:2]
            tokens[:rows, :columns] = inside
            attended = _rotary_attention_loop(tokens, block)
            output[top : top + rows, left : left + columns] = attended[:rows, :columns]
    return output


def _rotary_attention_loop(x, block, dim=64):
    """Every token (h, w, D) attends to all, one query of one head of `dim` channels at a time."""
    size, channels = x.shape[:2], x.shape[2]
    q, k, v = (
        x @ block[f"attn.{n}_proj.weight"].T + block.get(f"attn.{n}_proj.bias", 0) for n in "qkv"
    )
    mixed = np.zeros_like(x)
    for start in range(0, channels, dim):
        head = slice(start, start + dim)
        for place in np.ndindex(size):
            query = _turn(q[place][head], place, size)
            scores = np.zeros(size)
            for other in np.ndindex(size):
                scores[other] = query @ _turn(k[other][head], other, size) / math.sqrt(dim)
            weights = np.exp(scores - scores.max())
            mixed[place][head] = np.einsum("hw,hwd->d", weights / weights.sum(), v[..., head])
    return mixed @ block["attn.proj.weight"].T + block["attn.proj.bias"]


def _turn(vector, place, size):
    """Pairs of channels turned by angles: the first half by the row, the second by the column."""
    result = vector.copy()
    half = len(vector) // 2
    for axis in (0, 1):
        position = place[axis] / size[axis] * 16
        for pair in range(half // 2):
            angle = position / 10000 ** (2 * pair / half)
            i = axis * half + 2 * pair
            a, b = vector[i], vector[i + 1]
            result[i] = a * math.cos(angle) - b * math.sin(angle)
            result[i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return result


def federated_classes_loop(weights, labels, num_classes, rng):
    """The classes of the objects, and others drawn one after the other by their weights."""
    chosen = sorted(set(labels))
    while len(chosen) < num_classes:
        left = [k for k, weight in enumerate(weights) if weight > 0 and k not in chosen]
        if not left:
            break
        chances = np.array([weights[k] for k in left])
        chosen.append(int(rng.choice(left, p=chances / chances.sum())))
    return set(chosen)
