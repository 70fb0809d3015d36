"""Normalizations. Half precision is computed in single precision, as the forward operators do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph.emit import Call, Emitter, dims, rank
from onnxplain.rules import RuleFunction, RuleTable
from onnxplain.rules.vjp.reduction import inverse_count

TABLE = RuleTable("normalization")
rule = TABLE.rule

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def in_single(function: RuleFunction) -> RuleFunction:
    """Let a rule see half-precision inputs and cotangents in single precision."""

    def single(op: Emitter, v: Any) -> Any:
        return op.Cast(v, to=ir.DataType.FLOAT) if v is not None and v.dtype in _HALF else v

    def back(op: Emitter, item: Any, value: ir.Value) -> Any:
        if callable(item):
            return lambda: op.cast_like(item(), value)
        return None if item is None else op.cast_like(item, value)

    @functools.wraps(function)
    def wrapped(op: Emitter, n: Call, *g: Any) -> Any:
        wide = copy.copy(n)
        wide.x = [_shaped(single(op, v), v) for v in n.x]
        result = function(op, wide, *(single(op, v) for v in g))
        items = result if isinstance(result, tuple) else (result,)
        return [back(op, item, value) for item, value in zip(items, n.x, strict=False)]

    return wrapped


def _shaped(value: Any, like: ir.Value | None) -> Any:
    if like is not None:
        value.shape = like.shape
    return value


def _standardize(
    op: Emitter, x: Any, axes: Sequence[int], epsilon: float, centered: bool = True
) -> tuple[Any, Any]:
    """``x`` without mean and with unit scale over ``axes``, and the inverse of its scale."""
    if centered:
        x = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
    variance = op.ReduceMean(op.Mul(x, x), axes, keepdims=1)
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, epsilon)))
    return op.Mul(x, inverse), inverse


def _standardize_vjp(
    op: Emitter,
    h: Any,
    z: Any,
    inverse: Any,
    axes: Sequence[int],
    centered: bool = True,
    level: Any = None,
    along: Any = None,
) -> Any:
    """Cotangent of ``x`` for ``h``, that of ``z = standardize(x)``.

    The components that standardizing fixes, the mean and the length along ``z``, are taken out of
    ``h``; ``level`` and ``along`` are added to these two.
    """

    def taken(component: Any, more: Any) -> Any:
        mean = op.ReduceMean(component, axes, keepdims=1)
        return mean if more is None else op.Add(mean, more)

    d = op.Sub(h, op.Mul(z, taken(op.Mul(h, z), along)))
    if centered:
        d = op.Sub(d, taken(h, level))
    return op.Mul(d, inverse)


def _channels(op: Emitter, vector: Any, x: ir.Value) -> Any:
    """A vector over channels (axis 1) so that it broadcasts against ``x``."""
    trailing = rank(x) - 2
    return op.Unsqueeze(vector, list(range(1, trailing + 1))) if trailing > 0 else vector


def _sum_to_channels(op: Emitter, value: Any, x: ir.Value) -> Any:
    return op.ReduceSum(value, [0, *range(2, rank(x))], keepdims=0)


@rule("BatchNormalization")
@in_single
def batch_normalization(op: Emitter, n: Call, g: Any, *_: Any) -> Any:
    if n.attr("training_mode"):
        raise UnsupportedModelError(
            f"node '{n.node.name}' is a BatchNormalization in training mode, whose output depends "
            "on the whole batch. Export the model in evaluation mode"
        )
    x, scale, _bias, mean, variance = n.x
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, n.attr("epsilon"))))
    slope = op.Mul(scale, op.cast_like(inverse, scale))

    def total() -> Any:
        return _sum_to_channels(op, g, x)

    def standardized() -> Any:
        """Sum of the cotangent times the standardized input."""
        centered = op.Sub(x, op.cast_like(_channels(op, mean, x), x))
        return op.Mul(_sum_to_channels(op, op.Mul(g, centered), x), op.cast_like(inverse, g))

    def to_variance() -> Any:
        factor = op.Mul(op.Mul(scale, inverse), op.Mul(inverse, -0.5))
        return op.Mul(standardized(), op.cast_like(factor, g))

    return (
        lambda: op.Mul(g, op.cast_like(_channels(op, slope, x), g)),
        standardized,
        total,
        lambda: op.Neg(op.Mul(total(), op.cast_like(slope, g))),
        to_variance,
    )


@rule("LayerNormalization")
@in_single
def layer_normalization(op: Emitter, n: Call, g: Any, *statistics: Any) -> Any:
    """``statistics``: cotangents of the optional outputs Mean and InvStdDev."""
    x, scale = n.x[:2]
    axis, epsilon = n.attr("axis") % rank(x), n.attr("epsilon")
    axes = list(range(axis, rank(x)))
    if x.dtype == ir.DataType.FLOAT:
        ones = op.expand_like(op.const(1.0, x.dtype), scale)
        z, _, inverse = op.LayerNormalization(
            x, ones, axis=axis, epsilon=epsilon, stash_type=1, _outputs=3
        )
    else:
        z, inverse = _standardize(op, x, axes, epsilon)

    def to_input() -> Any:
        names = [y for y in n.y[1:] if y.name]
        more = {
            y: op.Mul(op.cast_like(h, x), inverse_count(op, x, y))
            for y, h in zip(names, statistics, strict=True)
        }
        mean, deviation = (*(more.get(y) for y in n.y[1:]), None, None)[:2]
        level = None if mean is None else op.Neg(op.Div(mean, inverse))
        along = None if deviation is None else op.Mul(deviation, inverse)
        h = op.Mul(g, scale)
        return _standardize_vjp(op, h, z, inverse, axes, level=level, along=along)

    return (
        to_input,
        lambda: op.unbroadcast(op.Mul(g, z), x, scale),
        lambda: op.unbroadcast(g, x, n.x[2]),
    )


@rule("RMSNormalization")
@in_single
def rms_normalization(op: Emitter, n: Call, g: Any) -> Any:
    x, scale = n.x
    axes = list(range(n.attr("axis") % rank(x), rank(x)))
    z, inverse = _standardize(op, x, axes, n.attr("epsilon"), centered=False)
    return (
        lambda: _standardize_vjp(op, op.Mul(g, scale), z, inverse, axes, centered=False),
        lambda: op.unbroadcast(op.Mul(g, z), x, scale),
    )


@rule("InstanceNormalization")
@in_single
def instance_normalization(op: Emitter, n: Call, g: Any) -> Any:
    x, scale = n.x[:2]
    axes = list(range(2, rank(x)))
    z, inverse = _standardize(op, x, axes, n.attr("epsilon"))
    return (
        lambda: _standardize_vjp(op, op.Mul(g, _channels(op, scale, x)), z, inverse, axes),
        lambda: _sum_to_channels(op, op.Mul(g, z), x),
        lambda: _sum_to_channels(op, g, x),
    )


@rule("GroupNormalization")
@in_single
def group_normalization(op: Emitter, n: Call, g: Any) -> Any:
    x, scale = n.x[:2]
    groups = n.attr("num_groups")

    def grouped(value: Any) -> Any:
        """``[N, G, ...]`` with what a group holds in the last axis."""
        size: int | None = 1
        for d in dims(x)[1:]:
            size = size * d if isinstance(d, int) and size is not None else None
        return op.Reshape(value, [0, groups, -1 if size is None else size // groups])

    z, inverse = _standardize(op, grouped(x), [2], n.attr("epsilon"))

    def to_input() -> Any:
        h = grouped(op.Mul(g, _channels(op, scale, x)))
        return op.reshape_like(_standardize_vjp(op, h, z, inverse, [2]), x)

    return (
        to_input,
        lambda: _sum_to_channels(op, op.Mul(g, op.reshape_like(z, x)), x),
        lambda: _sum_to_channels(op, g, x),
    )


@rule("MeanVarianceNormalization")
@in_single
def mean_variance_normalization(op: Emitter, n: Call, g: Any) -> Any:
    x, axes = n.x[0], n.attr("axes")
    centered = op.Sub(x, op.ReduceMean(x, axes, keepdims=1))
    deviation = op.Sqrt(op.ReduceMean(op.Mul(centered, centered), axes, keepdims=1))
    inverse = op.Reciprocal(op.Add(deviation, 1e-9))
    return _standardize_vjp(op, g, op.Mul(centered, inverse), inverse, axes)


@rule("LpNormalization")
@in_single
def lp_normalization(op: Emitter, n: Call, g: Any) -> Any:
    """A vector of zeros is mapped to zeros, and so is its cotangent."""
    x, axes = n.x[0], [n.attr("axis")]
    one = n.attr("p") == 1
    norm = op.emit("ReduceL1" if one else "ReduceL2", x, axes, keepdims=1)
    is_zero = op.Equal(norm, 0.0)
    inverse = op.Where(
        is_zero,
        op.const(0.0, x.dtype),
        op.Reciprocal(op.Where(is_zero, op.const(1.0, x.dtype), norm)),
    )
    y = op.Mul(x, inverse)
    along = op.ReduceSum(op.Mul(g, y), axes, keepdims=1)
    return op.Mul(op.Sub(g, op.Mul(op.Sign(x) if one else y, along)), inverse)


@rule("LRN")
@in_single
def lrn(op: Emitter, n: Call, g: Any) -> Any:
    x, size = n.x[0], n.attr("size")
    alpha, beta = n.attr("alpha"), n.attr("beta")
    before, after = (size - 1) // 2, size // 2

    def window_mean(value: Any, first: int, last: int) -> Any:
        """Mean over ``first`` channels before and ``last`` after each, zeros beyond the edge."""
        still = [0] * (rank(x) - 2)
        pooled = op.AveragePool(
            op.Unsqueeze(value, [1]),
            kernel_shape=[size, *(1 for _ in still)],
            pads=[first, *still, last, *still],
            count_include_pad=1,
        )
        return op.Squeeze(pooled, [1])

    base = op.Add(op.Mul(window_mean(op.Mul(x, x), before, after), alpha), n.attr("bias"))
    direct = op.Mul(g, op.Pow(base, -beta))
    share = op.Div(op.Mul(direct, x), base)
    spread = op.Mul(op.Mul(x, window_mean(share, after, before)), 2.0 * alpha * beta)
    return op.Sub(direct, spread)
