"""Sliding windows: the geometry that convolutions and pooling share, and the adjoint of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxplain.errors import UnsupportedModelError
from onnxplain.graph.emit import Call, Dim, Emitter, dims

Sizes = tuple[int, ...]

_BLOCK = 16
"""Channels that onnxruntime's convolution kernel computes at once."""


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


def spread(op: Emitter, g: ir.Value, w: ir.Value, at: Window, x: ir.Value, group: int) -> ir.Value:
    """The adjoint of ``y = Conv(x, w)`` in ``x``: every value of ``g`` goes back to its window."""
    tail = at.tail(x)
    slide = {"group": group, "strides": at.strides, "dilations": at.dilations}
    if tail is None:
        # What lies behind the last window is unknown: make too much and cut.
        axes = list(range(2, 2 + len(at.strides)))
        out = op.ConvTranspose(g, w, **slide, output_padding=[s - 1 for s in at.strides])
        start = op.const(np.array(at.begin)) if isinstance(at.begin, tuple) else at.begin
        out = op.Slice(out, start, op.Add(start, op.Shape(x, start=2)), axes)
    elif (phases := _phases(at, x, w, tail, group)) is not None:
        out = _by_phases(op, g, w, at, x, phases, group)
    else:
        pads = (*at.begin, *(max(t, 0) for t in tail))  # type: ignore[misc]
        rest = [max(-t, 0) for t in tail]
        out = op.ConvTranspose(g, w, **slide, pads=pads, output_padding=rest)
    out.shape = x.shape
    return out


@dataclass(frozen=True)
class _Phase:
    """Of one axis, the positions that are ``t`` modulo the stride: a convolution of the cotangent
    with every stride-th tap of the flipped kernel, the last of them first."""

    last: int
    step: int
    begin: int
    end: int


