"""Pooling: windows reduced to one number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.graph.emit import Call, Emitter, dims
from onnxplain.rules import RuleTable
from onnxplain.rules.vjp.indexing import add_at
from onnxplain.rules.vjp.window import Sizes, interleave, known, phases_of, spread, window

TABLE = RuleTable("pooling")
rule = TABLE.rule

_SMALL = 8192
"""Values per example of a maximum pool up to which indices are the faster way back: there, nodes
cost more than what they compute. A net with pools of 6272 and 3136 values takes about half the time
at one row and no more at 256; a pool of 16384 values takes longer."""


@rule("MaxPool")
def max_pool(op: Emitter, n: Call, g: Any) -> Any:
    """The cotangent of a window goes to the first of its maxima in row-major order.

    That is the first row with the maximum, and in it the first column with the row's: a pool of
    many axes is one pool after the other, the last axis first. To compare slices along one axis at
    a time takes half the time of indices, for which onnxruntime leaves its fast kernel, but many
    nodes.
    """
    x, kernel = n.x[0], n.attr("kernel_shape")
    at, sizes = window(op, n, kernel), known(dims(x)[1:])
    tail = at.tail(x)
    if tail is None or sizes is None or math.prod(sizes) <= _SMALL:
        return _to_indices(op, n, g)
    if any(t >= k for t, k in zip(tail, kernel, strict=True)):
        return _to_indices(op, n, g)  # onnxruntime pads by less than a window
    begin: Sizes = at.begin  # type: ignore[assignment]
    lanes = [
        _Lane(*lane) for lane in zip(kernel, at.strides, at.dilations, begin, tail, strict=True)
    ]
    pooled = [(x, list(sizes))]
    for axis in reversed(range(len(lanes))):
        (value, shape), lane = pooled[-1], lanes[axis]
        value = lane.pool(op, value, axis, len(lanes)) if axis else n.y[0]
        count = lane.count(shape[axis + 1])
        pooled.append((value, [*shape[: axis + 1], count, *shape[axis + 2 :]]))
    for axis, lane in enumerate(lanes):
        (y, shape), (x, before) = pooled.pop(), pooled[-1]
        g = lane.unpool(op, g, x, y, before, shape, axis)
    return g


@dataclass(frozen=True)
class _Lane:
    """A maximum pool along one axis."""

    kernel: int
    stride: int
    dilation: int
    begin: int
    tail: int

    def count(self, size: int) -> int:
        """The number of windows on an axis of this size."""
        extent = (self.kernel - 1) * self.dilation + 1
        return (size + self.begin + self.tail - extent) // self.stride + 1

    def pool(self, op: Emitter, x: ir.Value, axis: int, axes: int) -> ir.Value:
        """The pool of ``x`` along one of its spatial axes."""

        def along(here: int, elsewhere: int) -> list[int]:
            return [here if a == axis else elsewhere for a in range(axes)]

        y: ir.Value = op.MaxPool(
            x,
            kernel_shape=along(self.kernel, 1),
            strides=along(self.stride, 1),
            dilations=along(self.dilation, 1),
            pads=along(self.begin, 0) + along(max(self.tail, 0), 0),
        )
        return y

    def unpool(
        self,
        op: Emitter,
        g: ir.Value,
        x: ir.Value,
        y: ir.Value,
        before: list[int],
        after: list[int],
        axis: int,
    ) -> ir.Value:
        """The cotangent of ``x`` [N, *before] from that of ``y`` [N, *after]."""
        axis += 1
        phases = phases_of(op, x, axis, before, self.stride, np.nan)  # equal to no maximum
        steps = -(-before[axis] // self.stride)
        found: dict[int, ir.Value] = {}
        for tap in range(self.kernel):
            ahead, phase = divmod(tap * self.dilation - self.begin, self.stride)
            shift = [-ahead, ahead + after[axis] - steps]
            share = g
            if tap < self.kernel - 1:  # what no earlier position took is left to the last
                value = _shifted(op, phases[phase], 1 + len(before), shift, axis, np.nan)
                share = op.Mul(g, op.cast_like(op.Equal(value, y), g))
                g = op.Sub(g, share)
            share = _shifted(op, share, 1 + len(before), [-s for s in shift], axis, 0.0)
            found[phase] = op.Add(found[phase], share) if phase in found else share
        shape = [*before[:axis], steps, *before[axis + 1 :]]
        if len(found) < self.stride:  # positions that no window reads
            nothing = op.Expand(op.const(0.0, g.dtype), op.Shape(phases[0]))
            found = {p: found.get(p, nothing) for p in range(self.stride)}
        parts = [found[p] for p in range(self.stride)]
        return interleave(op, parts, axis, shape, before[axis])


def _shifted(
    op: Emitter, x: ir.Value, count: int, pads: list[int], axis: int, fill: float
) -> ir.Value:
    return op.pad(x, count, {axis + 1: (pads[0], pads[1])}, fill) if any(pads) else x


def _to_indices(op: Emitter, n: Call, g: ir.Value) -> ir.Value:
    """The gradient of MaxPool in few nodes, for any sizes and paddings."""
    x = n.x[0]
    names = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
    _, chosen = op.MaxPool(x, _outputs=2, **n.attrs(*names))
    size = op.Reshape(op.Size(x), [1])  # indices count over the whole tensor
    return op.reshape_like(add_at(op, op.Unsqueeze(chosen, [-1]), g, size), x)


@rule("AveragePool")
def average_pool(op: Emitter, n: Call, g: Any) -> Any:
    return _spread_evenly(op, n, _average(op, n, g))


@rule("LpPool")
def lp_pool(op: Emitter, n: Call, g: Any) -> Any:
    x, y, p = n.x[0], n.y[0], n.attr("p")
    return op.Mul(_spread_evenly(op, n, _over_norm(op, g, y, p)), _power(op, x, p))


@rule("GlobalLpPool")
def global_lp_pool(op: Emitter, n: Call, g: Any) -> Any:
    p = n.attr("p")
    return op.Mul(_over_norm(op, g, n.y[0], p), _power(op, n.x[0], p))


@rule("GlobalAveragePool")
def global_average_pool(op: Emitter, n: Call, g: Any) -> Any:
    x = n.x[0]
    sizes = known(dims(x)[2:])
    if sizes is not None:
        return op.expand_like(op.Mul(g, 1 / math.prod(sizes)), x)
    count = op.cast_like(op.ReduceProd(op.Shape(x, start=2), keepdims=0), x)
    return op.expand_like(op.Div(g, count), x)


@rule("GlobalMaxPool")
def global_max_pool(op: Emitter, n: Call, g: Any) -> Any:
    x = n.x[0]
    flat = op.Flatten(x, axis=2)
    chosen = op.ArgMax(flat, axis=1)  # the first of equal maxima
    count = op.ReduceProd(op.Shape(x, start=2), keepdims=0)
    places = op.Range(op.const(np.array(0)), count, op.const(np.array(1)))
    mask = op.reshape_like(op.cast_like(op.Equal(chosen, places), x), x)
    return op.Mul(g, mask)


def _spread_evenly(op: Emitter, n: Call, g: ir.Value) -> ir.Value:
    """Every value of ``g`` [like y] added to each position of its window."""
    x, kernel = n.x[0], n.attr("kernel_shape")
    at, channels = window(op, n, kernel), dims(x)[1]
    if isinstance(channels, int):
        ones = op.const(np.ones((channels, 1, *kernel)), x.dtype)
        return spread(op, g, ones, at, x, group=channels)
    # Channels as examples of one channel.
    each = [_channels_apart(op, *pair) for pair in ((g, n.y[0]), (x, x))]
    ones = op.const(np.ones((1, 1, *kernel)), x.dtype)
    return op.reshape_like(spread(op, each[0], ones, at, each[1], group=1), x)


def _channels_apart(op: Emitter, value: ir.Value, like: ir.Value) -> ir.Value:
    shape = op.Concat(op.const(np.array([-1, 1])), op.Shape(like, start=2), axis=0)
    out = op.Reshape(value, shape)
    out.shape = ir.Shape((None, 1, *dims(like)[2:]))
    return out


def _average(op: Emitter, n: Call, g: ir.Value) -> ir.Value:
    """``g`` divided by the number of positions that each window averages."""
    x, y, kernel = n.x[0], n.y[0], n.attr("kernel_shape")
    at, axes = window(op, n, kernel), len(kernel)
    include, ceil = n.attr("count_include_pad"), n.attr("ceil_mode")
    fixed = isinstance(at.begin, tuple) and isinstance(at.end, tuple)
    if not ceil and (include or (fixed and not any((*at.begin, *at.end)))):  # type: ignore[misc]
        return op.Mul(g, 1 / math.prod(kernel))
    # Count ones: the input's, the padding's if it is included, none behind that.
    corner = op.const(np.zeros(2, np.int64))
    sizes = op.const(np.array(s)) if (s := known(dims(x)[2:])) else op.Shape(x, start=2)
    one, zero = op.const(1, x.dtype), op.const(0, x.dtype)
    ones = op.Expand(one, op.Concat(op.const(np.ones(2, np.int64)), sizes, axis=0))
    begin, end = (op.const(np.array(p)) if isinstance(p, tuple) else p for p in (at.begin, at.end))
    pads = op.Concat(corner, begin, corner, end, axis=0)
    ones = op.Pad(ones, pads, one if include else zero)
    if ceil:
        ones = op.Pad(ones, [0] * (4 + axes) + [s - 1 for s in at.strides], zero)
    kernel = op.const(np.ones((1, 1, *kernel)), x.dtype)
    count = op.Conv(ones, kernel, strides=at.strides, dilations=at.dilations)
    if ceil:
        stop = op.vector(*op.sizes(y)[2:])
        count = op.Slice(count, [0] * axes, stop, list(range(2, 2 + axes)))
    return op.Div(g, count)


def _over_norm(op: Emitter, g: ir.Value, y: ir.Value, p: int) -> ir.Value:
    """``g * y ** (1 - p)``, zero where the norm ``y`` is."""
    if p == 1:
        return g
    empty = op.Equal(y, 0)
    safe = op.Where(empty, op.const(1, y.dtype), y)
    over = op.Div(g, safe if p == 2 else op.Pow(safe, float(p - 1)))
    return op.Where(empty, op.const(0, y.dtype), over)


def _power(op: Emitter, x: ir.Value, p: int) -> ir.Value:
    """``|x| ** (p - 1) * sign(x)``, the derivative of ``|x| ** p / p``."""
    if p == 2:
        return x
    return op.Sign(x) if p == 1 else op.Mul(op.Sign(x), op.Pow(op.Abs(x), float(p - 1)))
