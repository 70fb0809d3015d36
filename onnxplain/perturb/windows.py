"""Sliding windows: which boxes of the inputs are covered, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxplain.errors import InputError
from onnxplain.perturb.forms import Block


@dataclass(frozen=True)
class SlidingWindows:
    """The windows of several sources, those of one after those of the other.

    Attributes:
        shapes: of each source, without the examples axis.
        sizes, strides: of the windows of each.
        steps: how many there are along each axis.
    """

    shapes: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, tuple[int, ...]]
    strides: Mapping[str, tuple[int, ...]]
    steps: Mapping[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """How many windows there are."""
        return sum(int(np.prod(s)) for s in self.steps.values())

    @property
    def whole(self) -> dict[str, tuple[bool, ...]]:
        """The axes of each source that every window of it covers from end to end."""
        alone = len(self.shapes) == 1  # else the windows of the others leave it as it is
        return {
            k: tuple(alone and a == b for a, b in zip(s, self.sizes[k], strict=True))
            for k, s in self.shapes.items()
        }

    def sampler(self, piece: slice) -> Block:
        """Sample 0 has no window; sample n + 1 has window n."""
        block, first = {}, 1
        numbers = np.arange(piece.start, piece.stop)
        for name, steps in self.steps.items():
            total = int(np.prod(steps))
            mine = (numbers >= first) & (numbers < first + total)
            at = np.stack(
                np.unravel_index(np.where(mine, numbers - first, 0), steps or (1,)), axis=1
            )
            at = at[:, : len(steps)]
            lo = at * np.asarray(self.strides[name], np.int64)
            hi = np.minimum(lo + np.asarray(self.sizes[name]), np.asarray(self.shapes[name]))
            block[f"lo.{name}"] = np.where(mine[:, None], lo, 0).astype(np.int64)
            block[f"hi.{name}"] = np.where(mine[:, None], hi, 0).astype(np.int64)
            first += total
        return block


def sliding_windows(
    shapes: Mapping[str, tuple[int, ...]], sizes: Any, strides: Any = None
) -> SlidingWindows:
    """Windows of a size that move by a stride over each source.

    Args:
        shapes: of the sources, without the examples axis.
        sizes: a tuple of lengths (one source), or a tuple or dict of these.
        strides: None (1), a number, a tuple of numbers (one source), or a tuple or dict of these.

    Raises:
        InputError: they don't fit the sources.
    """
    for name, shape in shapes.items():
        if not shape:
            raise InputError(
                f"input '{name}' has one number for each example, so no window can slide over it: "
                "use feature-ablation"
            )
    found_sizes = {
        k: _lengths(v, shapes[k], "sliding_window_shapes", k) for k, v in _each(shapes, sizes)
    }
    found_strides, steps = {}, {}
    given = dict(_each(shapes, strides)) if strides is not None else dict.fromkeys(shapes, 1)
    for name, shape in shapes.items():
        size, stride = found_sizes[name], given[name]
        wide = (stride,) * len(shape) if isinstance(stride, int | np.integer) else stride
        wide = (1,) * len(shape) if wide is None else wide
        stride = _lengths(wide, shape, "strides", name)
        for axis, (n, w, s) in enumerate(zip(shape, size, stride, strict=True)):
            if w > n:
                raise InputError(
                    f"sliding_window_shapes: {list(size)} was given for '{name}' of shape "
                    f"{list(shape)}, but a window can't be larger than the input (axis {axis}: {w} "
                    f"of {n}); give at most {list(shape)}"
                )
            if w < n and s > w:
                raise InputError(
                    f"strides: {list(stride)} was given for windows {list(size)} of '{name}', "
                    f"which leaves out values between them (axis {axis}); give at most the "
                    "window's length"
                )
        found_strides[name] = stride
        steps[name] = tuple(
            -(-(n - w) // s) + 1 for n, w, s in zip(shape, size, stride, strict=True)
        )
    return SlidingWindows(shapes, found_sizes, found_strides, steps)


def _each(shapes: Mapping[str, Any], given: Any) -> list[tuple[str, Any]]:
    """What was given for each source."""
    names = list(shapes)
    if isinstance(given, Mapping):
        missing = [k for k in names if k not in given] + [k for k in given if k not in names]
        if missing:
            raise InputError(f"windows are given for {list(given)}; the inputs are {names}")
        return [(k, given[k]) for k in names]
    if isinstance(given, int | np.integer):
        return [(k, given) for k in names]
    if not isinstance(given, Sequence | np.ndarray) or isinstance(given, str):
        raise InputError(f"a window is a tuple of lengths, one for each axis, not {given!r}")
    nested = any(isinstance(g, Sequence | np.ndarray) or g is None for g in given)
    if len(names) == 1 and not (nested and len(given) == 1):
        return [(names[0], tuple(given))]
    if len(given) != len(names):
        raise InputError(
            f"{len(given)} windows or strides were given for {len(names)} inputs "
            f"({', '.join(names)}); give one for each"
        )
    return list(zip(names, given, strict=True))


def _lengths(given: Any, shape: Sequence[int], what: str, name: str) -> tuple[int, ...]:
    parts = tuple(given) if isinstance(given, Sequence | np.ndarray) else (given,)
    whole = all(isinstance(p, int | np.integer) and not isinstance(p, bool) for p in parts)
    if not whole or len(parts) != len(shape) or any(p < 1 for p in parts):
        raise InputError(
            f"{what}: {given!r} was given for '{name}' of shape {list(shape)} (without the "
            f"examples axis); give {len(shape)} positive integers"
        )
    return tuple(int(p) for p in parts)
