"""Scores of perturbed inputs as running sums, from which attributions and standard errors follow.

Every sum is over the samples in their order: it does not depend on the number of threads, nor on
how a run is cut into calls. Scores are float64 [samples, outputs], where outputs counts all numbers
that are explained by the same samples (examples times outputs).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import prange

from onnxplain.errors import InputError

from .jit import kernel, parallel

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def _in_place(name: str, array: Floats, shape: tuple[int, ...]) -> Floats:
    """An array that is added to: as it is, or refused."""
    if array.dtype != np.float64 or not array.flags.c_contiguous or array.shape != shape:
        raise InputError(
            f"{name} is {array.dtype} {array.shape}: give a contiguous float64 array {shape}"
        )
    return array


def _scores(scores: npt.ArrayLike, samples: int) -> Floats:
    scores = np.ascontiguousarray(scores, np.float64)
    if scores.ndim < 2 or len(scores) != samples:
        raise InputError(f"scores of shape {scores.shape} for {samples} samples")
    return scores


@parallel
def _window_sums(lo: Any, hi: Any, values: Any, shape: Any, total: Any, count: Any) -> None:
    outputs, inner = total.shape[0], shape.shape[0] - 1
    for m in prange(outputs + 1):  # the last one counts
        for s in range(lo.shape[0]):
            rows = 1
            for d in range(inner):
                rows *= hi[s, d] - lo[s, d]
            for row in range(rows):
                left, begin, stride = row, lo[s, inner], shape[inner]
                for d in range(inner - 1, -1, -1):
                    extent = hi[s, d] - lo[s, d]
                    begin += (lo[s, d] + left % extent) * stride
                    left //= extent
                    stride *= shape[d]
                for i in range(begin, begin + hi[s, inner] - lo[s, inner]):
                    if m < outputs:
                        total[m, i] += values[s, m]
                    else:
                        count[i] += 1


def window_sums(lo: Integers, hi: Integers, values: Floats, total: Floats, count: Floats) -> None:
    """Occlusion: adds each window's value to the features that it covers (Zeiler, Fergus 2014).

    - lo, hi: corners of the windows [samples, rank], the upper one exclusive.
    - values: [samples, outputs].
    - total [outputs, *shape] and count [*shape] are added to; shape has the rank of the corners.
    """
    values = _scores(values, len(lo))
    shape, outputs = count.shape, values.shape[1]
    lo, hi = np.asarray(lo, np.int64), np.asarray(hi, np.int64)
    if lo.shape != (len(values), len(shape)) or hi.shape != lo.shape:
        raise InputError(f"corners of shapes {lo.shape} and {hi.shape} in an array {shape}")
    if (lo < 0).any() or (lo > hi).any() or (hi > shape).any():
        raise InputError(f"a window leaves the array {shape}: give 0 <= lo <= hi <= shape")
    # One more axis in front, so that there is one.
    lo, hi = np.insert(lo, 0, 0, axis=1), np.insert(hi, 0, 1, axis=1)
    flat = _in_place("total", total, (outputs, *shape)).reshape(outputs, -1)
    counted = _in_place("count", count, shape).reshape(-1)
    _window_sums(lo, hi, values, np.array((1, *shape), np.int64), flat, counted)


@kernel
def _marginals(order: Any, scores: Any, group: int, total: Any, squares: Any) -> None:
    outputs, features = total.shape
    mean = np.empty((outputs, features))
    for first in range(0, order.shape[0], group):
        mean[:] = 0
        for p in range(first, first + group):
            for j in range(features):
                for m in range(outputs):
                    mean[m, order[p, j]] += scores[p, j + 1, m] - scores[p, j, m]
        for m in range(outputs):
            for f in range(features):
                total[m, f] += mean[m, f]
                squares[m, f] += (mean[m, f] / group) ** 2


def marginals(
    order: npt.NDArray[np.int32], scores: Floats, total: Floats, squares: Floats, group: int = 1
) -> None:
    """What each feature adds when it joins, in each permutation (Castro et al. 2009).

    - order: permutations [P, F].
    - scores: [P, F + 1, outputs], from the empty coalition to the full one along the order.
    - total [outputs, F]: the contributions are added.
    - squares [outputs, F]: the squares of their means over each ``group`` of successive
      permutations are added. What a group holds may be dependent (antithetic pairs: 2, stratified
      blocks: F); the variance between groups is what the standard error follows from.
    """
    order = np.ascontiguousarray(order, np.int32)
    scores = _scores(scores, len(order))
    number, features = order.shape
    if scores.shape[:2] != (number, features + 1) or scores.ndim != 3:
        raise InputError(f"scores of shape {scores.shape} along permutations {order.shape}")
    if group < 1 or number % group:
        raise InputError(f"{number} permutations in groups of {group}: give whole groups")
    shape = scores.shape[2], features
    _marginals(
        order, scores, group, _in_place("total", total, shape), _in_place("squares", squares, shape)
    )


@kernel
def _grid_sums(
    cells: Any, shift: Any, scores: Any, which: Any, sums: Any, squares: Any, masks: Any
) -> None:
    height, width = squares.shape[3:]
    moments = squares.shape[0] > 0
    products = np.empty((height, width))
    for s in range(cells.shape[0]):
        c, y, x = cells[s], shift[s, 0], shift[s, 1]
        for p in range(height if moments else 0):
            a, b = p // 2, (p + 1) // 2
            for r in range(width):
                i, j = r // 2, (r + 1) // 2
                twice = 0.5 * (1 + p % 2) * (1 + r % 2)
                products[p, r] = twice * (c[a, i] * c[b, j] + c[a, j] * c[b, i])
        for k in range(which.shape[0]):
            m, score = which[k], scores[s, k]
            for a in range(c.shape[0]):
                for i in range(c.shape[1]):
                    sums[m, y, x, a, i] += score * c[a, i]
                    if moments:
                        masks[m, y, x, a, i] += c[a, i]
            for p in range(height if moments else 0):
                for r in range(width):
                    squares[m, y, x, p, r] += score * score * products[p, r]


def _squared(table: Floats) -> Floats:
    """The table [shifts, size, 2 cells - 1] by which squares of masks are interpolated.

    A square is a sum over pairs of cells, and an interpolation reaches from a cell to the next one
    only: column 2a is for cell a with itself, 2a + 1 for the cells a and a + 1.
    """
    out = np.empty((*table.shape[:2], 2 * table.shape[2] - 1))
    out[..., ::2] = table**2
    out[..., 1::2] = table[..., :-1] * table[..., 1:]
    pairs = out[..., ::2].sum(-1) + 2 * out[..., 1::2].sum(-1)
    if not np.allclose(pairs, table.sum(-1) ** 2) or (table < 0).any():
        raise InputError("each row of an interpolation table may join two neighbouring cells only")
    return out


class GridSums:
    """RISE's sums over masks that are interpolated from small grids of cells.

    Petsiuk, Das, Saenko, "RISE: randomized input sampling for explanation of black-box models"
    (BMVC 2018). The mask of a sample is ``rows[y] @ cells @ columns[x].T`` with its shift (y, x).
    It is linear in the cells, so the cells are summed, one grid for each shift, and interpolated
    once at the end: no mask is ever made here. Squares of masks are linear in products of
    neighbouring cells and go the same way. Memory: about 5.5 maps of float64 for each output.

    - rows: [shifts, H, h], columns: [shifts, W, w]; at most two neighbouring nonzeros in a row,
      none negative. For series, tables and text H = h = 1.
    - moments: whether squares and masks are summed too; else they take no memory, and ``maps``
      gives empty arrays of them.
    """

    def __init__(
        self, outputs: int, rows: npt.ArrayLike, columns: npt.ArrayLike, moments: bool = True
    ) -> None:
        self._rows = np.ascontiguousarray(rows, np.float64)
        self._columns = np.ascontiguousarray(columns, np.float64)
        if self._rows.ndim != 3 or self._columns.ndim != 3:
            raise InputError(
                f"interpolation tables of shapes {self._rows.shape} and {self._columns.shape}: "
                "give [shifts, size, cells]"
            )
        self._rows2, self._columns2 = _squared(self._rows), _squared(self._columns)
        shifts = len(self._rows), len(self._columns)
        self._cells = self._rows.shape[2], self._columns.shape[2]
        self._sums = np.zeros((outputs, *shifts, *self._cells))
        self._masks = np.zeros((outputs if moments else 0, *shifts, *self._cells))
        pairs = (2 * n - 1 for n in self._cells)
        self._squares = np.zeros((outputs if moments else 0, *shifts, *pairs))

    def add(
        self,
        cells: npt.NDArray[Any],
        shift: Integers,
        scores: Floats,
        which: Integers | None = None,
    ) -> None:
        """Adds samples: cells [samples, h, w], shift [samples, 2] as (y, x), scores.

        which: the outputs that the columns of scores belong to; default, all in order.
        """
        scores = _scores(scores, len(cells))
        cells = np.ascontiguousarray(cells, np.float64)
        shift = np.ascontiguousarray(shift, np.int64)
        outputs, shifts = len(self._sums), self._sums.shape[1:3]
        which = np.arange(outputs) if which is None else np.ascontiguousarray(which, np.int64)
        if cells.shape[1:] != self._cells or shift.shape != (len(cells), 2):
            raise InputError(f"cells {cells.shape} and shift {shift.shape} for grids {self._cells}")
        if (shift < 0).any() or (shift >= shifts).any():
            raise InputError(f"a shift is outside of the tables, which have {shifts}")
        if scores.shape[1:] != which.shape or (which < 0).any() or (which >= outputs).any():
            raise InputError(f"scores of shape {scores.shape} for {outputs} outputs")
        _grid_sums(cells, shift, scores, which, self._sums, self._squares, self._masks)

    def maps(self) -> tuple[Floats, Floats, Floats]:
        """Sums of score * mask, of (score * mask)^2 and of mask so far, each [outputs, H, W]."""
        return (
            _spread_out(self._sums, self._rows, self._columns),
            _spread_out(self._squares, self._rows2, self._columns2),
            _spread_out(self._masks, self._rows, self._columns),
        )


def _spread_out(sums: Floats, rows: Floats, columns: Floats) -> Floats:
    """The sum over shifts (y, x) of rows[y] @ sums[:, y, x] @ columns[x].T."""
    outputs, ny, nx, height, width = sums.shape
    flat = sums.transpose(0, 1, 3, 2, 4).reshape(outputs, ny * height, nx * width)
    down = rows.transpose(1, 0, 2).reshape(-1, ny * height)
    across = columns.transpose(0, 2, 1).reshape(nx * width, -1)
    return down @ (flat @ across)
