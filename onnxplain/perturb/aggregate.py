"""Aggregators: how the scores of samples become attributions, as running sums."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnxplain.perturb.forms import Block


class Differences:
    """What is lost when a feature goes: sample 0 has all features, sample f + 1 lacks f.

    Args:
        features: how many there are.
    """

    def __init__(self, features: int) -> None:
        self._features = features
        self._full = self._values = np.empty(0)

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

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._full = np.empty(0)
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
