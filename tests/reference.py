"""Kernels that ONNX's reference evaluator (1.23) gets wrong or can't do in float64, done right."""

from __future__ import annotations

import math

import numpy as np
from onnx.reference.op_run import OpRun


class Erf(OpRun):
    """The original computes in float32, too coarse for finite differences."""

    def _run(self, x):
        return (np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype),)


class Gelu(OpRun):
    """The original is a function body, which calls the original Erf."""

    def _run(self, x, approximate=None):
        if approximate == "tanh":
            gate = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        else:
            gate = np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))
        return ((0.5 * x * (1 + gate)).astype(x.dtype),)


class Mean(OpRun):
    """The original adds in place, so it can't broadcast its first input."""

    def _run(self, *xs):
        return (np.asarray(sum(xs) / len(xs), dtype=xs[0].dtype),)


class GroupNormalization(OpRun):
    """The original is a function body, which computes in float32."""

    def _run(self, x, scale, bias, epsilon=None, num_groups=None, stash_type=None):
        groups = x.reshape(x.shape[0], num_groups, -1)
        centered = groups - groups.mean(2, keepdims=True)
        z = (centered / np.sqrt(groups.var(2, keepdims=True) + epsilon)).reshape(x.shape)
        channels = (-1, *[1] * (x.ndim - 2))
        return ((z * scale.reshape(channels) + bias.reshape(channels)).astype(x.dtype),)


class LRN(OpRun):
    """The original runs over channels up to the batch size."""

    def _run(self, x, alpha=None, beta=None, bias=None, size=None):
        before, after = (size - 1) // 2, size // 2
        squares = np.stack(
            [
                np.sum(x[:, max(0, c - before) : c + after + 1] ** 2, axis=1)
                for c in range(x.shape[1])
            ],
            axis=1,
        )
        return ((x / (bias + alpha / size * squares) ** beta).astype(x.dtype),)


class LpNormalization(OpRun):
    """The original forgets absolute values for p = 1."""

    def _run(self, x, axis=None, p=None):
        norm = np.linalg.norm(x, p, axis, keepdims=True)
        return (np.where(norm == 0, 0, x / np.where(norm == 0, 1, norm)).astype(x.dtype),)


