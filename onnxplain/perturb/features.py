"""Features: the parts of the inputs that are switched on and off together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxplain.errors import InputError
from onnxplain.run.feeds import by_name

# The largest number of a feature: with any number of examples, the pairs of both can be counted.
_MOST = 2**31 - 1

Shapes = Mapping[str, tuple[int, ...]]
"""The shape [N, ...] of every source, by name."""


@dataclass(frozen=True)
class Features:
    """The features of some examples, as many for each of them.

    Attributes:
        shapes: the shape [N, ...] of each source (an input, or a layer's value).
        ids: which feature an element belongs to, int64 [1 or E, ...], broadcastable to the source.
        count: how many features an example has; ids are 0 to count - 1.
        given: the user's number of each feature, [1 or E, count].
        examples: which examples these are, [E].
        plain: whether each element is a feature of its own, in order.
    """

    shapes: Shapes
    ids: dict[str, np.ndarray]
    count: int
    given: np.ndarray
    examples: np.ndarray
    plain: bool = False

    def of(self, examples: np.ndarray) -> dict[str, np.ndarray]:
        """The ids of some of these examples, by their places; those that all share are one row."""
        return {k: v if len(v) == 1 else v[examples] for k, v in self.ids.items()}

    def spread(self, values: np.ndarray) -> list[np.ndarray]:
        """Numbers of features, [E, K, count], as arrays [E, K, ...] of each source's shape."""
        if self.plain:
            ends = np.cumsum([math.prod(shape[1:]) for shape in self.shapes.values()])
            parts = zip(np.split(values, ends[:-1], axis=2), self.shapes.values(), strict=True)
            return [part.reshape(*values.shape[:2], *shape[1:]) for part, shape in parts]
        out = []
        for name, ids in self.ids.items():
            flat = ids.reshape(len(ids), 1, -1)
            if len(ids) == 1:
                found = values[:, :, flat[0, 0]]
            else:
                found = np.take_along_axis(
                    values, np.broadcast_to(flat, values.shape[:2] + flat.shape[2:]), 2
                )
            found = found.reshape(*values.shape[:2], *ids.shape[1:])
            out.append(np.broadcast_to(found, values.shape[:2] + self.shapes[name][1:]))
        return out

    def sums(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Sums of arrays [E, ...] over each feature, float64 [E, count]."""
        rows = len(next(iter(arrays.values())))
        total = np.zeros(rows * self.count)
        offset = np.arange(rows).reshape(-1, 1) * self.count
        for name, array in arrays.items():
            ids = np.broadcast_to(self.ids[name], array.shape).reshape(rows, -1) + offset
            total += np.bincount(ids.ravel(), array.ravel().astype(np.float64), len(total))
        return total.reshape(rows, self.count)


def features_of(
    shapes: Shapes,
    mask: Any = None,
    *,
    across: bool = True,
    together: bool = False,
    what: str = "feature_mask",
) -> list[Features]:
    """The features of examples, in groups of examples that have equally many.

    Args:
        shapes: the shape [N, ...] of each source.
        mask: integers that number the features: an array (one source), or a tuple or dict with one
            for each, of the source's shape or broadcastable to it, without the examples axis or
            with one of length 1 or N. Numbers may be left out; each that occurs is a feature. None:
            each element is a feature of its own.
        across: the same number in several sources is one feature; else one in each of them.
        together: one group of all examples, each with all numbers that occur in any of them.
        what: what the mask is called in errors.

    Raises:
        InputError: it is missing for a source, of another shape, not integers, or negative.
    """
    count = next(iter(shapes.values()))[0]
    if mask is None:
        return [_each_element(shapes)]
    given, _ = by_name(mask, list(shapes), what)
    missing = [name for name in shapes if name not in given]
    if missing:
        raise InputError(
            f"{what}: none was given for '{missing[0]}'; give one for each of "
            f"{', '.join(shapes)}, as a tuple or dict (equal numbers are one feature)"
        )
    ids = {name: _checked(given[name], shapes[name], f"{what} of '{name}'") for name in shapes}
    if not across:
        ids, start = {}, 0
        for name in shapes:
            array = _checked(given[name], shapes[name], f"{what} of '{name}'")
            ids[name] = array + start
            start += int(array.max(initial=-1)) + 1
    if not any(array.size for array in ids.values()):
        raise InputError(f"{what}: the explained inputs are empty, so there is no feature")
    rows = max(len(array) for array in ids.values())
    if together:
        given_numbers = np.unique(np.concatenate([a.ravel() for a in ids.values()]))
        places = {name: np.searchsorted(given_numbers, a) for name, a in ids.items()}
        everyone = np.arange(count)
        return [Features(shapes, places, len(given_numbers), given_numbers[None], everyone)]
    flat = [np.broadcast_to(a.reshape(len(a), -1), (rows, a[0].size)) for a in ids.values()]
    numbers = np.concatenate(flat, axis=1)
    width = int(numbers.max()) + 1
    pairs, local = np.unique(
        numbers + np.arange(rows)[:, None] * width, return_inverse=True
    )  # (example, number), those of an example next to each other
    owner = pairs // width
    starts = np.searchsorted(owner, np.arange(rows + 1))
    counts = np.diff(starts)
    local = local.reshape(numbers.shape) - starts[:-1, None]
    groups = []
    for size in np.unique(counts):
        which = np.flatnonzero(counts == size)
        local_ids, start = {}, 0
        for name, array in ids.items():
            part = local[which, start : start + array[0].size]
            start += array[0].size
            local_ids[name] = part.reshape(len(which), *array.shape[1:])
        mine = (pairs % width)[np.isin(owner, which)].reshape(len(which), size)
        examples = np.arange(count) if rows == 1 else which
        groups.append(Features(shapes, local_ids, int(size), mine, examples))
    return groups


def _each_element(shapes: Shapes) -> Features:
    ids, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape[1:]))
        ids[name] = np.arange(start, start + size).reshape(1, *shape[1:])
        start += size
    if not start:
        raise InputError("the explained inputs are empty, so there is no feature")
    first = next(iter(shapes.values()))
    return Features(shapes, ids, start, np.arange(start)[None], np.arange(first[0]), plain=True)


def _checked(given: Any, shape: Sequence[int], what: str) -> np.ndarray:
    """One mask as int64 [1 or N, ...], axes of length 1 kept."""
    array = np.asarray(given)
    if array.dtype.kind not in "iub":
        raise InputError(
            f"{what}: dtype {array.dtype} was given, but features are numbered by integers; "
            "convert it (mask.astype(int))"
        )
    array = array.astype(np.int64)
    if array.size and array.min() < 0:
        raise InputError(
            f"{what}: it holds {int(array.min())}, but features are numbered from 0; shift it "
            "(mask - mask.min()), and give what never changes as a feature of its own or in "
            "additional_forward_args"
        )
    if array.size and array.max() > _MOST:
        raise InputError(
            f"{what}: it holds {int(array.max())}, more than {_MOST}; number the features anew "
            "(np.unique(mask, return_inverse=True))"
        )
    full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if full.ndim != len(shape) or any(
        a not in (1, b) for a, b in zip(full.shape, shape, strict=True)
    ):
        raise InputError(
            f"{what}: shape {list(array.shape)} was given for values of shape {list(shape)}; give "
            f"{list(shape[1:])}, with an examples axis of 1 or {shape[0]} in front where each "
            "example has its own, or an array that broadcasts to it"
        )
    return full
