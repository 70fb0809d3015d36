"""Operators that pick or place elements by index: what one gathers, its gradient scatters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.graph.emit import Call, Emitter, dims, rank
from onnxplain.rules import RuleTable

TABLE = RuleTable("indexing")
rule = TABLE.rule

Positions = np.ndarray | ir.Value


def put(
    op: Emitter,
    g: ir.Value,
    positions: Positions,
    axis: int,
    sizes: Sequence[int | ir.Value],
) -> Any:
    """Adjoint of ``Gather(x, positions, axis)`` for an ``x`` of shape ``sizes``.

    Repeated positions accumulate. Known positions avoid the scatter: a run is a Pad, distinct ones
    are a Gather by the inverse permutation. Positions of a computed kind may have any rank, but
    it must be known.
    """
    size = sizes[axis]
    if isinstance(positions, np.ndarray):
        if isinstance(size, int):
            positions = positions % size if size else positions
        if positions.ndim == 0:
            g, positions = op.Unsqueeze(g, [axis]), positions[None]
        count = positions.size
        if positions.ndim == 1 and count and positions[0] >= 0 and np.all(np.diff(positions) == 1):
            first, last = int(positions[0]), int(positions[-1]) + 1
            after = size - last if isinstance(size, int) else op.Sub(size, [last])
            if first == 0 and isinstance(after, int) and after == 0:
                return g
            return op.pad(g, len(sizes), {axis: (first, after)})
        if positions.ndim == 1 and isinstance(size, int) and np.unique(positions).size == count:
            inverse = np.full(size, count, np.int64)
            inverse[positions] = np.arange(count)
            if count < size:
                g = op.pad(g, len(sizes), {axis: (0, 1)})
            return op.Gather(g, op.const(inverse), axis=axis)
        positions = op.const(positions.astype(np.int64))
    others = [k for k in range(len(sizes)) if k != axis]
    if axis:
        inner = list(range(axis, axis + rank(positions)))
        outer = [k for k in range(len(others) + len(inner)) if k not in inner]
        g = op.Transpose(g, perm=inner + outer)
    shape = op.vector(size, *(sizes[k] for k in others))
    total = add_at(op, op.Unsqueeze(positions, [-1]), g, shape)
    if not axis:
        return total
    return op.Transpose(total, perm=[int(k) for k in np.argsort([axis, *others])])


def add_at(op: Emitter, indices: ir.Value, g: ir.Value, shape: ir.Value, **attrs: Any) -> Any:
    """Zeros of a shape, with ``g`` added at indices: of GatherElements if ``axis`` is given, else
    of GatherND."""
    kind = "ScatterElements" if attrs else "ScatterND"

    def scatter(g: ir.Value) -> Any:
        zeros = op.Expand(op.const(0, g.dtype), shape)
        return op.emit(kind, zeros, indices, g, reduction="add", **attrs)

    return _in_single(op, scatter, g)


def _in_single(op: Emitter, function: Callable[..., Any], *values: ir.Value) -> Any:
    """Reduce half precision in single: more exact, and onnxruntime has no half kernel."""
    dtype = values[0].dtype
    if dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return function(*values)
    return op.Cast(function(*(op.Cast(v, to=ir.DataType.FLOAT) for v in values)), to=dtype)


def arange(op: Emitter, size: int | ir.Value) -> Any:
    """0, 1, ..., size - 1 as an int64 vector."""
    if isinstance(size, int):
        return op.const(np.arange(size))
    return vector_of(op.Range(np.int64(0), op.Reshape(size, []), np.int64(1)))


def vector_of(value: ir.Value) -> ir.Value:
    """``value``, known to have one axis."""
    value.shape = ir.Shape([None])
    return value


@rule("Gather")
def gather(op: Emitter, n: Call, g: Any) -> Any:
    x, indices = n.x
    known = n.const(1)
    axis = n.attr("axis") % rank(x)
    return put(op, g, indices if known is None else known, axis, op.sizes(x))


@rule("GatherElements")
def gather_elements(op: Emitter, n: Call, g: Any) -> Any:
    return add_at(op, n.x[1], g, op.shape(n.x[0]), axis=n.attr("axis"))


@rule("GatherND")
def gather_nd(op: Emitter, n: Call, g: Any) -> Any:
    x, indices = n.x
    batch = n.attr("batch_dims")
    if batch:
        # ScatterND has no batch axes: their coordinates become part of the index.
        sizes = op.sizes(indices)
        target = op.vector(*sizes[:-1], 1)
        coordinates = [
            op.Expand(op.Unsqueeze(arange(op, sizes[k]), _all_but(len(sizes), k)), target)
            for k in range(batch)
        ]
        indices = op.Concat(*coordinates, op.Cast(indices, to=ir.DataType.INT64), axis=-1)
    return add_at(op, indices, g, op.shape(x))


def _all_but(count: int, axis: int) -> list[int]:
    return [k for k in range(count) if k != axis]


@rule("ScatterND", "ScatterElements")
def scatter(op: Emitter, n: Call, g: Any) -> Any:
    """PyTorch's conventions: ties of min and max share evenly, factors of zero are exact."""
    (data, indices, updates), y = n.x, n.y[0]
    attrs = n.attrs("axis")
    how = n.attr("reduction") or "none"

    def take(v: ir.Value) -> Any:
        return op.emit(n.node.op_type.replace("Scatter", "Gather"), v, indices, **attrs)

    def place(v: ir.Value, new: ir.Value, how: str) -> Any:
        return op.emit(n.node.op_type, v, indices, new, reduction=how, **attrs)

    if how == "none":
        return lambda: place(g, op.full_like(updates, 0.0), how), None, lambda: take(g)
    if how == "add":
        return g, None, lambda: take(g)
    if how == "mul":
        # Each factor's cotangent is the product of all others, a factor of zero among them or not.
        gone = [op.cast_like(op.Equal(v, 0.0), v) for v in (data, updates)]
        filled = [op.Add(data, gone[0]), op.Add(updates, gone[1])]
        product = _in_single(op, lambda a, b: place(a, b, "mul"), *filled)
        zeros = _in_single(op, lambda a, b: place(a, b, "add"), *gone)

        def others(product: Any, zeros: Any, k: int) -> Any:
            alone = op.Equal(op.Sub(zeros, gone[k]), 0.0)
            return op.Where(alone, op.Div(product, filled[k]), 0.0)

        return (
            lambda: op.Mul(g, others(product, zeros, 0)),
            None,
            lambda: op.Mul(take(g), others(take(product), take(zeros), 1)),
        )
    chosen = [op.cast_like(op.Equal(data, y), g), op.cast_like(op.Equal(updates, take(y)), g)]
    share = op.Div(g, _in_single(op, lambda a, b: place(a, b, "add"), *chosen))
    return lambda: op.Mul(share, chosen[0]), None, lambda: op.Mul(take(share), chosen[1])


@rule("Compress")
def compress(op: Emitter, n: Call, g: Any) -> Any:
    x, condition = n.x
    known = n.const(1)
    positions: Positions
    if known is None:
        positions = vector_of(op.Reshape(op.NonZero(condition), [-1]))
    else:
        positions = np.flatnonzero(known)
    axis = n.attr("axis")
    if axis is not None:
        return put(op, g, positions, axis % rank(x), op.sizes(x))
    static = [d for d in dims(x) if isinstance(d, int)]
    size = math.prod(static) if len(static) == rank(x) else op.Reshape(op.Size(x), [1])
    return op.reshape_like(put(op, g, positions, 0, [size]), x)


@rule("OneHot")
def one_hot(op: Emitter, n: Call, g: Any) -> Any:
    indices, depth, _ = n.x
    hot = op.OneHot(indices, depth, op.const([0, 1], g.dtype), axis=n.attr("axis"))
    on = op.ReduceSum(op.Mul(g, hot), keepdims=0)
    off = op.ReduceSum(op.Mul(g, op.Sub(1.0, hot)), keepdims=0)
    return None, None, op.Concat(op.Reshape(off, [1]), op.Reshape(on, [1]), axis=0)