class _Sliding(OpRun):
    """Sliding windows of any number of axes.

    The originals go wrong for groups, dilations, asymmetric padding or empty batches, and loop over
    positions in Python."""

    def _window(self, sizes, kernel, strides, dilations, pads, auto_pad, ceil_mode=0):
        """Strides, dilations, padding in front and number of windows, per axis."""
        axes = len(sizes)
        strides, dilations = strides or [1] * axes, dilations or [1] * axes
        pads = list(pads or [0] * (2 * axes))
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations)]
        counts = []
        for a, (n, s, e) in enumerate(zip(sizes, strides, extents)):
            if (auto_pad or "NOTSET").startswith("SAME"):
                need = max((-(-n // s) - 1) * s + e - n, 0)
                front = need // 2 if auto_pad == "SAME_UPPER" else need - need // 2
                pads[a], pads[axes + a] = front, need - front
            elif auto_pad == "VALID":
                pads[a] = pads[axes + a] = 0
            room = n + pads[a] + pads[axes + a] - e
            count = (-(-room // s) if ceil_mode else room // s) + 1
            if ceil_mode and (count - 1) * s >= n + pads[a]:
                count -= 1
            counts.append(count)
        return strides, dilations, pads, counts

    def _taps(self, kernel, strides, dilations, counts):
        """For each kernel position, its index and the positions that it meets, as slices."""
        for tap in np.ndindex(*kernel):
            steps = zip(tap, strides, dilations, counts)
            yield tap, tuple(slice(t * d, t * d + s * (c - 1) + 1, s) for t, s, d, c in steps)

    def _stack(self, x, kernel, strides, dilations, pads, counts, fill):
        """Every window's values [N, C, *windows, prod(kernel)]."""
        axes = len(kernel)
        wide = [
            (b, e + k * d + s)
            for b, e, k, d, s in zip(pads[:axes], pads[axes:], kernel, dilations, strides)
        ]
        x = np.pad(x, [(0, 0), (0, 0), *wide], constant_values=fill)
        taps = self._taps(kernel, strides, dilations, counts)
        return np.stack([x[(..., *where)] for _, where in taps], axis=-1)


class Conv(_Sliding):
    def _run(
        self,
        x,
        w,
        b=None,
        auto_pad=None,
        dilations=None,
        group=None,
        kernel_shape=None,
        pads=None,
        strides=None,
    ):
        kernel = w.shape[2:]
        strides, dilations, pads, counts = self._window(
            x.shape[2:], kernel, strides, dilations, pads, auto_pad
        )
        rows = self._stack(x, kernel, strides, dilations, pads, counts, 0)
        rows = rows.reshape(x.shape[0], group, w.shape[1], *counts, math.prod(kernel))
        weights = w.reshape(group, w.shape[0] // group, w.shape[1], -1)
        y = np.einsum("ngi...k,goik->ngo...", rows, weights)
        y = y.reshape(x.shape[0], w.shape[0], *counts)
        return ((y if b is None else y + b.reshape(-1, *[1] * len(kernel))).astype(x.dtype),)


class ConvTranspose(_Sliding):
    def _run(
        self,
        x,
        w,
        b=None,
        auto_pad=None,
        dilations=None,
        group=None,
        kernel_shape=None,
        output_padding=None,
        output_shape=None,
        pads=None,
        strides=None,
    ):
        kernel, axes, counts = w.shape[2:], w.ndim - 2, x.shape[2:]
        strides, dilations = strides or [1] * axes, dilations or [1] * axes
        extra, pads = output_padding or [0] * axes, list(pads or [0] * (2 * axes))
        full = [
            (n - 1) * s + (k - 1) * d + 1 + r
            for n, s, k, d, r in zip(counts, strides, kernel, dilations, extra)
        ]
        same = (auto_pad or "NOTSET").startswith("SAME")
        if output_shape or same:
            output_shape = output_shape or [n * s for n, s in zip(counts, strides)]
            for a, (f, o) in enumerate(zip(full, output_shape[-axes:])):
                need = max(f - o, 0)
                front = need // 2 if auto_pad == "SAME_UPPER" else need - need // 2
                pads[a], pads[axes + a] = front, f - o - front
        elif auto_pad == "VALID":
            pads = [0] * (2 * axes)
        n, out = x.shape[0], w.shape[1]
        spread = np.zeros((n, group, out, *(f + max(-p, 0) for f, p in zip(full, pads[axes:]))))
        parts = x.reshape(n, group, w.shape[0] // group, *counts)
        weights = w.reshape(group, -1, out, *kernel)
        for tap, where in self._taps(kernel, strides, dilations, counts):
            spread[(..., *where)] += np.einsum("ngi...,gio->ngo...", parts, weights[(..., *tap)])
        spread = spread.reshape(n, group * out, *spread.shape[3:])
        crop = tuple(slice(p, f - e) for p, e, f in zip(pads[:axes], pads[axes:], full))
        y = spread[(..., *crop)]
        return ((y if b is None else y + b.reshape(-1, *[1] * axes)).astype(x.dtype),)


class MaxPool(_Sliding):
    def _run(
        self,
        x,
        auto_pad=None,
        ceil_mode=None,
        dilations=None,
        kernel_shape=None,
        pads=None,
        storage_order=None,
        strides=None,
    ):
        strides, dilations, pads, counts = self._window(
            x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode
        )
        how = (kernel_shape, strides, dilations, pads, counts)
        values = self._stack(x, *how, -np.inf)
        places = self._stack(np.arange(x.size).reshape(x.shape), *how, -1)
        best = np.argmax(values, axis=-1)[..., None]
        pick = [np.take_along_axis(v, best, -1)[..., 0] for v in (values, places)]
        return tuple(pick[: len(self.onnx_node.output)])


class AveragePool(_Sliding):
    def _run(
        self,
        x,
        auto_pad=None,
        ceil_mode=None,
        count_include_pad=None,
        dilations=None,
        kernel_shape=None,
        pads=None,
        strides=None,
    ):
        strides, dilations, pads, counts = self._window(
            x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode
        )
        axes = len(kernel_shape)
        seen = np.ones(x.shape)
        if count_include_pad:
            around = [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:])]
            x, seen = np.pad(x, around), np.pad(seen, around, constant_values=1)
            pads = [0] * (2 * axes)
        how = (kernel_shape, strides, dilations, pads, counts, 0)
        return ((self._stack(x, *how).sum(-1) / self._stack(seen, *how).sum(-1)).astype(x.dtype),)


class LpPool(_Sliding):
    def _run(
        self,
        x,
        auto_pad=None,
        ceil_mode=None,
        dilations=None,
        kernel_shape=None,
        p=None,
        pads=None,
        strides=None,
    ):
        strides, dilations, pads, counts = self._window(
            x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode
        )
        values = self._stack(np.abs(x) ** p, kernel_shape, strides, dilations, pads, counts, 0)
        return ((values.sum(-1) ** (1 / p)).astype(x.dtype),)


class GlobalMaxPool(OpRun):
    """The original reduces over the wrong axes."""

    def _run(self, x):
        return (np.max(x, tuple(range(2, x.ndim)), keepdims=True),)


class GlobalAveragePool(OpRun):
    """The original refuses an empty batch."""

    def _run(self, x):
        return (np.mean(x, tuple(range(2, x.ndim)), keepdims=True),)


class GlobalLpPool(OpRun):
    """Missing from the original."""

    def _run(self, x, p=None):
        axes = tuple(range(2, x.ndim))
        return ((np.sum(np.abs(x) ** p, axes, keepdims=True) ** (1 / p)).astype(x.dtype),)


class GatherElements(OpRun):
    """The original takes at most 64 indices along an axis."""

    def _run(self, data, indices, axis=None):
        axis %= data.ndim
        inside = tuple(slice(None if a == axis else n) for a, n in enumerate(indices.shape))
        return (np.take_along_axis(data[inside], indices, axis),)


class Pad(OpRun):
    """The original can't crop by negative padding."""

    def _run(self, data, pads, constant_value=None, axes=None, mode=None):
        count = data.ndim if axes is None else len(axes)
        ends = [(0, 0)] * data.ndim
        for k, axis in enumerate(range(data.ndim) if axes is None else axes):
            ends[axis] = (int(pads[k]), int(pads[count + k]))
        widths = [(max(low, 0), max(high, 0)) for low, high in ends]
        fill = {} if constant_value is None else {"constant_values": constant_value.item()}
        data = np.pad(data, widths, **(fill if mode == "constant" else {"mode": mode}))
        crop = [slice(max(-low, 0), n - max(-high, 0)) for (low, high), n in zip(ends, data.shape)]
        return (data[tuple(crop)],)


class Flatten(OpRun):
    """The original can't flatten empty tensors."""

    def _run(self, x, axis=None):
        axis = axis + x.ndim if axis < 0 else axis
        return (x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:])),)


CORRECTED = [
    Flatten,
    Pad,
    GatherElements,
    GlobalMaxPool,
    GlobalAveragePool,
    Erf,
    Gelu,
    Mean,
    LRN,
    LpNormalization,
    Conv,
    ConvTranspose,
    MaxPool,
    AveragePool,
    LpPool,
    GlobalLpPool,
    GroupNormalization,
]
