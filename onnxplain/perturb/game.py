"""The game: what is evaluated, and the scores of samples in order.

Equal coalitions are evaluated once; the next samples are made while the model runs.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import EvaluationError
from onnxplain.perturb.forms import Block, Form, Sampler
from onnxplain.run.feeds import Feeds, all_finite
from onnxplain.run.program import Rows

# Bytes of samples and their scores that are held at once, and of those that are remembered.
_BLOCK_BYTES = 1 << 25
_MEMORY_BYTES = 1 << 26

Tick = Callable[[int], None]
"""Told how many rows have been evaluated."""


@dataclass(frozen=True)
class Off:
    """What a source is replaced with where it is off.

    Attributes:
        arrays: for each source [B, 1 or N, ...]: scores are averaged over the B of them.
    """

    arrays: dict[str, np.ndarray]

    @property
    def count(self) -> int:
        """How many there are to average over."""
        return len(next(iter(self.arrays.values())))

    @functools.cached_property
    def zero(self) -> frozenset[str]:
        """The sources for which it is nothing but zeros."""
        return frozenset(k for k, v in self.arrays.items() if len(v) == 1 and _zero(v))


@dataclass(frozen=True)
class Permuted:
    """Off is the value of another example: a block holds ``order``, int64 [S, N]."""

    count = 1


@dataclass(frozen=True)
class Given:
    """Off is part of the sample: a block holds ``given.NAME`` [S, E, ...]."""

    count = 1


@dataclass(frozen=True)
class Scores:
    """Which numbers of the explained value are scores.

    Attributes:
        columns: indices into its values [1 or N, K], flattened; None: all of them.
        summed: whether the sum of these is one score.
        finish: makes [rows] of the value's rows [rows, ...], on the host.
    """

    columns: np.ndarray | None = None
    summed: bool = False
    finish: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Play:
    """What is evaluated: a model's scores, of some sources, in a form.

    Attributes:
        model: an :class:`Model`, or a :class:`BlackBox`.
        feeds: its checked inputs.
        of, wrt: the explained value and the sources.
        form: how samples become masks.
        off: what is put where a mask is 0.
        scores: which numbers are wanted.
        at_once: whether ``of`` is about all examples together.
        shape: that of ``of`` without the examples axis.
        at_most: the most samples of one run.
    """

    model: Any
    feeds: Feeds
    of: ir.Value
    wrt: tuple[ir.Value, ...]
    form: Form
    off: Off | Permuted | Given
    scores: Scores
    at_once: bool
    shape: tuple[int, ...]
    at_most: int | None = None


class Game:
    """The scores of some examples for any samples.

    Args:
        play: what is evaluated.
        index: the examples [E], by their number among the inputs.
        place: where they are in the form's arrays, [E].
    """

    def __init__(self, play: Play, index: np.ndarray, place: np.ndarray) -> None:
        self.play, self.index, self.place = play, index, place
        self.count = 1 if play.at_once else len(index)
        self.tick: Tick = lambda rows: None
        self._seen: _Seen | None = None

    def _evaluate(self, rows: Mapping[str, Rows], count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Scores [S, E, K] of samples, in chunks."""
        raise NotImplementedError

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples only (a boolean mask [E])."""
        self.index, self.place = self.index[kept], self.place[kept]
        self.count = int(kept.sum())
        if self._seen is not None:
            self._seen.keep(kept)

    def stream(
        self, sampler: Sampler, start: int, stop: int
    ) -> Iterator[tuple[slice, Block, np.ndarray]]:
        """The samples from ``start`` to ``stop``: which, what they say, scores float64 [S, E, K].

        Raises:
            EvaluationError: the model failed, or a score is not finite. What was complete before
                has been yielded; so it has when the user interrupts (KeyboardInterrupt).
        """
        if self.play.form.distinct:
            yield from self._each(sampler, start, stop)
        else:
            yield from self._once(sampler, start, stop)

    def _each(
        self, sampler: Sampler, start: int, stop: int
    ) -> Iterator[tuple[slice, Block, np.ndarray]]:
        """Every sample is evaluated."""
        form = self.play.form
        blocks = _Ahead(lambda s: sampler(slice(start + s.start, start + s.stop)), stop - start)

        def feed(name: str) -> Rows:
            return lambda piece: _fed(form, blocks(piece))[name]

        rows = {name: feed(name) for name in _fed(form, blocks(slice(0, 1)))}
        for piece, scores in self._scores(rows, stop - start):
            yield slice(start + piece.start, start + piece.stop), blocks(piece), scores

    def _once(
        self, sampler: Sampler, start: int, stop: int
    ) -> Iterator[tuple[slice, Block, np.ndarray]]:
        """Samples equal to one that was seen get its scores."""
        form = self.play.form
        features = sum(int(np.prod(s)) for _, s in form.fed().values())
        size = max(_BLOCK_BYTES // (2 * features + 8 * self.count + 64), 1)
        blocks = _Ahead(sampler, stop)
        for low in range(start, stop, size):
            piece = slice(low, min(low + size, stop))
            block = blocks(piece)
            if self._seen is None or self._seen.full:
                self._seen = _Seen(block["z"].shape[1])
            seen = self._seen
            numbers, first = seen.table.number(block["z"])
            self.tick((len(numbers) - len(first)) * self.count)
            fresh = _fed(form, {k: v[first] for k, v in block.items()})
            try:
                if len(first):
                    for _, scores in self._scores(fresh, len(first)):
                        seen.add(scores)
            except (KeyboardInterrupt, EvaluationError):
                done = int(np.argmax(np.append(numbers, seen.count) >= seen.count))
                if done:
                    part = slice(low, low + done)
                    yield part, {k: v[:done] for k, v in block.items()}, seen[numbers[:done]]
                raise
            yield piece, block, seen[numbers]

    def _scores(self, rows: Mapping[str, Rows], count: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Scores of samples, checked."""
        for piece, scores in self._evaluate(rows, count):
            wide = scores.astype(np.float64)
            if not all_finite(wide):
                bad = np.flatnonzero(~np.isfinite(wide).all(axis=(0, 2)))
                named = ", ".join(str(self.index[i]) for i in bad[:8])
                raise EvaluationError(
                    f"the score of example(s) {named} is NaN or infinite when parts of the input "
                    "are replaced: another baseline may suit the model, or look where the model "
                    "divides or takes logarithms"
                )
            self.tick((piece.stop - piece.start) * self.count)
            yield piece, wide


