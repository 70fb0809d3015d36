"""Interpolation of maps to another size, as ``torch.nn.functional.interpolate`` does it.

Every mode is linear and separable: one matrix for each axis, and a product with each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError
from onnxplain.graph.emit import Emitter


def _centers(size: int, out: int) -> np.ndarray:
    """Where the centers of the new pixels lie among the old ones."""
    return (np.arange(out) + 0.5) * (size / out) - 0.5


def _taps(size: int, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The matrix of [out, taps] weights at positions that the border repeats."""
    matrix = np.zeros((len(indices), size))
    rows = np.arange(len(indices))[:, None]
    np.add.at(matrix, (rows, indices.clip(0, size - 1)), weights)
    return matrix


def _nearest(size: int, out: int) -> np.ndarray:
    # In single precision, as torch: now and then it rounds across a pixel's border.
    at = np.arange(out, dtype=np.float32) * np.float32(size / out)
    return np.eye(size)[at.astype(int).clip(0, size - 1)]


def _linear(size: int, out: int) -> np.ndarray:
    at = _centers(size, out).clip(0)[:, None]
    low = np.floor(at).astype(int)
    return _taps(size, low + np.arange(2), np.hstack([1 - (at - low), at - low]))


def _cubic(size: int, out: int, a: float = -0.75) -> np.ndarray:
    at = _centers(size, out)[:, None]
    indices = np.floor(at).astype(int) + np.arange(-1, 3)
    d = np.abs(at - indices)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return _taps(size, indices, np.where(d <= 1, near, far))


