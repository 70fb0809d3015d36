"""The engine: plays a game to its end, and keeps what was computed when that comes early.

In rounds, where a tolerance is to be met: their boundaries depend on the numbers of samples alone,
so that an example gets the same numbers in any batch and in chunks of any size.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from onnxplain.errors import EvaluationError, IncompleteWarning, InputError
from onnxplain.model import Model
from onnxplain.perturb.call_game import CallGame
from onnxplain.perturb.forms import Block, Sampler
from onnxplain.perturb.game import Game, Given, Play
from onnxplain.perturb.graph_game import Graph, GraphGame, coupled

# Where a tolerance is to be met: samples before the first look, and growth from look to look.
_FIRST_LOOK = 32
_GROWTH = 1.25


class Aggregator(Protocol):
    """How scores become attributions: running sums, of the examples of one game.

    Attributes:
        drawn: how many samples they are of, as the user counts them; None where nothing is drawn.
    """

    @property
    def drawn(self) -> int | None: ...

    def add(self, piece: slice, block: Block, scores: np.ndarray) -> None:
        """Take in samples and their scores, float64 [S, E, K]; they come in order."""

    def keep(self, kept: np.ndarray) -> None:
        """Go on with some of the examples only (a boolean mask [E])."""

    def result(self) -> np.ndarray:
        """Attributions [E, K, ...], NaN where nothing is known yet."""

    def standard_error(self) -> np.ndarray | None:
        """How far these are off, typically; of the same shape, or None where nothing is random."""


@dataclass
class Outcome:
    """What was computed for N examples.

    Attributes:
        values: attributions [N, K, ...]; NaN where the computation did not come to.
        errors: their standard errors; None where nothing is random.
        samples: how many samples each example's attributions are of, [N]; 0: none are drawn.
        completed: the share of its samples (or of the tolerance) that each example got, [N].
        extra: further figures by name, [N, ...].
    """

    values: np.ndarray | None = None
    errors: np.ndarray | None = None
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    completed: np.ndarray = field(default_factory=lambda: np.zeros(0))
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, index: np.ndarray, aggregator: Aggregator, rows: np.ndarray) -> None:
        """The attributions of some of a game's examples."""
        figures = {"values": aggregator.result(), "errors": aggregator.standard_error()}
        for name, found in figures.items():
            if found is None:
                continue
            whole = getattr(self, name)
            if whole is None:
                whole = np.full((len(self.samples), *found.shape[1:]), np.nan)
                setattr(self, name, whole)
            whole[index] = found[rows]
        for name, found in getattr(aggregator, "figures", dict)().items():
            if name not in self.extra:
                self.extra[name] = np.full((len(self.samples), *found.shape[1:]), np.nan)
            self.extra[name][index] = found[rows]


