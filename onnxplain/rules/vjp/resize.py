"""Resize is linear in its data and separable: the gradient multiplies by transposed weights.

The weights of an axis are what the same Resize makes of an identity matrix, so that every mode,
rounding and border rule, with static or computed sizes, is the runtime's own. They don't depend on
the data: the runtime folds them where the sizes are known.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.graph.emit import Call, Emitter, dims, rank
from onnxplain.rules import RuleTable

TABLE = RuleTable("resize")
rule = TABLE.rule

_ATTRIBUTES = (
    "antialias",
    "coordinate_transformation_mode",
    "cubic_coeff_a",
    "exclude_outside",
    "keep_aspect_ratio_policy",
    "mode",
    "nearest_mode",
)


@rule("Resize")
def resize(op: Emitter, n: Call, g: Any) -> Any:
    x = n.x[0]
    axes = [int(a) % rank(x) for a in n.attr("axes") or range(rank(x))]
    changed = [k for k, axis in enumerate(axes) if not _unchanged(n, k, axis)]
    factors = {axes[k]: _repeats(n, k, axes[k]) for k in changed}
    if factors and all(factors.values()) and min(factors) >= 2 and rank(x) <= 5:
        # Every element is repeated: sum the blocks.
        block = [factors.get(axis) or 1 for axis in range(2, rank(x))]
        pooled = op.AveragePool(g, kernel_shape=block, strides=block)
        return op.Mul(pooled, float(math.prod(block)))
    for k in changed:
        g = _along(op, g, _weights(op, n, g, axes, changed, k), axes[k], rank(x))
    return g


def _unchanged(n: Call, k: int, axis: int) -> bool:
    """Whether an axis is surely copied as it is."""
    roi, scales = n.const(1), n.const(2)
    crops = n.attr("coordinate_transformation_mode") == "tf_crop_and_resize"
    if crops and (roi is None or roi[k] != 0 or roi[len(roi) // 2 + k] != 1):
        return False
    if scales is not None and scales.size:
        return bool(scales[k] == 1)
    before, after = dims(n.x[0])[axis], dims(n.y[0])[axis]
    return n.has(3) and before is not None and before == after


def _repeats(n: Call, k: int, axis: int) -> int:
    """How often an axis repeats each element, 0 where it does something else."""
    rounding = {"half_pixel": "round", "pytorch_half_pixel": "round", "asymmetric": "floor"}
    wanted = rounding.get(n.attr("coordinate_transformation_mode"))
    if n.attr("mode") != "nearest" or not wanted or not n.attr("nearest_mode").startswith(wanted):
        return 0
    scales = n.const(2)
    if scales is not None and scales.size:
        return int(scales[k]) if scales[k] == int(scales[k]) else 0
    before, after = dims(n.x[0])[axis], dims(n.y[0])[axis]
    known = isinstance(before, int) and isinstance(after, int) and before and after % before == 0
    return after // before if known and n.attr("keep_aspect_ratio_policy") == "stretch" else 0  # type: ignore[operator]


def _weights(op: Emitter, n: Call, g: ir.Value, axes: list[int], changed: list[int], k: int) -> Any:
    """The matrix of an axis: input positions by output positions."""
    x = n.x[0]
    size = op.dim(x, axes[k])
    # A policy looks at all axes to choose one scale, so all must be there.
    together = [k] if n.attr("keep_aspect_ratio_policy") == "stretch" else changed
    here = together.index(k)
    # Weights need more than half precision, and onnxruntime's Resize takes single.
    zero = np.zeros(1, np.float64 if g.dtype == ir.DataType.DOUBLE else np.float32)
    eye = op.EyeLike(op.ConstantOfShape(op.vector(size, size), value=ir.tensor(zero)))
    # Two leading axes and at least two more: onnxruntime takes no fewer for every mode.
    missing = [1] * (2 - len(together))
    inner = [1] * len(together)
    eye = op.Reshape(eye, op.vector(size, 1, *missing, *inner[:here], size, *inner[here + 1 :]))
    full = [op.dim(x, axes[j]) for j in together]
    basis = op.Expand(eye, op.vector(size, 1, *missing, *full))
    first = 2 + len(missing)

    def part(index: int, *offsets: int) -> Any:
        positions = [offset + j for offset in offsets for j in together]
        if not n.has(index):
            return None
        known = n.const(index)
        if known is not None:
            return op.const(known[positions]) if known.size else None
        return op.Gather(n.x[index], positions)

    crop = n.attr("coordinate_transformation_mode") == "tf_crop_and_resize"
    resized = op.Resize(
        basis,
        part(1, 0, len(axes)) if crop else None,
        part(2, 0),
        part(3, 0),
        axes=list(range(first, first + len(together))),
        extrapolation_value=0.0,
        **n.attrs(*_ATTRIBUTES),
    )
    others = [1, *range(2, first), *(first + j for j in range(len(together)) if j != here)]
    for axis in reversed(others):
        resized = op.Gather(resized, np.int64(0), axis=axis)
    return op.cast_like(resized, g)


def _along(op: Emitter, g: ir.Value, weights: ir.Value, axis: int, count: int) -> Any:
    """Sum ``g`` over ``axis`` against the second axis of ``weights``."""
    if axis == count - 2:
        return op.MatMul(weights, g)
    back = op.Transpose(weights, perm=[1, 0])
    if axis == count - 1:
        return op.MatMul(g, back)
    swap = list(range(count))
    swap[axis], swap[-1] = swap[-1], swap[axis]
    return op.Transpose(op.MatMul(op.Transpose(g, perm=swap), back), perm=swap)
