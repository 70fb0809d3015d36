"""Sliding windows: the geometry that convolutions and pooling share, and the adjoint of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph.emit import Call, Dim, Emitter, const_array, dims

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """How a kernel slides over the spatial axes of ``x`` [N, C, *spatial] to give ``y``.

    ``extents`` are the positions that the dilated kernel spans, None where its size is unknown.
    ``begin`` and ``end`` are the padding in front of and behind each axis: integers, or computed
    int64 vectors where ``auto_pad`` makes them depend on a size that is only known at run time.
    ``ceil``: a last window may stick out.
    """

    strides: Sizes
    dilations: Sizes
    extents: Sizes | None
    begin: Sizes | ir.Value
    end: Sizes | ir.Value
    ceil: bool = False

    @property
    def dense(self) -> bool:
        """Whether the window moves by single steps."""
        return all(s == 1 for s in self.strides)

    def tail(self, x: ir.Value) -> Sizes | None:
        """The padding with which the last window just ends, negative where it ends before ``x``
        does; None where that depends on unknown sizes."""
        if isinstance(self.begin, ir.Value) or isinstance(self.end, ir.Value):
            return None
        if self.dense:
            return self.end
        sizes = known(dims(x)[2:])
        if sizes is None or self.extents is None:
            return None
        tail = []
        for n, s, e, b, p in zip(
            sizes, self.strides, self.extents, self.begin, self.end, strict=True
        ):
            room = n + b + p - e
            steps = -(-room // s) if self.ceil else room // s
            if steps * s >= n + b:  # a window that would start behind the input is none
                steps -= self.ceil
            tail.append(steps * s + e - b - n)
        return tuple(tail)


def known(sizes: Sequence[Dim]) -> Sizes | None:
    """The sizes as integers, or None when one is symbolic."""
    return tuple(sizes) if all(isinstance(s, int) for s in sizes) else None  # type: ignore[arg-type]


def window(op: Emitter, n: Call, kernel: Sequence[Dim]) -> Window:
    """The geometry of a Conv or pooling node whose kernel has these spatial sizes."""
    strides, dilations, extents = sliding(n, kernel)
    begin, end = _pads(op, n, strides, extents)
    return Window(strides, dilations, extents, begin, end, bool(n.attr("ceil_mode")))


def sliding(n: Call, kernel: Sequence[Dim]) -> tuple[Sizes, Sizes, Sizes | None]:
    """Strides, dilations and extents of a node whose kernel has these spatial sizes."""
    ones = [1] * len(kernel)
    strides, dilations = n.attr("strides") or ones, n.attr("dilations") or ones
    extents = None
    if (sizes := known(kernel)) is not None:
        extents = tuple((k - 1) * d + 1 for k, d in zip(sizes, dilations, strict=True))
    return tuple(strides), tuple(dilations), extents


def extents_of(n: Call, extents: Sizes | None) -> Sizes:
    """The extents where padding can't be known without them."""
    if extents is None:
        raise UnsupportedModelError(
            f"{n.node.op_type} '{n.node.name}' pads by the size of a kernel "
            f"'{n.x[1].name}' {dims(n.x[1])} that is unknown; give explicit pads"
        )
    return extents


def spread(
    op: Emitter, g: ir.Value, w: ir.Value, at: Window, x: ir.Value, group: int
) -> ir.Value:
    """The adjoint of ``y = Conv(x, w)`` in ``x``: every value of ``g`` goes back to its window."""
    tail = at.tail(x)
    slide = {"group": group, "strides": at.strides, "dilations": at.dilations}
    if tail is None:
        # What lies behind the last window is unknown: make too much and cut.
        axes = list(range(2, 2 + len(at.strides)))
        out = op.ConvTranspose(g, w, **slide, output_padding=[s - 1 for s in at.strides])
        start = op.const(np.array(at.begin)) if isinstance(at.begin, tuple) else at.begin
        out = op.Slice(out, start, op.Add(start, op.Shape(x, start=2)), axes)
    elif const_array(w) is not None and at.dense and min(mirrored := _mirrored(at, tail)) >= 0:
        flipped = adjoint_kernel(op, w, group)
        out = op.Conv(g, flipped, group=group, dilations=at.dilations, pads=mirrored)
    else:
        pads = (*at.begin, *(max(t, 0) for t in tail))  # type: ignore[misc]
        rest = [max(-t, 0) for t in tail]
        out = op.ConvTranspose(g, w, **slide, pads=pads, output_padding=rest)
    out.shape = x.shape
    return out


def adjoint_kernel(op: Emitter, w: ir.Value, group: int) -> ir.Value:
    """Weights [O, I/group, *k] with inputs and outputs exchanged and every spatial axis flipped.

    Written as operators, not as numbers: a runtime folds what it does to constant weights, and
    the file holds them once.
    """
    out, inside, *kernel = dims(w)
    spatial = range(2, 2 + len(kernel))
    if group == 1:
        w = op.Transpose(w, perm=[1, 0, *spatial])
    elif not out == group == group * inside:
        w = op.Reshape(w, [group, out // group, inside, *kernel])
        w = op.Transpose(w, perm=[0, 2, 1, *(a + 1 for a in spatial)])
        w = op.Reshape(w, [group * inside, out // group, *kernel])
    axes = [a for a, k in zip(spatial, kernel, strict=True) if k != 1]
    if axes:
        back = [-1] * len(axes)
        w = op.Slice(w, back, [np.iinfo(np.int64).min] * len(axes), axes, back)
    w.shape = ir.Shape((group * inside, out // group, *kernel))
    return w


def _mirrored(at: Window, tail: Sizes) -> list[int]:
    """Padding of the convolution with the flipped kernel that is the adjoint of a dense window."""
    assert isinstance(at.begin, tuple) and at.extents is not None
    return [e - 1 - p for side in (at.begin, tail) for e, p in zip(at.extents, side, strict=True)]


def _pads(
    op: Emitter, n: Call, strides: Sizes, extents: Sizes | None
) -> tuple[Sizes | ir.Value, Sizes | ir.Value]:
    axes, mode = len(strides), n.attr("auto_pad")
    if mode in ("NOTSET", "VALID"):
        pads = (n.attr("pads") if mode == "NOTSET" else None) or [0] * (2 * axes)
        return tuple(pads[:axes]), tuple(pads[axes:])
    x, extents = n.x[0], extents_of(n, extents)
    if all(s == 1 for s in strides):
        total: np.ndarray | None = np.asarray(extents) - 1
    else:
        sizes = known(dims(x)[2:])
        total = None if sizes is None else np.array(
            [
                max((-(-i // s) - 1) * s + e - i, 0)
                for i, s, e in zip(sizes, strides, extents, strict=True)
            ]
        )
    if total is not None:
        small, large = tuple((total // 2).tolist()), tuple((total - total // 2).tolist())
    else:
        inside = op.Shape(x, start=2)
        steps = op.Div(op.Sub(inside, [1]), strides)
        need = op.Sub(op.Add(op.Mul(steps, strides), extents), inside)
        missing = op.Max(need, [0])
        small = op.Div(missing, [2])
        large = op.Sub(missing, small)
    return (small, large) if mode == "SAME_UPPER" else (large, small)