def _area(size: int, out: int) -> np.ndarray:
    """Adaptive average pooling: the mean of every old pixel that a new one touches."""
    new, old = np.arange(out)[:, None], np.arange(size)
    touched = (old >= new * size // out) & (old < -(-(new + 1) * size // out))
    return np.asarray(touched / touched.sum(axis=1, keepdims=True))


# The matrix of one axis, and the number of axes that torch has the mode for (None: any).
MODES: dict[str, tuple[Callable[[int, int], np.ndarray], int | None]] = {
    "nearest": (_nearest, None),
    "area": (_area, None),
    "linear": (_linear, 1),
    "bilinear": (_linear, 2),
    "trilinear": (_linear, 3),
    "bicubic": (_cubic, 2),
}


def check_mode(mode: str, axes: int | None, name: str = "interpolate_mode") -> None:
    """Refuse a mode that is unknown or not defined for so many spatial axes (None: any number).

    ``name`` is what the user calls it.
    """
    if mode not in MODES:
        raise InputError(f"{name} is one of {', '.join(MODES)}, not {mode!r}")
    if axes is not None and MODES[mode][1] not in (None, axes):
        possible = ", ".join(name for name, (_, count) in MODES.items() if count in (None, axes))
        raise InputError(
            f"{name} '{mode}' interpolates {MODES[mode][1]} spatial axes, and there are {axes}: "
            f"use {possible}"
        )


def chosen_mode(mode: str | None, axes: int) -> str:
    """A checked mode; None is the linear one for so many spatial axes."""
    mode = mode or {1: "linear", 2: "bilinear", 3: "trilinear"}.get(axes, "nearest")
    check_mode(mode, axes)
    return mode


def matrices(shape: Sequence[int], sizes: Sequence[int], mode: str) -> list[np.ndarray]:
    """One matrix [new size, old size] for each spatial axis, float64.

    Raises:
        InputError: unknown mode, a mode for another number of axes, or a size below 1.
    """
    check_mode(mode, len(shape))
    if len(shape) != len(sizes) or min((*shape, *sizes), default=0) < 1:
        raise InputError(f"can't interpolate spatial axes {list(shape)} to {list(sizes)}")
    return [MODES[mode][0](int(old), int(new)) for old, new in zip(shape, sizes, strict=True)]


def aligned(size: int, out: int) -> np.ndarray:
    """The linear matrix [out, size] that keeps the centers of the corners (``align_corners``)."""
    at = np.linspace(0, size - 1, out)[:, None]
    low = np.floor(at).astype(int)
    return _taps(size, low + np.arange(2), np.hstack([1 - (at - low), at - low]))


def smoothing(size: int, sigma: float) -> np.ndarray:
    """The matrix [size, size] of a Gaussian filter of one axis, whose border repeats.

    It ends at four standard deviations (``sigma``, in pixels), as TorchRay's does.
    """
    width = int(np.ceil(4 * sigma))
    offsets = np.arange(-width, width + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2) if sigma > 0 else np.ones(1)
    return _taps(size, np.arange(size)[:, None] + offsets, weights / weights.sum())


def interpolate(array: np.ndarray, sizes: int | Sequence[int], mode: str = "nearest") -> np.ndarray:
    """``array`` [N, C, *spatial] at other spatial sizes.

    Args:
        array: [N, C, *spatial], floating-point, one spatial axis or more.
        sizes: the new size of each spatial axis; one integer is for all of them.
        mode: "nearest", "area" (any number of axes), "linear" (1), "bilinear", "bicubic" (2) or
            "trilinear" (3), with the pixel centers of torch's ``align_corners=False``.

    Returns:
        [N, C, *sizes], in the array's dtype.

    Raises:
        InputError: see :func:`matrices`; also without spatial axes.
    """
    array = np.asarray(array)
    spatial = array.shape[2:]
    new = (sizes,) * len(spatial) if isinstance(sizes, int | np.integer) else tuple(sizes)
    if not spatial:
        raise InputError(
            f"an array of shape {list(array.shape)} has no spatial axes to interpolate: give "
            "[N, C, *spatial]"
        )
    dtype = array.dtype if array.dtype.kind == "f" else np.dtype(np.float32)
    for axis, matrix in enumerate(matrices(spatial, new, mode), start=2):
        array = np.moveaxis(np.tensordot(array, matrix, (axis, 1)), -1, axis)
    return np.ascontiguousarray(array, dtype)


def emit_interpolate(
    op: Emitter, value: ir.Value, shape: Sequence[int], sizes: Sequence[int], mode: str
) -> ir.Value:
    """The same in a graph: ``value`` [N, C, *shape] to [N, C, *sizes]."""
    return emit_along(op, value, matrices(shape, sizes, mode))


def emit_along(op: Emitter, value: ir.Value, by_axis: Sequence[np.ndarray]) -> ir.Value:
    """``value`` [N, C, *spatial] times one matrix along each spatial axis."""
    assert value.dtype is not None
    count = len(by_axis)
    last = 1 + count
    for axis, matrix in enumerate(by_axis, start=2):
        order = list(range(2 + count))
        order[axis], order[last] = last, axis
        moved = op.Transpose(value, perm=order) if axis != last else value
        moved = op.MatMul(moved, op.const(matrix.T, value.dtype))
        value = op.Transpose(moved, perm=order) if axis != last else moved
    return value


class LayerAttribution:
    """A layer's attributions at another size: ``LayerAttribution.interpolate``, as in Captum."""

    @staticmethod
    def interpolate(
        layer_attribution: np.ndarray,
        interpolate_dims: int | Sequence[int],
        interpolate_mode: str = "nearest",
    ) -> np.ndarray:
        """A layer's attributions [N, C, *spatial] at the size of an input.

        Args:
            layer_attribution: [N, C, *spatial].
            interpolate_dims: the new size of each spatial axis; one integer is for all of them.
            interpolate_mode: "nearest", "area", "linear" (one spatial axis), "bilinear",
                "bicubic" (two) or "trilinear" (three).

        Returns:
            [N, C, *interpolate_dims].

        Raises:
            InputError: the mode is unknown or does not fit the number of axes.
        """
        return interpolate(layer_attribution, interpolate_dims, interpolate_mode)
