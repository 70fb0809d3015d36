"""Quantization: the gradient passes straight through rounding, except where values saturate.

Between quantizer and dequantizer, cotangents are float32 in steps of the integer. Scales and zero
points are constants. Where the value before rounding lies in the representable range the gradient
of the pair is that of the identity, else zero (Bengio, Leonard and Courville 2013).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.graph.emit import Call, Emitter, dims, rank
from onnxplain.rules import RuleTable
from onnxplain.rules.vjp import linear
from onnxplain.rules.vjp.indexing import arange

TABLE = RuleTable("quantization")
rule = TABLE.rule


@rule("QuantizeLinear", quantizes=True)
def quantize(op: Emitter, n: Call, g: Any) -> Any:
    x = n.x[0]
    scale = op.cast_like(_per_element(op, n, n.x[1]), x)
    stored = n.node.outputs[0].dtype
    assert stored is not None
    assert x.dtype is not None
    low, high = float(stored.min), float(stored.max)
    # Calibrated scales put the extremes of the data on the limits: a few units in the last place
    # must not decide.
    margin = 4 * float(x.dtype.eps) * (high - low)
    low, high = low - margin, high + margin
    if n.has(2):
        zero = op.cast_like(_per_element(op, n, n.x[2]), x)
        least, most = (op.Mul(op.Sub(limit, zero), scale) for limit in (low, high))
    else:
        least, most = (op.Mul(scale, limit) for limit in (low, high))
    inside = op.And(op.GreaterOrEqual(x, least), op.LessOrEqual(x, most))
    return op.Where(inside, op.Div(op.cast_like(g, x), scale), 0.0)


@rule("DequantizeLinear", quantizes=True)
def dequantize(op: Emitter, n: Call, g: Any) -> Any:
    return op.Mul(g, op.cast_like(_per_element(op, n, n.x[1]), g))


@rule("DynamicQuantizeLinear", quantizes=True)
def dynamic_quantize(op: Emitter, n: Call, g: Any) -> Any:
    return op.Div(g, n.y[1])  # the range is that of the data: nothing saturates


@rule("MatMulInteger")
def matmul_integer(op: Emitter, n: Call, g: Any) -> Any:
    return linear.matmul(op, _centered(op, n), g)


@rule("ConvInteger")
def conv_integer(op: Emitter, n: Call, g: Any) -> Any:
    cotangents: Any = linear.conv(op, _centered(op, n), g)
    return cotangents[:2]


def _centered(op: Emitter, n: Call) -> Call:
    """The call with its operands less their zero points."""
    operands = []
    for k, x in enumerate(n.x[:2]):
        if n.has(2 + k):
            zero = n.x[2 + k]
            if k and rank(zero) == 1 and n.node.op_type == "ConvInteger":  # by output channel
                zero = op.Unsqueeze(zero, list(range(1, rank(x))))
            shape, x = x.shape, op.Sub(x, zero)
            x.shape = shape
        operands.append(x)
    n.x = operands
    return n


def _per_element(op: Emitter, n: Call, value: ir.Value) -> Any:
    """A scale or zero point (for the tensor, an axis, or blocks of it) in broadcastable form."""
    x = n.x[0]
    if rank(value) == 0 or rank(x) == 0 or dims(value) == (1,):
        return op.Reshape(value, [])
    axis = n.attr("axis") % rank(x)
    block = n.attr("block_size")
    if not block:
        trailing = rank(x) - axis - 1
        return op.Unsqueeze(value, list(range(1, 1 + trailing))) if trailing else value
    size = op.sizes(x)[axis]
    if isinstance(size, int):
        return op.Gather(value, np.arange(size) // block, axis=axis)
    return op.Gather(value, op.Div(arange(op, size), np.int64(block)), axis=axis)
