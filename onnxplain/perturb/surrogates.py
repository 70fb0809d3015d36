"""Aggregators that fit a model of coalitions to their scores: KernelSHAP's, and anyone's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from onnxplain.errors import EvaluationError
from onnxplain.perturb.forms import Block

# What values differ by, as a share of their size, though they are the same.
_ROUNDING = 1e-14
# Groups that the jackknife leaves out, one at a time.
_GROUPS = 10
# A direction whose share of the largest is below this is not determined by the samples.
_RANK = 1e-10
# A pair whose own score hardly counts in what is fitted to it; nothing is known of its residual.
_OWN = 0.1
# Features taken at a time, where there are more of them than samples; else numbers of both.
_WIDE, _TALL = 4096, 1 << 20
_ALL = slice(None)


class _Stored:
    """Coalitions and their scores, kept: a fit needs all of them."""

    def __init__(self, features: int) -> None:
        self._features = features
        self._packed: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._count = 0
        self._fitted: tuple[int, Any] = (-1, None)

    def add(self, piece: slice, block: Block, scores: np.ndarray) -> None:
        """Take in coalitions and their scores [S, E, K]."""
        self._packed.append(block["z"])
        self._scores.append(scores)
        self._count += len(scores)

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples."""
        self._scores = [s[:, kept] for s in self._scores]
        self._fitted = (-1, None)

    @property
    def drawn(self) -> int:
        """How many coalitions there are."""
        return self._count

    def _present(self, piece: slice = _ALL) -> np.ndarray:
        """The coalitions as booleans [n, F]."""
        from onnxplain.kernels.coalitions import unpack

        if len(self._packed) > 1:
            self._packed = [np.concatenate(self._packed)]
        return unpack(self._packed[0][piece], self._features)

    def _all_scores(self) -> np.ndarray:
        self._scores = [np.concatenate(self._scores)]
        return self._scores[0]

    def _once(self, fit: Callable[[], Any]) -> Any:
        """The fit of what there is, made once."""
        if self._fitted[0] != self._count:
            self._fitted = self._count, fit()
        return self._fitted[1]


