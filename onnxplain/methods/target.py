"""Which number is explained: targets and neuron selectors as cotangents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxplain.errors import NeuronError, TargetError

Seeds = Callable[[slice], np.ndarray]
"""Makes the cotangent rows of a slice of examples."""


def _integers(target: Any) -> np.ndarray | None:
    """A target as an integer array, or None when it isn't made of integers."""
    try:
        array = np.asarray(target)
    except ValueError:
        return None
    return array if array.dtype.kind in "iu" else None


def target_indices(target: Any, shape: Sequence[int], count: int) -> np.ndarray | None:
    """Targets as indices into the output, [count, number of its non-example axes].

    Args:
        target: int; tuple (one index per axis); array or list with one of these per example; None
            when there is one value per example.
        shape: the output's shape without the examples axis.
        count: number of examples.

    Returns:
        int64 [count, len(shape)], or None when an example has only one value and no axis.

    Raises:
        TargetError: missing, out of range, negative, or of the wrong form; names the shape.
    """
    shown = f"the output has shape [N{''.join(f', {d}' for d in shape)}]"
    if target is None:
        if math.prod(shape) != 1:
            raise TargetError(
                f"no target was given, but {shown}: say which of its {math.prod(shape)} values per "
                "example to explain (target=class index)"
            )
        return np.zeros((count, len(shape)), np.int64) if shape else None
    array = _integers(target)
    if array is None or isinstance(target, bool):
        raise TargetError(
            f"target {target!r} is not an integer, a tuple of integers, or one of these per example"
        )
    if not shape:
        if array.size and (array != 0).any():
            raise TargetError(f"target {target!r} was given, but {shown}: use target=None")
        return None
    if isinstance(target, tuple):
        wanted = array[None] if array.ndim == 1 else array
    elif array.ndim == 0:
        wanted = array.reshape(1, 1)
    elif array.ndim == 1:
        wanted = array[:, None]
    else:
        wanted = array
    if wanted.ndim != 2 or wanted.shape[1] != len(shape):
        raise TargetError(
            f"target {target!r} gives {wanted.shape[-1]} index(es) per example, but {shown}: give "
            f"{'a tuple of ' if len(shape) > 1 else ''}{len(shape)}"
        )
    if wanted.shape[0] not in (1, count):
        raise TargetError(
            f"{wanted.shape[0]} targets were given for {count} examples; give one for all or one "
            "for each"
        )
    wanted = wanted.astype(np.int64)
    if (wanted < 0).any() or (wanted >= np.asarray(shape)).any():
        bad = wanted[((wanted < 0) | (wanted >= np.asarray(shape))).any(axis=1)][0]
        raise TargetError(
            f"target {bad[0] if len(bad) == 1 else tuple(bad.tolist())} is out of range: {shown}, "
            "indices count from 0"
        )
    return np.broadcast_to(wanted, (count, len(shape)))


def target_seeds(indices: np.ndarray | None, shape: Sequence[int], dtype: np.dtype[Any]) -> Seeds:
    """One-hot cotangents, made slice by slice."""

    def seeds(piece: slice) -> np.ndarray:
        rows = piece.stop - piece.start
        if indices is None:
            return np.ones((rows, *shape), dtype)
        out = np.zeros((rows, *shape), dtype)
        out[(np.arange(rows), *indices[piece].T)] = 1
        return out

    return seeds


def select(values: np.ndarray, indices: np.ndarray | None) -> np.ndarray:
    """The explained value of each example: [N, ...] -> [N]."""
    rows = np.arange(len(values))
    return values if indices is None else values[(rows, *indices.T)]


def neuron_mask(selector: Any, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """A cotangent that sums the selected neurons, [1, *shape].

    Args:
        selector: int, or tuple of ints and slices, one per axis after the examples axis.

    Raises:
        NeuronError: it doesn't fit the layer's shape.
    """
    shown = f"the layer has shape [N{''.join(f', {d}' for d in shape)}]"
    parts = selector if isinstance(selector, tuple) else (selector,)
    good = all(
        isinstance(p, slice) or (isinstance(p, int | np.integer) and not isinstance(p, bool))
        for p in parts
    )
    if not good:
        raise NeuronError(
            f"neuron_selector {selector!r} is not an int or a tuple of ints and slices"
        )
    if len(parts) != len(shape):
        raise NeuronError(
            f"neuron_selector {selector!r} has {len(parts)} index(es), but {shown}: give "
            f"{len(shape)}, without the examples axis"
        )
    for part, size in zip(parts, shape, strict=True):
        if not isinstance(part, slice) and not 0 <= part < size:
            raise NeuronError(f"neuron_selector {selector!r} is out of range: {shown}")
    mask = np.zeros((1, *shape), dtype)
    mask[(0, *parts)] = 1
    if not mask.any():
        raise NeuronError(f"neuron_selector {selector!r} selects nothing: {shown}")
    return mask


def mask_seeds(mask: np.ndarray) -> Seeds:
    """The same cotangent for every example."""

    def seeds(piece: slice) -> np.ndarray:
        return np.broadcast_to(mask, (piece.stop - piece.start, *mask.shape[1:]))

    return seeds
