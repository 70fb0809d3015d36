"""Aggregators: how the scores of samples become attributions, as running sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from onnxplain.perturb.forms import Block


class Differences:
    """What is lost when a feature goes: sample 0 has all features, sample f + 1 lacks f.

    Args:
        features: how many there are.
    """

    drawn = None

    def __init__(self, features: int) -> None:
        self._features = features
        self._full: np.ndarray = np.empty((0, 0))
        self._values: np.ndarray = np.empty((0, 0, 0))

    def add(self, piece: slice, block: Block, scores: np.ndarray) -> None:
        """Take in samples and their scores [S, E, K]."""
        start = piece.start
        if start == 0:
            self._full, scores, start = scores[0], scores[1:], 1
            self._values = np.full((*self._full.shape, self._features), np.nan)
        lost = self._full - scores
        self._values[:, :, start - 1 : start - 1 + len(lost)] = np.moveaxis(lost, 0, -1)

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples."""
        self._full, self._values = self._full[kept], self._values[kept]

    def result(self) -> np.ndarray:
        """[E, K, F]."""
        return self._values

    def standard_error(self) -> None:
        """Nothing is random."""


class WindowMeans:
    """What is lost where windows go, averaged over the windows that cover an element.

    Sample 0 has no window.

    Args:
        shapes: the shape of each source without the examples axis.
    """

    drawn = None

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._full: np.ndarray = np.empty((0, 0))
        self._totals: dict[str, np.ndarray] = {}
        self._counts = {name: np.zeros(shape) for name, shape in shapes.items()}

    def add(self, piece: slice, block: Block, scores: np.ndarray) -> None:
        """Take in samples and their scores [S, E, K]."""
        from onnxplain.kernels.aggregate import window_sums

        if piece.start == 0:
            self._full = scores[0]
            rows = self._full.size
            self._totals = {name: np.zeros((rows, *s)) for name, s in self._shapes.items()}
        lost = (self._full - scores).reshape(len(scores), -1)
        for name, total in self._totals.items():
            window_sums(block[f"lo.{name}"], block[f"hi.{name}"], lost, total, self._counts[name])

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples."""
        outputs = self._full.shape[1]
        self._full = self._full[kept]
        self._totals = {k: v[np.repeat(kept, outputs)] for k, v in self._totals.items()}

    def result(self) -> np.ndarray:
        """[E, K, elements of all sources]."""
        with np.errstate(invalid="ignore"):
            means = [self._totals[k] / self._counts[k] for k in self._shapes]
        flat = [m.reshape(*self._full.shape, -1) for m in means]
        return np.concatenate(flat, axis=2)

    def standard_error(self) -> None:
        """Nothing is random."""


class ExactShapley:
    """Shapley values from the scores of all coalitions, in any order.

    Args:
        features: how many there are.
    """

    drawn = None

    def __init__(self, features: int) -> None:
        self._features = features
        size = np.arange(features + 1)
        log = np.array([math.lgamma(k + 1) for k in range(features + 1)])
        ways = np.exp(log[-1] - log - log[::-1])  # coalitions of a size
        self._joined = 1 / (np.maximum(size, 1) * ways)
        self._absent = -1 / (np.maximum(features - size, 1) * ways)
        self._sums: np.ndarray = np.zeros((0, 0, 0))
        self._seen = 0

    def add(self, piece: slice, block: Block, scores: np.ndarray) -> None:
        """Take in coalitions and their scores [S, E, K]."""
        from onnxplain.kernels.coalitions import unpack

        present = unpack(block["z"], self._features)
        size = present.sum(axis=1)[:, None]
        weights = np.where(present, self._joined[size], self._absent[size])
        part = np.tensordot(scores, weights, axes=(0, 0))
        self._sums = self._sums + part if self._seen else part
        self._seen += len(present)

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples."""
        self._sums = self._sums[kept]

    def result(self) -> np.ndarray:
        """[E, K, F]; nothing is known before all coalitions are."""
        complete = self._seen == 1 << self._features
        return self._sums if complete else np.full_like(self._sums, np.nan)

    def standard_error(self) -> None:
        """Nothing is random."""


class Marginals:
    """What each feature adds when it joins, averaged over orders.

    Sample 0 is the empty coalition and sample 1 the full one; then those between, order by order.

    Args:
        features: how many there are.
        orders: makes the orders of a range, int32 [P, F].
        group: how many successive orders may depend on each other.
        count: how many orders there will be.
    """

    def __init__(
        self, features: int, orders: Callable[[int, int], np.ndarray], group: int, count: int
    ) -> None:
        self._features, self._orders, self._group = features, orders, group
        self._count = count
        self._ends: np.ndarray = np.zeros((0, 0, 0))
        self._waiting: np.ndarray = np.zeros((0, 0, 0))
        self._total: np.ndarray = np.zeros((0, 0))
        self._squares: np.ndarray = np.zeros((0, 0))
        self.drawn = 0

    def add(self, piece: slice, block: Block, scores: np.ndarray) -> None:
        """Take in coalitions and their scores [S, E, K]."""
        from onnxplain.kernels.aggregate import marginals

        if piece.start == 0:
            self._ends, self._waiting = scores[:2], scores[:0]
            rows = scores[0].size
            self._total = np.zeros((rows, self._features))
            self._squares = np.zeros((rows, self._features))
            scores = scores[2:]
        elif piece.start == 1:
            self._ends, scores = np.concatenate([self._ends, scores[:1]]), scores[1:]
        if len(self._ends) < 2:
            return
        self._waiting = np.concatenate([self._waiting, scores])
        inner = self._features - 1
        if not inner:  # a single feature adds all there is, in every order
            ready = self._count - self.drawn
        else:
            ready = len(self._waiting) // (inner * self._group) * self._group
        if not ready:
            return
        rows, used = len(self._total), ready * inner
        line = np.empty((ready, self._features + 1, rows))
        line[:, 0], line[:, -1] = self._ends.reshape(2, rows)
        line[:, 1:-1] = self._waiting[:used].reshape(ready, inner, rows)
        order = self._orders(self.drawn, self.drawn + ready)
        marginals(order, line, self._total, self._squares, self._group)
        self._waiting = self._waiting[used:]
        self.drawn += ready

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples."""
        rows = np.repeat(kept, self._ends.shape[2])
        self._ends, self._waiting = self._ends[:, kept], self._waiting[:, kept]
        self._total, self._squares = self._total[rows], self._squares[rows]

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(*self._ends.shape[1:], self._features)

    def result(self) -> np.ndarray:
        """[E, K, F]."""
        if not self.drawn:
            return self._shaped(np.full_like(self._total, np.nan))
        return self._shaped(self._total / self.drawn)

    def standard_error(self) -> np.ndarray | None:
        """From the variance between groups; None before there are two."""
        groups = self.drawn // self._group
        if groups < 2:
            return None
        mean = self._total / self.drawn
        variance = np.maximum(self._squares / groups - mean**2, 0) / (groups - 1)
        return self._shaped(np.sqrt(variance))
