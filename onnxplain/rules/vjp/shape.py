"""Operators that rearrange elements: the gradient is rearranged back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import NoRuleError
from onnxplain.graph.emit import Call, Emitter, dims, rank
from onnxplain.rules import RuleTable
from onnxplain.rules.vjp.indexing import Positions, arange, put, vector_of

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
    return op.Split(g, op.vector(*(op.dim(x, axis) for x in n.x)), axis=axis, _outputs=len(n.x))


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
    parts: list[int | ir.Value] = []
    axes: list[int] = []
    for axis, size in enumerate(op.sizes(x)):
        if known is None or known[axis] != 1:
            axes.append(len(parts))
            parts.append(_item(op, repeats, axis) if known is None else int(known[axis]))
        parts.append(size)
    if not axes:
        return g
    return op.ReduceSum(op.Reshape(g, op.vector(*parts), allowzero=1), axes, keepdims=0)


@rule("Slice")
def slice_(op: Emitter, n: Call, g: Any) -> Any:
    x, y = n.x[0], n.y[0]
    starts, ends, steps = n.const(1), n.const(2), n.const(4)
    known = starts is not None and ends is not None and (steps is not None or not n.has(4))
    sizes = op.sizes(y)
    for k, axis in enumerate(_axes(n)):
        sizes[axis] = size = op.sizes(x)[axis]
        positions: Positions
        if known and isinstance(size, int):
            assert starts is not None
            assert ends is not None
            step = 1 if steps is None else int(steps[k])
            positions = np.arange(size)[_python_slice(int(starts[k]), int(ends[k]), step, size)]
        else:
            bounds = [_item(op, n.x[i], k) if n.has(i) else None for i in (1, 2, 4)]
            positions = vector_of(op.Slice(arange(op, size), *bounds[:2], None, bounds[2]))
        g = put(op, g, positions, axis, sizes)
    return g


def _python_slice(start: int, end: int, step: int, size: int) -> slice:
    """The standard's clamping, which differs from Python's for a negative step."""
    low, high = (0, size) if step > 0 else (-1, size - 1)
    start = min(max(start + size if start < 0 else start, 0), high)
    end = min(max(end + size if end < 0 else end, low), high)
    return slice(start, None if end < 0 else end, step)


@rule("Pad")
def pad(op: Emitter, n: Call, g: Any) -> Any:
    x, pads = n.x[:2]
    axes = _axes(n)
    known = n.const(1)
    if n.attr("mode") == "constant":
        inner = _crop(op, g, pads if known is None else known, axes, rank(x))
        return (
            inner,
            None,
            lambda: op.reshape_like(
                op.Sub(op.ReduceSum(g, keepdims=0), op.ReduceSum(inner, keepdims=0)), n.x[2]
            ),
        )
    sizes = op.sizes(n.y[0])
    for k, axis in enumerate(axes):
        ends = (k, k + len(axes))
        sizes[axis] = size = op.sizes(x)[axis]
        if known is None or any(known[end] for end in ends):
            amounts = op.vector(*(_item(op, pads, end) for end in ends))
            source = op.Pad(arange(op, size), amounts, mode=n.attr("mode"))
            g = put(op, g, vector_of(source), axis, sizes)
    return g


def _crop(op: Emitter, g: Any, pads: Positions, axes: list[int], of: int) -> Any:
    """Take off what a constant Pad added, and fill with zeros what it cropped."""
    count = len(axes)
    if isinstance(pads, ir.Value):
        added = op.Max(pads, np.int64(0))
        low, high = op.Slice(added, [0], [count]), op.Slice(added, [count], [2 * count])
        g = op.Slice(g, low, op.Sub(op.Gather(op.Shape(g), axes), high), axes)
        cropped = op.Max(op.Neg(pads), np.int64(0))
        each = [op.Slice(cropped, [k], [k + 1]) for k in range(2 * count)]
        return op.pad(g, of, {a: (each[k], each[k + count]) for k, a in enumerate(axes)})
    if (added := np.maximum(pads, 0)).any():
        stops = np.where(added[count:] > 0, -added[count:], np.iinfo(np.int64).max)
        g = op.Slice(g, added[:count], stops, axes)
    lost = np.maximum(-pads, 0).tolist()
    ends = {a: (lost[k], lost[k + count]) for k, a in enumerate(axes)}
    return op.pad(g, of, ends) if any(lost) else g


@rule("DepthToSpace")
def depth_to_space(op: Emitter, n: Call, g: Any) -> Any:
    x, block = n.x[0], n.attr("blocksize")
    back = op.SpaceToDepth(g, blocksize=block)
    if n.attr("mode") == "DCR":
        return back
    # SpaceToDepth puts the block in front of the channels, CRD behind them.
    batch, channels, *space = op.sizes(x)
    depth = channels // block**2 if isinstance(channels, int) else op.Div(channels, [block**2])
    apart = op.Reshape(back, op.vector(batch, block**2, depth, *space), allowzero=1)
    return op.reshape_like(op.Transpose(apart, perm=[0, 2, 1, 3, 4]), x)


@rule("SpaceToDepth")
def space_to_depth(op: Emitter, n: Call, g: Any) -> Any:
    return op.DepthToSpace(g, blocksize=n.attr("blocksize"), mode="DCR")


@rule("Trilu")
def trilu(op: Emitter, n: Call, g: Any) -> Any:
    return op.Trilu(g, n.x[1] if n.has(1) else None, upper=n.attr("upper"))


@rule("ReverseSequence")
def reverse_sequence(op: Emitter, n: Call, g: Any) -> Any:
    return op.ReverseSequence(g, n.x[1], **n.attrs("batch_axis", "time_axis"))


def _item(op: Emitter, vector: ir.Value, index: int) -> Any:
    """One element of an integer vector, as a vector."""
    return op.Slice(vector, [index], [index + 1])


def _axes(n: Call) -> list[int]:
    """The axes that a Slice or a Pad speaks of: its axes input, or the leading ones."""
    total = rank(n.x[0])
    if not n.has(3):
        count = dims(n.x[1])[0] if n.node.op_type == "Slice" else total
        if not isinstance(count, int):
            raise NoRuleError(
                f"{n.node.op_type} (node '{n.node.name}') has no axes and an unknown number of "
                "bounds, so its derivative can't be written; simplify the model first"
            )
        return list(range(count))
    axes = n.const(3)
    if axes is None:
        raise NoRuleError(
            f"{n.node.op_type} (node '{n.node.name}') computes its axes at run time, so its "
            "derivative can't be written; fold constants of the model first, or use a "
            "perturbation method, which needs no gradient"
        )
    return [int(a) % total for a in axes]