class KernelShapFit(_Stored):
    """Shapley values by weighted least squares that add up to the difference, for all examples.

    With z the coalitions (less each one's mean) and v their scores, minimizes the sum of
    w (v - v(none) - z phi)^2 under sum(phi) = v(all) - v(none); where samples leave it open, the
    smallest change from equal shares. Source: Lundberg and Lee 2017, arXiv:1705.07874, theorem 2;
    Covert and Lee 2021, arXiv:2012.01536, equation 7.

    Sample 0 is the full coalition and sample 1 the empty one; then come pairs of complements.

    Args:
        features: how many there are.
        weights: of the samples behind the first two, where these are all coalitions; None where
            they are drawn by their weights.
        errors: whether standard errors are wanted.
    """

    def __init__(self, features: int, weights: np.ndarray | None, errors: bool = True) -> None:
        super().__init__(features)
        self._weights, self._errors = weights, errors

    def _fit(self) -> _Solved:
        scores = self._all_scores()
        outputs, rows = scores.shape[1:], len(scores) - 2
        # The first of all coalitions, in order, are no fair sample of them.
        if rows < 0 or (self._weights is not None and rows < len(self._weights)):
            unknown = np.full((*outputs, self._features), np.nan)
            return _Solved(unknown, None, np.full(outputs[0], np.nan), True)
        v = scores.reshape(len(scores), -1)
        total, inner = v[0] - v[1], v[2:] - v[1]
        share = total / self._features
        weights = np.ones(rows) if self._weights is None else self._weights
        if not rows:
            change, missed = np.zeros((self._features, len(share))), np.zeros_like(share)
            errors, rank = None, 0
        else:
            solve = self._wide if rows < self._features and self._weights is None else self._tall
            change, errors, left, rank = solve(inner, share, weights)
            missed = weights @ left**2
            all_of_it = weights @ (inner - np.average(inner, axis=0, weights=weights)) ** 2
            rounding = weights @ (_ROUNDING * v[2:]) ** 2
            with np.errstate(invalid="ignore", divide="ignore"):
                same = all_of_it <= rounding
                missed = np.where(same, missed > rounding, missed / all_of_it)
        values = share + change
        if self._features == 1 or self._weights is not None:
            errors = np.zeros_like(values)
        return _Solved(
            values.T.reshape(*outputs, -1),
            None if errors is None else errors.T.reshape(*outputs, -1),
            1 - missed.reshape(outputs).mean(axis=1),
            rank >= self._features - 1,  # along (1, ..., 1) every coalition is centered
        )

    def _tall(
        self, inner: np.ndarray, share: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, int]:
        """Changes from equal shares [F, M], their standard errors, residuals [n, M], the rank."""
        step = 2 * max(_TALL // 2 // self._features, 1)  # whole pairs
        pieces = [slice(i, min(i + step, len(inner))) for i in range(0, len(inner), step)]
        gram, cross = np.zeros((self._features, self._features)), np.zeros((self._features, 1))
        left = np.empty_like(inner)
        for piece in pieces:
            z, size = self._centered(piece)
            left[piece] = inner[piece] - size * share
            weighted = z * weights[piece, None]
            gram, cross = gram + z.T @ weighted, cross + weighted.T @ left[piece]
        half, vectors, rank = _inverted(gram)
        bread = half @ vectors.T
        change = bread @ cross
        squares: Any = 0.0
        # Of fewer pairs than twice the features, too little is left over to tell their spread.
        known = self._errors and self._weights is None and len(inner) >= 4 * self._features
        times = self._times() if known else np.zeros(0)
        for piece in pieces:
            z, _ = self._centered(piece)
            left[piece] -= z @ change
            found = _spread(z, bread, left[piece], times[piece]) if known else None
            known = found is not None
            squares = squares + found if known else 0.0
        errors = np.sqrt(np.maximum(squares, 0)) if known else None
        return change, errors, left, rank

    def _times(self) -> np.ndarray:
        """How often each coalition behind the first two was drawn, or its complement, [n]."""
        (packed,) = self._packed
        full = packed[0]
        folded = np.where(packed[2:, :1] & np.uint64(1), packed[2:] ^ full, packed[2:])
        _, which, counts = np.unique(folded, axis=0, return_inverse=True, return_counts=True)
        return np.asarray(counts[which.ravel()] / 2)

    def _centered(self, piece: slice) -> tuple[np.ndarray, np.ndarray]:
        """Coalitions behind the first two, less each one's mean, [n, F]; their sizes [n, 1]."""
        present = self._present(slice(piece.start + 2, piece.stop + 2))
        size = present.sum(axis=1)[:, None]
        return present - size / self._features, size

    def _wide(
        self, inner: np.ndarray, share: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, None, np.ndarray, int]:
        """As :meth:`_tall`, where features outnumber samples: the smallest changes."""
        present = self._present(slice(2, None))
        mean = present.mean(axis=1, keepdims=True)
        parts = [slice(i, i + _WIDE) for i in range(0, self._features, _WIDE)]
        gram = np.zeros((len(present), len(present)))
        for part in parts:
            z = present[:, part] - mean
            gram += z @ z.T
        half, vectors, rank = _inverted(gram)
        left = inner - mean * self._features * share
        dual = half @ (vectors.T @ left)
        change = np.concatenate([(present[:, part] - mean).T @ dual for part in parts])
        return change, None, left - gram @ dual, rank

    def result(self) -> np.ndarray:
        """[E, K, F]."""
        return self._once(self._fit).values

    def standard_error(self) -> np.ndarray | None:
        """[E, K, F]."""
        return self._once(self._fit).errors

    def figures(self) -> dict[str, np.ndarray]:
        """How well the scores are met: R^2, [E]; warns where samples leave values open."""
        solved = self._once(self._fit)
        if not solved.determined:
            warnings.warn(
                f"{self._count} coalitions don't determine the Shapley values of {self._features} "
                "features: equal shares stand for what is open; take more samples (n_samples) or "
                "fewer features (feature_mask)",
                stacklevel=2,
            )
        return {"r_squared": solved.fit}


class _Solved(NamedTuple):
    """Values and standard errors [E, K, F], R^2 [E], whether the samples determine the values."""

    values: np.ndarray
    errors: np.ndarray | None
    fit: np.ndarray
    determined: bool


def _inverted(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The inverse where it is determined, as two factors (the second transposed), and the rank."""
    values, vectors = np.linalg.eigh(gram)
    open_ = values <= values[-1] * _RANK
    return (
        vectors * np.where(open_, 0, 1 / np.where(open_, 1, values)),
        vectors,
        int((~open_).sum()),
    )


def _spread(
    z: np.ndarray, bread: np.ndarray, left: np.ndarray, times: np.ndarray
) -> np.ndarray | None:
    """Squares of standard errors [F, M] that some pairs give rise to; None for a decisive pair.

    The sandwich over pairs. Source: MacKinnon and White 1985, Journal of Econometrics 29 (HC3:
    residuals over one less their leverage), with the two of a pair taken together, and the leverage
    that of all ``times`` that it was drawn: what decides alone has no residual, however often.
    """
    reach = z @ bread
    leverage = (z * reach).sum(axis=1) * np.maximum(times, 1)
    if len(left) % 2:
        parts = (reach, left, leverage)
        reach, left, leverage = (np.concatenate([a, np.zeros_like(a[:1])]) for a in parts)
    own = (1 - leverage[::2] - leverage[1::2]).repeat(2)
    if own.min() < _OWN:
        return None
    (t, u), (r, s) = ((a[::2], a[1::2]) for a in (reach, left / own[:, None]))
    return np.asarray((t**2).T @ r**2 + (u**2).T @ s**2 + 2 * (t * u).T @ (r * s))


class Fit(_Stored):
    """Any interpretable model, fitted to the samples of each example.

    Args:
        features: how many there are.
        weights: similarities [S, E] of samples, by their numbers and as booleans [S, F].
        fit: coefficients [F] and predicted values [S] from samples [S, F], values and weights.
        samples: what the model is fitted to instead of the coalitions, by number, [S, F].
        errors: whether standard errors are wanted.
    """

    def __init__(
        self,
        features: int,
        weights: Callable[[slice, np.ndarray], np.ndarray],
        fit: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
        samples: np.ndarray | None = None,
        errors: bool = True,
    ) -> None:
        super().__init__(features)
        self._weigh, self._model, self._samples = weights, fit, samples
        self._errors = errors
        self._weights: list[np.ndarray] = []

    def add(self, piece: slice, block: Block, scores: np.ndarray) -> None:
        """Take in samples and their scores [S, E, K]."""
        from onnxplain.kernels.coalitions import unpack

        self._weights.append(self._weigh(piece, unpack(block["z"], self._features)))
        super().add(piece, block, scores)

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples."""
        super().keep(kept)
        self._weights = [w[:, kept] for w in self._weights]
        whole = self._weigh
        self._weigh = lambda piece, z: whole(piece, z)[:, kept]

    def _fit(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        scores = self._all_scores()
        self._weights = [np.concatenate(self._weights)]
        x = self._present().astype(float) if self._samples is None else self._samples[: self._count]
        values, errors, fits = [], [], []
        for e in range(scores.shape[1]):
            for k in range(scores.shape[2]):
                y, w = scores[:, e, k], self._weights[0][:, e]
                if not w.any():
                    raise EvaluationError(
                        "every sample's similarity to the input is 0, so there is nothing to fit: "
                        "take a wider kernel"
                    )
                coefficients, predicted = self._model(x, y, w)
                values.append(coefficients)
                errors.append(self._jackknife(x, y, w))
                fits.append(r_squared(y, predicted, w))
        shape = (*scores.shape[1:], -1)
        known = [np.full_like(v, np.nan) if e is None else e for v, e in zip(values, errors)]
        spread = None if all(e is None for e in errors) else np.array(known).reshape(shape)
        fit = np.array(fits).reshape(scores.shape[1:]).mean(axis=1)
        return np.array(values).reshape(shape), spread, fit

    def _jackknife(self, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray | None:
        """Standard errors [F] by leaving out a group of samples at a time; None for few samples.

        Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 11.5 (the
        delete-d jackknife in groups). It works for any interpretable model.
        """
        if not self._errors or len(x) < 2 * _GROUPS:
            return None
        group = np.arange(len(x)) % _GROUPS
        if not all(w[group != g].any() for g in range(_GROUPS)):
            return None
        without = [
            self._model(x[group != g], y[group != g], w[group != g])[0] for g in range(_GROUPS)
        ]
        return np.std(without, axis=0) * np.sqrt(_GROUPS - 1)

    def result(self) -> np.ndarray:
        """[E, K, F]."""
        return np.asarray(self._once(self._fit)[0])

    def standard_error(self) -> np.ndarray | None:
        """[E, K, F]."""
        found: np.ndarray | None = self._once(self._fit)[1]
        return found

    def figures(self) -> dict[str, np.ndarray]:
        """How well the scores are met: weighted R², [E]; warns of too narrow a kernel."""
        weights = np.concatenate(self._weights)
        count = weights.sum(axis=0) ** 2 / np.maximum((weights**2).sum(axis=0), 1e-300)
        if (narrow := count < 2).any() and len(weights) > 2:
            warnings.warn(
                f"the weights of {int(narrow.sum())} example(s) leave one of {len(weights)} "
                "samples to fit to, the others being too far: take a wider kernel "
                "(similarity_func)",
                stacklevel=2,
            )
        return {"fit": self._once(self._fit)[2]}


def r_squared(values: np.ndarray, fitted: np.ndarray, weights: np.ndarray) -> float:
    """The weighted R²; of values that are all the same 1 where they are met, else 0."""
    missed = float(np.sum(weights * (values - fitted) ** 2))
    spread = float(np.sum(weights * (values - np.average(values, weights=weights)) ** 2))
    rounding = float(np.sum(weights * (_ROUNDING * values) ** 2))
    return 1 - missed / spread if spread > rounding else float(missed <= rounding)