def _fed(form: Form, block: Block) -> dict[str, np.ndarray]:
    """What is fed of a block: what the form says, and what is put where a mask is 0."""
    more = {k: v for k, v in block.items() if k == "order" or k.startswith("given.")}
    return {**form.rows(block), **more}


class _Seen:
    """Coalitions that were evaluated, and their scores."""

    def __init__(self, words: int) -> None:
        from onnxplain.kernels.table import Table

        self.table = Table(words, sys.maxsize)
        self.words, self.count = words, 0
        self._scores = np.empty((0, 0, 0))

    @property
    def full(self) -> bool:
        """Whether no more should be remembered."""
        return self._scores.nbytes + 16 * self.words * self.count > _MEMORY_BYTES

    def add(self, scores: np.ndarray) -> None:
        """The scores of the next new coalitions."""
        stop = self.count + len(scores)
        if stop > len(self._scores):
            grown = np.empty((max(stop, 2 * self.count), *scores.shape[1:]))
            grown[: self.count] = self._scores[: self.count] if self.count else 0
            self._scores = grown
        self._scores[self.count : stop] = scores
        self.count = stop

    def keep(self, kept: np.ndarray) -> None:
        """Forget the scores of the other examples."""
        self._scores = self._scores[:, kept]

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self._scores[numbers]


@functools.cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "onnxplain-samples")


if hasattr(os, "register_at_fork"):  # threads don't live on in a child process
    os.register_at_fork(after_in_child=_worker.cache_clear)


class _Ahead:
    """Makes samples one chunk ahead, while the model runs."""

    def __init__(self, make: Callable[[slice], Block], stop: int) -> None:
        self._make, self._stop = make, stop
        self._piece: slice | None = None
        self._block: Block = {}
        self._next: tuple[slice, Future[Block]] | None = None

    def __call__(self, piece: slice) -> Block:
        if piece == self._piece:
            return self._block
        if self._next is not None and self._next[0] == piece:
            self._block = self._next[1].result()
        else:
            self._block = self._make(piece)
        self._piece = piece
        size = piece.stop - piece.start
        after = slice(piece.stop, min(piece.stop + size, self._stop))
        self._next = None
        if after.stop > after.start and size > 1:
            self._next = after, _worker().submit(self._make, after)
        return self._block


def _zero(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiub" and not array.any()
