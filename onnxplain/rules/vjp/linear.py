"""Linear maps: matrix products, convolutions, Einsum."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph.emit import Call, Dim, Emitter, dims, rank
from onnxplain.rules import RuleTable
from onnxplain.rules.vjp.window import Window, kernel_sizes, known, spread, window

TABLE = RuleTable("linear")
rule = TABLE.rule


@rule("MatMul")
def matmul(op: Emitter, n: Call, g: Any) -> Any:
    a, b = n.x
    # A vector is a matrix with one row (on the left) or one column (on the right).
    left = op.Unsqueeze(a, [0]) if rank(a) == 1 else a
    right = op.Unsqueeze(b, [1]) if rank(b) == 1 else b
    a_dims = (1, *dims(a)) if rank(a) == 1 else dims(a)
    b_dims = (*dims(b), 1) if rank(b) == 1 else dims(b)
    ends = rank(n.y[0]) + (rank(a) == 1) + (rank(b) == 1)
    inserted = [ends - 2] * (rank(a) == 1) + [ends - 1] * (rank(b) == 1)
    g = op.Unsqueeze(g, inserted) if inserted else g
    batch = dims(n.y[0])[: ends - 2]

    def grad_a() -> ir.Value:
        ga = op.MatMul(g, _transposed(op, right, len(b_dims)))
        ga.shape = ir.Shape((*batch, *a_dims[-2:]))
        return op.unbroadcast(ga, ga, a)

    def grad_b() -> ir.Value:
        if len(b_dims) == 2 and len(a_dims) > 2:  # one product, not one for each example
            gb = op.MatMul(_transposed(op, op.Flatten(left, axis=-1), 2), op.Flatten(g, axis=-1))
            return op.Squeeze(gb, [1]) if rank(b) == 1 else gb
        gb = op.MatMul(_transposed(op, left, len(a_dims)), g)
        gb = op.Squeeze(gb, [-1]) if rank(b) == 1 else gb
        gb.shape = ir.Shape((*batch, *(dims(b) if rank(b) == 1 else b_dims[-2:])))
        return op.unbroadcast(gb, gb, b)

    return grad_a, grad_b


def _transposed(op: Emitter, m: ir.Value, axes: int) -> ir.Value:
    """Matrices [..., R, C] as [..., C, R]."""
    return op.Transpose(m, perm=[*range(axes - 2), axes - 1, axes - 2])


@rule("Gemm")
def gemm(op: Emitter, n: Call, g: Any) -> Any:
    a, b = n.x[:2]
    alpha, beta, ta, tb = (n.attr(k) for k in ("alpha", "beta", "transA", "transB"))

    def grad_a() -> ir.Value:
        if ta:
            return op.Gemm(b, g, alpha=alpha, transA=tb, transB=1)
        return op.Gemm(g, b, alpha=alpha, transB=1 - tb)

    def grad_b() -> ir.Value:
        if tb:
            return op.Gemm(g, a, alpha=alpha, transA=1, transB=ta)
        return op.Gemm(a, g, alpha=alpha, transA=1 - ta)

    def grad_c() -> ir.Value:
        gc = op.unbroadcast(g, n.y[0], n.x[2])
        return gc if beta == 1 else op.Mul(gc, beta)

    return grad_a, grad_b, grad_c


@rule("Conv")
def conv(op: Emitter, n: Call, g: Any) -> Any:
    x, w = n.x[:2]
    at, group = window(op, n, kernel_sizes(w)), n.attr("group")
    return (
        lambda: spread(op, g, w, at, x, n.y[0], group),
        lambda: _kernel_grad(op, x, g, at, group),
        lambda: _channel_sum(op, g, n.y[0]),
    )


@rule("ConvTranspose")
def conv_transpose(op: Emitter, n: Call, g: Any) -> Any:
    x, w = n.x[:2]
    at, group = _transposed_window(n), n.attr("group")
    pads = (*at.begin, *(max(e, 0) for e in at.end))  # type: ignore[misc]

    def grad_x() -> ir.Value:
        gx = op.Conv(
            g, w, group=group, strides=at.strides, dilations=at.dilations, pads=pads
        )
        if any(-e >= s for e, s in zip(at.end, at.strides, strict=True)):  # type: ignore[arg-type]
            axes = list(range(2, rank(x)))
            gx = op.Slice(gx, [0] * len(axes), op.Shape(x, start=2), axes)
        return gx

    return (
        grad_x,
        lambda: _kernel_grad(op, g, x, at, group),
        lambda: _channel_sum(op, g, n.y[0]),
    )


def _channel_sum(op: Emitter, g: ir.Value, y: ir.Value) -> ir.Value:
    return op.ReduceSum(g, [0, *range(2, rank(y))], keepdims=0)


def _transposed_window(n: Call) -> Window:
    """The window of the convolution that a ConvTranspose node is the adjoint of.

    Its ``end`` is the padding with which the last window just ends (negative: output padding).
    """
    x, w = n.x[:2]
    kernel = kernel_sizes(w)
    ones = [1] * len(kernel)
    strides, dilations = n.attr("strides") or ones, n.attr("dilations") or ones
    extra = n.attr("output_padding") or [0] * len(kernel)
    at = Window(kernel, tuple(strides), tuple(dilations), (), ())
    # One output position for each step and the extent of the last window, less the padding.
    beyond = [e - s for e, s in zip(at.extents, at.strides, strict=True)]
    mode, wanted = n.attr("auto_pad"), n.attr("output_shape")
    if wanted or mode in ("SAME_UPPER", "SAME_LOWER"):
        total = []
        for i, (b, s, r) in enumerate(zip(beyond, strides, extra, strict=True)):
            if wanted:
                inside = dims(x)[2 + i]
                if not isinstance(inside, int):
                    raise UnsupportedModelError(
                        f"ConvTranspose '{n.node.name}' gives an output_shape for an input of "
                        f"unknown size {dims(x)}; fix the size of the model's input"
                    )
                b += s * inside - wanted[-len(kernel) :][i]
            total.append(b + r if not wanted else b + r)
        need = np.maximum(total, 0)
        begin = need // 2 if mode == "SAME_UPPER" else need - need // 2
        end = np.array(total) - begin - extra
    else:
        pads = (n.attr("pads") if mode == "NOTSET" else None) or [0] * (2 * len(kernel))
        begin = np.array(pads[: len(kernel)])
        end = np.array(pads[len(kernel) :]) - extra
    return Window(at.kernel, at.strides, at.dilations, tuple(begin.tolist()), tuple(end.tolist()))


def _kernel_grad(op: Emitter, x: ir.Value, g: ir.Value, at: Window, group: int) -> ir.Value:
    """Gradient of a convolution's weights [O, I/group, *k]: ``x`` convolved with ``g``.

    Examples and channels change places: the sum over examples is the sum over input channels.
    """
    if isinstance(at.begin, ir.Value):
        none = op.const(np.zeros(2, np.int64))
        x, pads = op.Pad(x, op.Concat(none, at.begin, none, at.end, axis=0)), None
    else:
        pads = (*at.begin, *(max(e, 0) for e in at.end))  # type: ignore[misc]
    spatial = range(2, 2 + len(at.kernel))
    swap = [1, 0, *spatial]
    kernel = op.Transpose(g, perm=swap)
    examples = _examples_as_channels(op, x, group, len(at.kernel))
    gw = op.Conv(
        examples, kernel, group=group, strides=at.dilations, dilations=at.strides, pads=pads
    )
    if not at.dense:  # positions behind the last window
        gw = op.Slice(gw, [0] * len(at.kernel), at.kernel, list(spatial))
    return op.Transpose(gw, perm=swap)