def _phases(
    at: Window, x: ir.Value, w: ir.Value, tail: Sizes, group: int
) -> list[list[_Phase]] | None:
    """The phases of each axis; None where ConvTranspose does as well or better.

    onnxruntime's plain convolution is the faster kernel, in its blocked layout and in many
    threads. Not so where channels fill half a block at most, strides leave positions that no window
    reads, or phases are many.
    """
    weights, sizes, channels = known(dims(w)), known(dims(x)[2:]), dims(x)[1]
    assert isinstance(at.begin, tuple)
    if at.extents is None or not isinstance(channels, int) or (group > 1 and weights is None):
        return None
    if group == 1 and channels <= _BLOCK // 2:
        return None
    if not at.dense:
        narrow = channels < _BLOCK and 1 < group < channels
        if sizes is None or narrow or math.prod(at.strides) > 8:
            return None
    axes = []
    for a, (e, s, d, b, t) in enumerate(
        zip(at.extents, at.strides, at.dilations, at.begin, tail, strict=True)
    ):
        if s == 1:
            phases = [_Phase((e - 1) // d, 1, e - 1 - b, e - 1 - t)]
        else:
            assert sizes is not None
            windows = (sizes[a] + b + t - e) // s + 1
            steps = -(-sizes[a] // s)
            phases = []
            for position in range(s):
                ahead, first = divmod(position + b, s)
                taps = -(-(e - first) // s)
                phases.append(
                    _Phase(first + s * (taps - 1), s, taps - 1 - ahead, steps - windows + ahead)
                )
            if d != 1:
                return None
        if any(p.last < 0 or p.begin < 0 or p.end < 0 for p in phases):
            return None
        axes.append(phases)
    return axes


def _by_phases(
    op: Emitter,
    g: ir.Value,
    w: ir.Value,
    at: Window,
    x: ir.Value,
    phases: list[list[_Phase]],
    group: int,
) -> ir.Value:
    """One dense convolution for each combination of phases, interleaved."""
    adjoint = _exchanged(op, w, group)
    each = list(itertools.product(*phases))
    kernels = [_flipped(op, adjoint, p) for p in each]
    pads = [[*(a.begin for a in p), *(a.end for a in p)] for p in each]
    if len(each) == 1:
        return op.Conv(g, kernels[0], group=group, dilations=at.dilations, pads=pads[0])
    parts = [
        op.Conv(g, k, group=group, dilations=at.dilations, pads=p)
        for k, p in zip(kernels, pads, strict=True)
    ]
    sizes: list[int] = list(dims(x)[1:])  # type: ignore[arg-type]
    for axis in reversed(range(1, len(sizes))):
        s = at.strides[axis - 1]
        shape = [-(-n // p) for n, p in zip(sizes, (1, *at.strides), strict=True)]
        shape[axis:] = [shape[axis], *sizes[axis + 1 :]]
        parts = [
            interleave(op, parts[i : i + s], axis, shape, sizes[axis])
            for i in range(0, len(parts), s)
        ]
    return parts[0]


def phases_of(
    op: Emitter, x: ir.Value, axis: int, sizes: Sequence[int], s: int, fill: float
) -> list[ir.Value]:
    """Every s-th position of an axis of ``x`` [N, *sizes], from each start, filled up to equal
    sizes. Axes count without N."""
    if s == 1:
        return [x]
    steps = -(-sizes[axis] // s)
    ahead, behind = [0, *sizes[:axis], steps], sizes[axis + 1 :]
    if missing := steps * s - sizes[axis]:
        x = op.pad(x, len(sizes) + 1, {axis + 1: (0, missing)}, fill)
    x = op.Reshape(x, [*ahead, s, *behind])
    parts = op.Split(x, axis=axis + 2, num_outputs=s, _outputs=s)
    return [op.Reshape(p, [*ahead, *behind]) for p in parts]


def interleave(
    op: Emitter, parts: Sequence[ir.Value], axis: int, sizes: Sequence[int], size: int
) -> ir.Value:
    """The inverse: parts [N, *sizes] put together along an axis that gets ``size`` positions."""
    s = len(parts)
    if s == 1:
        return parts[0]
    ahead, behind = [0, *sizes[: axis + 1]], sizes[axis + 1 :]
    apart = [op.Reshape(p, [*ahead, 1, *behind]) for p in parts]
    whole = sizes[axis] * s
    out = op.Reshape(op.Concat(*apart, axis=axis + 2), [*ahead[:-1], whole, *behind])
    return out if whole == size else op.Slice(out, [0], [size], [axis + 1])


def _exchanged(op: Emitter, w: ir.Value, group: int) -> ir.Value:
    """Weights [O, I/group, *k] with inputs and outputs exchanged: [I, O/group, *k].

    Written as operators, as the flip is: a runtime folds what is done to constant weights, and the
    file holds them once.
    """
    spatial = range(2, len(dims(w)))
    if group == 1:
        return op.Transpose(w, perm=[1, 0, *spatial])
    out, inside, *kernel = dims(w)
    if out == group == group * inside:  # type: ignore[operator]
        return w
    w = op.Reshape(w, [group, out // group, inside, *kernel])  # type: ignore[operator]
    w = op.Transpose(w, perm=[0, 2, 1, *(a + 1 for a in spatial)])
    return op.Reshape(w, [group * inside, out // group, *kernel])  # type: ignore[operator]


def _flipped(op: Emitter, w: ir.Value, phases: Sequence[_Phase]) -> ir.Value:
    """The taps of a phase, backwards."""
    cut = [(a, p) for a, p in enumerate(phases, 2) if p.last > 0 or p.step > 1]
    if not cut:
        return w
    starts, steps = [p.last for _, p in cut], [-p.step for _, p in cut]
    stops = [np.iinfo(np.int64).min] * len(cut)
    return op.Slice(w, starts, stops, [a for a, _ in cut], steps)


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
        total = (
            None
            if sizes is None
            else np.array(
                [
                    max((-(-i // s) - 1) * s + e - i, 0)
                    for i, s, e in zip(sizes, strides, extents, strict=True)
                ]
            )
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
