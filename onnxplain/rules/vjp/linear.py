"""Linear maps: matrix products, convolutions, Einsum."""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph.emit import Call, Dim, Emitter, dims, rank
from onnxplain.rules import RuleTable
from onnxplain.rules.vjp.window import Window, extents_of, known, sliding, spread, window

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
    at, group = window(op, n, dims(w)[2:]), n.attr("group")
    return (
        lambda: spread(op, g, w, at, x, group),
        lambda: _kernel_grad(op, x, g, at, w, group),
        lambda: _channel_sum(op, g, n.y[0]),
    )


@rule("ConvTranspose")
def conv_transpose(op: Emitter, n: Call, g: Any) -> Any:
    x, w = n.x[:2]
    at, group = _transposed_window(n), n.attr("group")
    assert isinstance(at.begin, tuple)
    assert isinstance(at.end, tuple)
    pads = [*at.begin, *(max(e, 0) for e in at.end)]
    too_long = any(-e >= s for e, s in zip(at.end, at.strides, strict=True))

    def grad_x() -> ir.Value:
        gx = op.Conv(g, w, group=group, strides=at.strides, dilations=at.dilations, pads=pads)
        if too_long:
            axes = list(range(2, rank(x)))
            gx = op.Slice(gx, [0] * len(axes), op.Shape(x, start=2), axes)
        return gx

    return (
        grad_x,
        lambda: _kernel_grad(op, g, x, at, w, group),
        lambda: _channel_sum(op, g, n.y[0]),
    )


def _channel_sum(op: Emitter, g: ir.Value, y: ir.Value) -> ir.Value:
    return op.ReduceSum(g, [0, *range(2, rank(y))], keepdims=0)


def _transposed_window(n: Call) -> Window:
    """The window of the convolution that a ConvTranspose node is the adjoint of.

    Its ``end`` is the padding with which the last window just ends (negative: output padding).
    """
    x, w = n.x[:2]
    axes = rank(w) - 2
    strides, dilations, extents = sliding(n, dims(w)[2:])
    extra = np.array(n.attr("output_padding") or [0] * axes)
    mode, wanted = n.attr("auto_pad"), n.attr("output_shape")
    if wanted or mode in ("SAME_UPPER", "SAME_LOWER"):
        # Unpadded, an axis of size n gives (n - 1) * stride + extent + extra positions.
        surplus = np.array(extents_of(n, extents)) - strides
        if wanted:
            sizes = known(dims(x)[2:])
            if sizes is None:
                raise UnsupportedModelError(
                    f"ConvTranspose '{n.node.name}' fixes its output_shape, but the size of its "
                    f"input is unknown {dims(x)}, and with it the padding; fix the input's size"
                )
            surplus += np.array(sizes) * strides - wanted[-axes:]
        need = np.maximum(surplus + extra, 0)
        begin = need // 2 if mode == "SAME_UPPER" else need - need // 2
        end = surplus - begin
    else:
        pads = np.array((n.attr("pads") if mode == "NOTSET" else None) or [0] * (2 * axes))
        begin, end = pads[:axes], pads[axes:] - extra
    return Window(strides, dilations, extents, tuple(begin.tolist()), tuple(end.tolist()))


