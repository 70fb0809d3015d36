"""Operators that rearrange elements: the gradient is rearranged back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import NoRuleError
from onnxplain.graph.emit import Call, Emitter, const_array, dims, rank
from onnxplain.rules import RuleTable
from onnxplain.rules.vjp.indexing import add_at

TABLE = RuleTable("shape")
rule = TABLE.rule


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(op: Emitter, n: Call, g: Any) -> Any:
    return op.reshape_like(g, n.x[0])


@rule("Transpose")
def transpose(op: Emitter, n: Call, g: Any) -> Any:
    perm = n.attr("perm")
    return op.Transpose(g, perm=None if perm is None else [int(k) for k in np.argsort(perm)])


@rule("Concat")
def concat(op: Emitter, n: Call, g: Any) -> Any:
    if len(n.x) == 1:
        return g
    axis = n.attr("axis")
    return op.Split(g, op.join(*(op.dim(x, axis) for x in n.x)), axis=axis, _outputs=len(n.x))


@rule("Split")
def split(op: Emitter, n: Call, *g: Any) -> Any:
    return op.Concat(*g, axis=n.attr("axis"))


@rule("Expand", broadcasts=True)
def expand(op: Emitter, n: Call, g: Any) -> Any:
    return g


@rule("Tile")
def tile(op: Emitter, n: Call, g: Any) -> Any:
    x, repeats = n.x
    known = n.const(1)
    parts: list[ir.Value | int] = []
    axes = []
    for axis in range(rank(x)):
        if known is None or known[axis] != 1:
            axes.append(len(parts))
            parts.append(op.Slice(repeats, [axis], [axis + 1]) if known is None else known[axis])
        parts.append(op.dim(x, axis))
    if not axes:
        return g
    return op.ReduceSum(op.Reshape(g, op.join(*parts), allowzero=1), axes, keepdims=0)


@rule("Slice")
def slice_(op: Emitter, n: Call, g: Any) -> Any:
    x = n.x[0]
    bounds = [n.const(i) for i in (1, 2, 4)]
    axes = _axes(n, 3, dims(n.x[1])[0])
    computed: list[tuple[int, ir.Value]] = []
    pads: dict[int, tuple[int, int]] = {}
    for k, axis in enumerate(axes):
        size = dims(x)[axis]
        start, end, step = (1 if b is None else int(b[k]) for b in bounds)
        if bounds[0] is None or bounds[1] is None or (n.has(4) and bounds[2] is None):
            computed.append((axis, _sliced(op, n, k, axis)))
        elif not isinstance(size, int):
            if start == 0 and step == 1 and end >= np.iinfo(np.int32).max:
                continue
            computed.append((axis, _sliced(op, n, k, axis)))
        elif step == 1:
            low, high = (min(max(b + size if b < 0 else b, 0), size) for b in (start, end))
            pads[axis] = (low, size - max(low, high))
        else:
            g = _spread(op, g, axis, size, start, end, step)
    for axis, indices in computed:
        g = add_at(op, g, indices, _partial(op, n, axis, ...), axis)
    return g
