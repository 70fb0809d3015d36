"""Masks that are maps: small random grids stretched over an input, a layer's maps, a user's own.

What travels of a grid is its cells and how far it is shifted; it is stretched by one product with a
matrix along each axis, in the graph as on the host. Sums over masks are taken of the cells.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from onnxplain.graph.emit import HALVES, Emitter, is_float
from onnxplain.perturb.forms import Block, Form, Sampler

Stretch = Callable[[int, int], np.ndarray]
"""The matrix [new size, old size] that interpolates along an axis."""

Activation = Callable[[np.ndarray], np.ndarray]
"""What is made of scores before they weigh masks."""


@dataclass(frozen=True, eq=False)
class Layout:
    """How grids lie over a source.

    Attributes:
        shape: of the source, without the examples axis.
        axes: its spatial axes, by their place in ``shape``.
        cells: how many cells there are along each; None: each place is a cell, and none is shifted.
        stretch: interpolates cells along an axis.
        channels: the place of its axis of channels, where it has one.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    cells: tuple[int, ...] | None
    stretch: Stretch
    channels: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the spatial axes."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of a sample's cells."""
        return self.sizes if self.cells is None else self.cells

    @property
    def spread(self) -> tuple[int, ...]:
        """The shape that a map has beside the source: 1 along the axes that it does not have."""
        return tuple(n if axis in self.axes else 1 for axis, n in enumerate(self.shape))

    @functools.cached_property
    def tables(self) -> list[np.ndarray]:
        """For each spatial axis and shift the matrix of the mask by the cells, [shifts, size, n].

        As RISE does it (Petsiuk et al. 2018, section 3.2, and TorchRay): the cells, reflected by
        one at either end, are stretched so that all shifts of up to a cell have a mask.
        """
        found = []
        for size, cells in zip(self.sizes, self.cells or (), strict=True):
            shifts = -(-size // cells)
            scale = -(-(size + shifts) // cells)
            mirrored = np.abs(np.r_[1, np.arange(cells), cells - 2]).clip(0, cells - 1)
            wide = self.stretch(cells + 2, scale * (cells + 2)) @ np.eye(cells)[mirrored]
            found.append(np.stack([wide[scale + s : scale + s + size] for s in range(shifts)]))
        return found

    @property
    def shifts(self) -> tuple[int, ...]:
        """How many shifts there are along each axis."""
        return tuple(map(len, self.tables)) if self.cells else ()


@dataclass(frozen=True, eq=False)
class Grid(Form):
    """Random grids. A block holds ``cells.NAME``, bool [S, *grid], and ``shift.NAME``, int64.

    Args:
        layouts: how grids lie over each source.
    """

    layouts: Mapping[str, Layout]

    @property
    def key(self) -> Hashable:
        each = self.layouts.items()
        return ("grid", *((k, v.shape, v.axes, v.cells, v.stretch) for k, v in each))

    def fed(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        found: dict[str, tuple[Any, tuple[int, ...]]] = {}
        for name, layout in self.layouts.items():
            found[f"cells.{name}"] = np.bool_, layout.grid
            if layout.cells is not None:
                found[f"shift.{name}"] = np.int64, (len(layout.axes),)
        return found

    def rows(self, block: Block) -> dict[str, np.ndarray]:
        return {name: block[name] for name in self.fed()}

    def emit(self, op: Emitter, fed: Mapping[str, ir.Value], name: str, like: ir.Value) -> ir.Value:
        layout, dtype = self.layouts[name], _wide(like)
        mask = op.Cast(fed[f"cells.{name}"], to=dtype)
        if layout.cells is not None:
            for axis, before, after in _steps(layout):
                at = op.Gather(fed[f"shift.{name}"], [axis], axis=1)
                stretch = op.Gather(op.const(layout.tables[axis], dtype), at, axis=0)
                cells = op.Reshape(mask, [-1, before, layout.cells[axis], after])
                mask = op.MatMul(stretch, cells)
        return _as_mask(op, op.Reshape(mask, [-1, 1, *layout.spread]), like)

    def masks(
        self,
        rows: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray],
        name: str,
        like: np.ndarray,
    ) -> np.ndarray:
        layout, cells = self.layouts[name], rows[f"cells.{name}"]
        if layout.cells is not None:
            cells = cells.astype(np.float64 if like.dtype == np.float64 else np.float32)
            for axis, before, after in _steps(layout):
                table = layout.tables[axis].astype(cells.dtype)
                stretch = table[rows[f"shift.{name}"][:, axis]]
                flat = cells.reshape(-1, before, layout.cells[axis], after)
                cells = stretch[:, None] @ flat
        mask = cells.reshape(-1, 1, *layout.spread)
        return mask if like.dtype.kind == "f" else mask.astype(bool)

    def sampler(self, seed: int, p: float) -> Sampler:
        """Cells that are kept with probability ``p``, and shifts, all independent and uniform."""
        layouts = self.layouts
        counts = [math.prod(layout.grid) for layout in layouts.values()]
        bounds = [n for layout in layouts.values() for n in layout.shifts]

        def sampler(piece: slice) -> Block:
            from onnxplain.kernels.coalitions import bernoulli, unpack
            from onnxplain.kernels.random import integers

            span = piece.start, piece.stop
            cells = unpack(bernoulli(seed, *span, sum(counts), p), sum(counts))
            shift = integers(seed, *span, bounds)
            block: Block = {}
            first = at = 0
            for (name, layout), count in zip(layouts.items(), counts, strict=True):
                part = cells[:, first : first + count]
                block[f"cells.{name}"] = part.reshape(-1, *layout.grid)
                block[f"shift.{name}"] = shift[:, at : at + len(layout.shifts)]
                first, at = first + count, at + len(layout.shifts)
            return block

        return sampler


def _steps(layout: Layout) -> list[tuple[int, int, int]]:
    """The axes to be stretched, last first: each with how much lies in front of it and behind."""
    assert layout.cells is not None
    return [
        (k, math.prod(layout.cells[:k]), math.prod(layout.sizes[k + 1 :]))
        for k in reversed(range(len(layout.axes)))
    ]


@dataclass(frozen=True, eq=False)
class Masks(Form):
    """Masks of the user's own over one source. A block holds ``mask``, [S, *sizes].

    Args:
        layout: the source, and which of its axes a mask has.
    """

    layout: Layout

    @property
    def key(self) -> Hashable:
        return ("masks", self.layout.shape, self.layout.axes)

    def fed(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        return {"mask": (np.float32, self.layout.sizes)}

    def rows(self, block: Block) -> dict[str, np.ndarray]:
        return {"mask": block["mask"]}

    def emit(self, op: Emitter, fed: Mapping[str, ir.Value], name: str, like: ir.Value) -> ir.Value:
        mask = op.Cast(fed["mask"], to=_wide(like))
        return _as_mask(op, op.Reshape(mask, [-1, 1, *self.layout.spread]), like)

    def masks(
        self,
        rows: Mapping[str, np.ndarray],
        shared: Mapping[str, np.ndarray],
        name: str,
        like: np.ndarray,
    ) -> np.ndarray:
        mask = rows["mask"].reshape(-1, 1, *self.layout.spread)
        return mask if like.dtype.kind == "f" else mask.astype(bool)


@dataclass(frozen=True, eq=False)
class Maps(Form):
    """The maps of each example, stretched over one source and scaled to 0..1.

    A block holds ``map``, int64 [S]: which of an example's maps is the mask.

    Args:
        maps: [N, C, *old sizes].
        channels: the source's axis, counted from the examples, that a mask does not have; None:
            it has all.
        matrices: [new size, old size] for each spatial axis.
    """

    maps: np.ndarray
    channels: int | None
    matrices: Sequence[np.ndarray]

    @property
    def key(self) -> Hashable:
        sizes = tuple(matrix.shape for matrix in self.matrices)
        return ("maps", self.channels, sizes, self.maps.dtype.str)

    def fed(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        return {"map": (np.int64, ())}

    def rows(self, block: Block) -> dict[str, np.ndarray]:
        return {"map": block["map"]}

    def shared(self, examples: np.ndarray) -> dict[str, np.ndarray]:
        return {"maps": self.maps[examples]}

    def emit(self, op: Emitter, fed: Mapping[str, ir.Value], name: str, like: ir.Value) -> ir.Value:
        spatial = list(range(2, 2 + len(self.matrices)))
        maps = op.Gather(op.Cast(fed["maps"], to=_wide(like)), fed["map"], axis=1)
        mask = op.Transpose(maps, perm=[1, 0, *spatial])
        for axis, matrix in zip(spatial, self.matrices, strict=True):
            order = [a for a in (0, 1, *spatial) if a != axis] + [axis]
            moved = op.MatMul(op.Transpose(mask, perm=order), op.const(matrix.T, _wide(like)))
            mask = op.Transpose(moved, perm=np.argsort(order).tolist())
        low = op.ReduceMin(mask, spatial, keepdims=1)
        high = op.ReduceMax(mask, spatial, keepdims=1)
        mask = op.Div(op.Sub(mask, low), op.Add(op.Sub(high, low), 1e-8))
        if self.channels is not None:
            mask = op.Unsqueeze(mask, [1 + self.channels])
        return _as_mask(op, mask, like)


def _wide(like: ir.Value) -> ir.DataType:
    """The dtype in which masks over a value are computed."""
    assert like.dtype is not None
    return like.dtype if is_float(like) and like.dtype not in HALVES else ir.DataType.FLOAT


def _as_mask(op: Emitter, mask: ir.Value, like: ir.Value) -> ir.Value:
    """A mask in the dtype that it must have."""
    wanted = like.dtype if is_float(like) else ir.DataType.BOOL
    return mask if mask.dtype == wanted else op.Cast(mask, to=wanted)


# --- means of masks -----------------------------------------------------------------------------


class Sums(Protocol):
    """Sums of weighted masks over one source."""

    def add(self, block: Block, weights: np.ndarray, which: np.ndarray) -> None:
        """Take in samples: weights [S, M], of the outputs ``which`` [M]."""

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """The sums of weight * mask and of its square, [outputs, places] (or none of these)."""


class _GridSums:
    """Of grids, taken of their cells."""

    def __init__(self, name: str, layout: Layout, outputs: int, moments: bool) -> None:
        from onnxplain.kernels.aggregate import GridSums

        rows, columns = [np.ones((1, 1, 1)), *layout.tables][-2:]
        self._name, self._rank = name, len(layout.axes)
        self._sums = GridSums(outputs, rows, columns, moments)

    def add(self, block: Block, weights: np.ndarray, which: np.ndarray) -> None:
        cells, shift = block[f"cells.{self._name}"], block[f"shift.{self._name}"]
        if self._rank == 1:
            cells, shift = cells[:, None], np.insert(shift, 0, 0, axis=1)
        self._sums.add(cells, shift, weights, which)

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        first, second, _ = (a.reshape(len(a), math.prod(a.shape[1:])) for a in self._sums.maps())
        return first, second


class _MaskSums:
    """Of masks as they are."""

    def __init__(self, name: str, places: int, outputs: int, moments: bool) -> None:
        self._name, self._moments = name, moments
        self._first = np.zeros((outputs, places))
        self._second = np.zeros((outputs if moments else 0, places))

    def add(self, block: Block, weights: np.ndarray, which: np.ndarray) -> None:
        masks = block[self._name].reshape(len(weights), -1).astype(np.float64)
        self._first[which] += weights.T @ masks
        if self._moments:
            self._second[which] += (weights**2).T @ masks**2

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        return self._first, self._second


class MapMeans:
    """The mean over samples of weight * mask, the weight being a function of the score.

    Args:
        form: a :class:`Grid` or :class:`Masks`.
        activation: makes weights of scores.
        moments: whether standard errors are wanted.
        pilot: where not 0, weights are those less their mean: on the way less that of the first so
            many, so that what masks have in common with each other weighs next to nothing.
        kept: the mean of masks, at each place or everywhere; for what the first are off.
    """

    around = True

    def __init__(
        self,
        form: Grid | Masks,
        activation: Activation,
        moments: bool,
        pilot: int = 0,
        kept: float | np.ndarray = 0.0,
    ) -> None:
        self._form, self._activation, self._moments = form, activation, moments
        self._pilot, self._level, self._kept = pilot, np.zeros(0), kept
        self._total = np.zeros(0)
        self._waiting: list[tuple[Block, np.ndarray]] = []
        self._sums: list[Sums] = []
        self._which = np.zeros(0, np.int64)
        self._known: list[np.ndarray] | None = None
        self.drawn = self._outputs = 0

    def add(self, piece: slice, block: Block, scores: np.ndarray) -> None:
        """Take in samples and their scores [S, E, K]."""
        weights = self._activation(scores).reshape(len(scores), -1)
        if not self._sums:
            self._which, self._outputs = np.arange(weights.shape[1]), scores.shape[2]
            self._sums = self._made(weights.shape[1])
        self._waiting.append((block, weights))
        if not self._level.size:
            every = np.concatenate([w for _, w in self._waiting])
            if len(every) < self._pilot:
                return
            some = every[: self._pilot]
            self._level = some.mean(axis=0) if self._pilot else np.zeros(weights.shape[1])
            self._total = np.zeros(weights.shape[1])
        for block, weights in self._waiting:
            gaps = weights - self._level[self._which]
            self._total[self._which] += gaps.sum(axis=0)
            for sums in self._sums:
                sums.add(block, gaps, self._which)
        self._waiting = []
        self.drawn, self._known = piece.stop, None

    def _made(self, outputs: int) -> list[Sums]:
        form, moments = self._form, self._moments
        if isinstance(form, Masks):
            return [_MaskSums("mask", math.prod(form.layout.sizes), outputs, moments)]
        return [
            _MaskSums(f"cells.{k}", math.prod(v.sizes), outputs, moments)
            if v.cells is None
            else _GridSums(k, v, outputs, moments)
            for k, v in form.layouts.items()
        ]

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples."""
        self._which = self._which.reshape(-1, self._outputs)[kept].ravel()

    def _means(self, moment: int) -> np.ndarray:
        """Of weight * mask, or of its square, [E, K, places of all sources]."""
        if self._known is None:
            totals = zip(*(sums.totals() for sums in self._sums), strict=True)
            self._known = [np.concatenate(parts, axis=1) / self.drawn for parts in totals]
        means = self._known[moment][self._which]
        return means.reshape(-1, self._outputs, means.shape[1])

    def result(self) -> np.ndarray:
        """[E, K, places of all sources]."""
        if self.drawn and self._pilot:
            off = (self._total[self._which] / self.drawn).reshape(-1, self._outputs, 1)
            return self._means(0) - off * self._kept
        if self.drawn:
            return self._means(0)
        places = sum(sums.totals()[0].shape[1] for sums in self._sums)
        return np.full((len(self._which) // self._outputs, self._outputs, places), np.nan)

    def standard_error(self) -> np.ndarray | None:
        """Of the mean, of the same shape; None where it was not wanted or is not known yet."""
        if not self._moments or self.drawn < 2:
            return None
        variance = np.maximum(self._means(1) - self._means(0) ** 2, 0)
        found: np.ndarray = np.sqrt(variance / (self.drawn - 1))
        return found