def games(play: Play, samples: int, examples: np.ndarray) -> Iterator[tuple[Game, slice]]:
    """The games of chunks of examples that are best evaluated together, and which these are.

    Args:
        play: what is evaluated.
        samples: how many samples there will be, at most.
        examples: their numbers among the inputs, in the order of the form.
    """
    graph = Graph(play) if isinstance(play.model, Model) else None
    if isinstance(play.off, Given):
        samples = 1  # they are made for all examples together
    if play.at_once or (graph is not None and coupled(play.model)):
        size = len(examples)
        if not play.at_once and size != play.feeds.count:
            raise InputError(
                "feature_mask: the examples have different numbers of features, and this model's "
                "answer to an example depends on the others, so they must be evaluated together: "
                "give masks with as many features for each"
            )
    elif graph is not None:
        size = graph.examples_at_once(samples)
    else:
        size = max(CallGame.rows_at_once(play) // (samples * play.off.count), 1)
    for start in range(0, len(examples), size):
        place = slice(start, min(start + size, len(examples)))
        index, at = examples[place], np.arange(place.start, place.stop)
        yield (
            (CallGame(play, index, at) if graph is None else GraphGame(graph, index, at)),
            place,
        )


def run(
    play: Play,
    sampler: Sampler,
    samples: int,
    aggregator: Callable[[Game], Aggregator],
    examples: np.ndarray,
    *,
    unit: int = 1,
    tolerance: float | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Outcome:
    """Play to the end, or to where it is stopped.

    Args:
        play: what is evaluated.
        sampler: makes samples by their numbers.
        samples: how many, at most.
        aggregator: makes the aggregator for a game.
        examples: which of the inputs, in the order of the form.
        unit: how many samples belong together (those of one permutation).
        tolerance: an example gets no more samples once the standard errors of its attributions
            are, summed, at most this share of their sizes.
        progress: told how many rows have been evaluated.

    Returns:
        What was computed, by place in ``examples``; when the user interrupts, all until then.

    Raises:
        EvaluationError: the model failed; ``partial`` is the Outcome until then.
    """
    count = 1 if play.at_once else len(examples)
    together = isinstance(play.model, Model) and coupled(play.model)
    outcome = Outcome(samples=np.zeros(count, np.int64), completed=np.zeros(count))
    current: tuple[np.ndarray, Aggregator] | None = None
    done = 0
    try:
        for game, place in games(play, samples, examples):
            if progress is not None:
                game.tick = progress
            index = np.zeros(1, np.int64) if play.at_once else np.arange(place.start, place.stop)
            sums = aggregator(game)
            done = 0
            for start, stop in rounds(samples, unit, tolerance):
                for piece, block, scores in game.stream(sampler, start, stop):
                    with _uninterrupted():
                        sums.add(piece, block, scores)
                        done, current = piece.stop, (index, sums)
                ended = np.full(len(index), stop == samples)
                if tolerance is not None:
                    met = relative_error(sums) <= tolerance
                    # Of examples that change each other none can leave before the others.
                    ended |= met.all() if together else met
                if ended.any():
                    outcome.take(index[ended], sums, np.flatnonzero(ended))
                    outcome.samples[index[ended]] = sums.drawn or 0
                    outcome.completed[index[ended]] = 1
                if ended.all():
                    break
                if ended.any():
                    with _uninterrupted():
                        game.keep(~ended)
                        sums.keep(~ended)
                        index = index[~ended]
                        current = index, sums
            current = None
    except (KeyboardInterrupt, EvaluationError) as stop:
        if current is not None:
            index, sums = current
            with suppress(EvaluationError):  # too little for a fit: nothing is known
                outcome.take(index, sums, np.arange(len(index)))
            outcome.samples[index] = sums.drawn or 0
            outcome.completed[index] = done / samples
        if isinstance(stop, EvaluationError):
            stop.partial, stop.samples = outcome, int(outcome.samples.max(initial=0))
            raise
        if outcome.values is None:
            raise
    return outcome


def warn_interrupted(completed: np.ndarray) -> None:
    """Say what there is of the examples of which such shares were computed, [N]."""
    begun = completed[(completed > 0) & (completed < 1)]
    more = f", {len(begun)} after {100 * begun.max():.2g} % of their samples" if len(begun) else ""
    warnings.warn(
        f"interrupted: {int((completed == 1).sum())} of {len(completed)} example(s) are complete"
        f"{more}; what nothing is known of is NaN",
        IncompleteWarning,
        stacklevel=3,
    )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until a sum is complete: half of it would be a wrong number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    before = signal.getsignal(signal.SIGINT)
    try:
        if before is None:  # the program around Python sees to interrupts
            raise ValueError
        signal.signal(signal.SIGINT, lambda *told: came.append(told))
    except ValueError:  # or this is not the main interpreter
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


def rounds(samples: int, unit: int, tolerance: float | None) -> Iterator[tuple[int, int]]:
    """From which sample to which each round goes."""
    start, look = 0, float(_FIRST_LOOK)
    while start < samples:
        stop = samples if tolerance is None else min(int(look) * unit, samples)
        yield start, stop
        start, look = stop, look * _GROWTH


def relative_error(sums: Aggregator) -> np.ndarray:
    """The standard errors of each example's attributions over their sizes, each summed, [E]."""
    values, errors = sums.result(), sums.standard_error()
    if errors is None:
        return np.full(len(values), np.inf)
    return np.nan_to_num(relative([values], [errors], getattr(sums, "around", False)), nan=np.inf)


def relative(
    values: Sequence[np.ndarray], errors: Sequence[np.ndarray], around: bool = False
) -> np.ndarray:
    """As :func:`relative_error`, of arrays [N, ...]; NaN where an error is not known.

    ``around``: maps are told by what differs, so their sizes are those of the gaps to their mean.
    """
    size, error = np.zeros(len(values[0])), np.zeros(len(values[0]))
    for value, spread in zip(values, errors, strict=True):
        flat, spread = (a.reshape(len(a), -1) for a in (value, spread))
        mean = flat.mean(axis=1, keepdims=True) if around else 0.0
        size += np.abs(flat - mean).sum(axis=1)
        error += spread.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((size == 0) & (error == 0), 0.0, error / size)


def check_tolerance(tolerance: Any) -> float | None:
    """A tolerance as it must be.

    Raises:
        InputError: it is no positive number.
    """
    if tolerance is None:
        return None
    number = isinstance(tolerance, int | float | np.number) and not isinstance(tolerance, bool)
    if not number or not np.isfinite(tolerance) or tolerance <= 0:
        raise InputError(
            f"tolerance must be a positive number (the standard error as a share of the "
            f"attributions, such as 0.05), not {tolerance!r}"
        )
    return float(tolerance)
