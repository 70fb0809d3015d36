"""Reductions and running sums. Axes are an optional input: constant, computed, empty or absent."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import onnx_ir as ir

from onnxplain.graph.emit import Call, Emitter, dims, rank
from onnxplain.rules import RuleTable

TABLE = RuleTable("reduction")
rule = TABLE.rule


def _restore(op: Emitter, n: Call, reduced: Any) -> Any:
    """A value of the output's shape, so that it broadcasts against the input."""
    if n.attr("keepdims") or not n.has(1):
        return reduced  # without axes it is a scalar, or nothing was reduced
    restored = op.Unsqueeze(reduced, n.x[1])
    if n.const(1) is None:
        # Shape inference gives up on computed axes.
        restored.shape = ir.Shape([None] * rank(n.x[0]))
    return restored


def _again(op: Emitter, n: Call, op_type: str, value: Any) -> Any:
    """Another reduction over the same axes, into the shape of the output."""
    attrs = n.attrs("keepdims", "noop_with_empty_axes")
    reduced = op.emit(op_type, value, n.x[1] if n.has(1) else None, **attrs)
    reduced.shape = n.y[0].shape
    return reduced


@rule("ReduceSum")
def reduce_sum(op: Emitter, n: Call, g: Any) -> Any:
    return op.expand_like(_restore(op, n, g), n.x[0])


@rule("ReduceMean")
def reduce_mean(op: Emitter, n: Call, g: Any) -> Any:
    scaled = op.Mul(g, inverse_count(op, n.x[0], n.y[0]))
    return op.expand_like(_restore(op, n, scaled), n.x[0])


def inverse_count(op: Emitter, x: ir.Value, reduced: ir.Value) -> Any:
    """One over the number of elements of ``x`` behind each of ``reduced``, in the dtype of ``x``.

    A number where the dimensions that differ are known.
    """
    if x.shape is not None and reduced.shape is not None:
        big, small = Counter(dims(x)), Counter(dims(reduced))
        gone, new = big - small, small - big
        if None not in (*big, *small) and all(isinstance(d, int) for d in (*gone, *new)):
            return 1.0 / max(math.prod(gone.elements()), 1)  # type: ignore[arg-type]
    sizes = (op.Cast(op.Size(v), to=ir.DataType.DOUBLE) for v in (reduced, x))
    return op.cast_like(op.Div(*sizes), x)


@rule("ReduceMax", "ReduceMin")
def reduce_extremum(op: Emitter, n: Call, g: Any) -> Any:
    """Elements that tie share the cotangent evenly."""
    chosen = op.Cast(op.Equal(n.x[0], _restore(op, n, n.y[0])), to=g.dtype)
    share = op.Div(g, _again(op, n, "ReduceSum", chosen))
    return op.Mul(chosen, _restore(op, n, share))


@rule("ReduceProd")
def reduce_prod(op: Emitter, n: Call, g: Any) -> Any:
    """The product of the other elements, exact (to second order) where some are zero.

    Nonzero elements enter by division. Of the zeros other than the element itself: none leaves the
    factor 1, a single one is the factor, several make the product and its slopes vanish.
    """
    x = n.x[0]
    zero, one = op.const(0.0, x.dtype), op.const(1.0, x.dtype)
    is_zero = op.Equal(x, 0.0)
    count, zeros = op.Cast(is_zero, to=x.dtype), op.Where(is_zero, x, zero)
    rest = op.Where(is_zero, one, x)

    def others(part: Any) -> Any:
        return op.Sub(_restore(op, n, _again(op, n, "ReduceSum", part)), part)

    left = others(count)
    factor = op.Where(op.Equal(left, 1.0), others(zeros), op.Cast(op.Equal(left, 0.0), to=x.dtype))
    product = op.Mul(g, _again(op, n, "ReduceProd", rest))
    return op.Mul(op.Div(_restore(op, n, product), rest), factor)


@rule("ReduceL1")
def reduce_l1(op: Emitter, n: Call, g: Any) -> Any:
    return op.Mul(op.Sign(n.x[0]), _restore(op, n, g))


@rule("ReduceL2")
def reduce_l2(op: Emitter, n: Call, g: Any) -> Any:
    y = n.y[0]
    norm = op.Where(op.Equal(y, 0.0), op.const(1.0, y.dtype), y)
    return op.Mul(n.x[0], _restore(op, n, op.Div(g, norm)))


@rule("ReduceLogSum")
def reduce_log_sum(op: Emitter, n: Call, g: Any) -> Any:
    return op.expand_like(_restore(op, n, op.Div(g, op.Exp(n.y[0]))), n.x[0])


@rule("ReduceLogSumExp")
def reduce_log_sum_exp(op: Emitter, n: Call, g: Any) -> Any:
    share = op.Exp(op.Sub(n.x[0], _restore(op, n, n.y[0])))
    return op.Mul(share, _restore(op, n, g))


@rule("ReduceSumSquare")
def reduce_sum_square(op: Emitter, n: Call, g: Any) -> Any:
    return op.Mul(n.x[0], _restore(op, n, op.Add(g, g)))


@rule("CumSum")
def cum_sum(op: Emitter, n: Call, g: Any) -> Any:
    reverse = 1 - n.attr("reverse")
    return op.CumSum(g, n.x[1], exclusive=n.attr("exclusive"), reverse=reverse)