def _kernel_grad(
    op: Emitter, x: ir.Value, g: ir.Value, at: Window, w: ir.Value, group: int
) -> ir.Value:
    """Gradient of a convolution's weights ``w`` [O, I/group, *k]: ``x`` convolved with ``g``.

    Examples and channels change places: the sum over examples is a sum over input channels.
    """
    axes = len(at.strides)
    pads: list[int] | None = None
    if isinstance(at.begin, tuple) and isinstance(at.end, tuple):
        pads = [*at.begin, *(max(e, 0) for e in at.end)]
    else:
        none = op.const(np.zeros(2, np.int64))
        x = op.Pad(x, op.Concat(none, at.begin, none, at.end, axis=0))
    swap = [1, 0, *range(2, 2 + axes)]
    if group == 1:
        examples = op.Transpose(x, perm=swap)
    else:  # [N, group * I, ...] as [I, group * N, ...]
        count, each, sizes = op.dim(x, 0), op.dim(w, 1), op.sizes(x)[2:]
        split = op.vector(count, group, each, *sizes)
        turned = op.Transpose(
            op.Reshape(x, split, allowzero=1), perm=[2, 1, 0, *range(3, 3 + axes)]
        )
        merged = op.vector(each, op.Mul(count, [group]), *sizes)
        examples = op.Reshape(turned, merged, allowzero=1)
    gw = op.Conv(
        examples,
        op.Transpose(g, perm=swap),
        group=group,
        strides=at.dilations,
        dilations=at.strides,
        pads=pads,
    )
    out, inside, *kernel = dims(w)
    gw.shape = ir.Shape([inside, out, *[None] * axes])
    stop = op.vector(*op.sizes(w)[2:])
    gw = op.Slice(gw, [0] * axes, stop, swap[2:])  # without what lies behind the last window
    gw.shape = ir.Shape([inside, out, *kernel])
    return op.Transpose(gw, perm=swap)


@rule("Einsum")
def einsum(op: Emitter, n: Call, g: Any) -> Any:
    """Each operand's cotangent is an Einsum of ``g`` and the other operands."""
    terms, result = _explicit(n)

    def grad(i: int) -> ir.Value:
        x = n.x[i]
        operands = [g, *n.x[:i], *n.x[i + 1 :]]
        factors = [result, *terms[:i], *terms[i + 1 :]]
        present, unused = set("".join(factors)), _unused(terms)
        target, sizes = "", list(dims(x))
        for axis, letter in enumerate(terms[i]):
            if letter in target:  # a diagonal: nothing beside it
                other = next(unused)
                operands.append(_identity(op, op.dim(x, axis), g))
                factors.append(letter + other)
                letter = other
            elif letter not in present:  # summed over in this operand alone
                operands.append(op.Expand(op.const(1, g.dtype), op.dim(x, axis)))
                factors.append(letter)
            else:
                sizes[axis] = _common(
                    dims(v)[t.index(letter)] for t, v in zip(terms, n.x, strict=True) if letter in t
                )
            target += letter
        out = op.Einsum(*operands, equation=f"{','.join(factors)}->{target}")
        out.shape = ir.Shape(sizes)
        return op.unbroadcast(out, out, x)

    return [functools.partial(grad, i) for i in range(len(n.x))]


def _common(sizes: Iterable[Dim]) -> Dim:
    """The size to which sizes broadcast, as far as it is known."""
    wide = {s for s in sizes if s != 1}
    fixed = [s for s in wide if isinstance(s, int)]
    if fixed or len(wide) < 2:
        return next(iter(fixed or wide), 1)
    return None


def _identity(op: Emitter, size: ir.Value, like: ir.Value) -> ir.Value:
    """The identity matrix."""
    places = op.Range(op.const(np.array(0)), op.Squeeze(size), op.const(np.array(1)))
    return op.cast_like(op.Equal(op.Unsqueeze(places, [0]), op.Unsqueeze(places, [1])), like)


def _explicit(n: Call) -> tuple[list[str], str]:
    """An equation's terms, one for each operand, and its result, with letters for ellipses."""
    left, arrow, result = n.attr("equation").replace(" ", "").partition("->")
    terms = left.split(",")
    covered = [rank(x) - len(t) + 3 if "..." in t else 0 for t, x in zip(terms, n.x, strict=True)]
    letters = "".join(itertools.islice(_unused(terms), max(covered)))
    if not arrow:
        once = sorted(c for c in set(left) - set(".,") if left.count(c) == 1)
        result = ("..." if "..." in left else "") + "".join(once)
    named = [
        t.replace("...", letters[len(letters) - k :]) for t, k in zip(terms, covered, strict=True)
    ]
    return named, result.replace("...", letters)


def _unused(terms: Sequence[str]) -> Iterator[str]:
    """Letters that the terms of an equation leave free."""
    return iter(c for c in string.ascii_letters if not any(c in t for t in terms))
