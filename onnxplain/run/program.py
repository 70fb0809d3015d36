"""A rewritten graph, compiled once and run over any number of rows in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError, OutOfMemoryError, UnsupportedModelError
from onnxplain.graph.edit import BATCH
from onnxplain.graph.emit import dims
from onnxplain.run import memory
from onnxplain.run.session import Feed, Provider, Session

log = logging.getLogger("onnxplain")

Rows = np.ndarray | Callable[[slice], np.ndarray]
"""A feed with one row per example: an array, or a function that makes the rows of a slice."""


@dataclass(frozen=True)
class Settings:
    """How graphs are run."""

    providers: Sequence[Provider] | None = None
    session_options: Any = None
    memory_limit: int | None = None


@dataclass
class _Cost:
    """Bytes that a graph holds at once: for each row, besides, and for each row as measured."""

    row: int
    fixed: int
    measured: float = 0.0


class Program:
    """A graph and its session.

    Args:
        model: the rewritten graph.
        settings: providers, session options, memory limit.
        batch: None when the graph takes any number of rows; else it takes exactly so many.
    """

    def __init__(self, model: ir.Model, settings: Settings, batch: int | None = None) -> None:
        self.model = model
        self.settings = settings
        self.batch = batch
        self._session: Session | None = None
        self._told = False
        self._costs: dict[Any, _Cost] = {}

    @property
    def session(self) -> Session:
        """Compiled on first use, then kept."""
        if self._session is None:
            self._session = Session(
                self.model,
                self.settings.providers,
                self.settings.session_options,
                planned=self.settings.memory_limit is None,
            )
        return self._session

    def fitting(
        self,
        row: Mapping[str, tuple[int, ...]],
        shared: Mapping[str, tuple[int, ...]],
        count: int,
    ) -> int:
        """How many rows (at least 1, at most ``count``) fit the memory allowed.

        Args:
            row: the shapes of one row of each input that has rows.
            shared: the shapes of the other inputs.
            count: how many rows there are.
        """
        cost = self._cost(row, shared)
        limit = self.settings.memory_limit
        room = float(memory.budget(limit))
        if limit is not None and room < cost.row + cost.fixed and not self._told:
            self._told = True
            log.warning(
                "memory_limit leaves %.0f MB, but one row takes about %.0f MB: going on row by row,"
                " beyond the limit",
                room / 1e6,
                (cost.row + cost.fixed) / 1e6,
            )
        if cost.measured:
            more = room * memory.MEASURED_SHARE / cost.measured
            return int(min(max(more, 1), count))
        room /= memory.ARENA_FACTOR
        if self.session.on_cpu:
            room = min(room, memory.CPU_SWEET_SPOT)
            if limit is not None:
                room /= memory.FIRST_SHARE  # the estimate is measured before it is relied upon
        return int(min(max((room - cost.fixed) // cost.row, 1), count))

    def _cost(
        self, row: Mapping[str, tuple[int, ...]], shared: Mapping[str, tuple[int, ...]]
    ) -> _Cost:
        key = (tuple(sorted(row.items())), tuple(sorted(shared.items())))
        if key not in self._costs:
            one = memory.live_bytes(self.model, {**row, **shared})
            twice = {k: (2 * s[0], *s[1:]) for k, s in row.items()}
            two = memory.live_bytes(self.model, {**twice, **shared})
            self._costs[key] = _Cost(max(two - one, 1), max(2 * one - two, 0))
        return self._costs[key]

    def chunks(
        self,
        rows: Mapping[str, Rows],
        shared: Mapping[str, np.ndarray],
        count: int,
        outputs: Sequence[str] | None = None,
        at_most: int | None = None,
        placed: Mapping[str, Feed] | None = None,
    ) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Run rows in chunks that fit memory; yields each chunk's slice and results.

        ``placed``: ``shared`` on the device already, where it is run several times.

        A chunk that runs out of memory is halved and tried again.

        Raises:
            OutOfMemoryError: a single row does not fit.
        """
        if count == 0:
            raise InputError("the input has no rows: there is nothing to run")
        row = {name: take(feed, slice(0, 1)).shape for name, feed in rows.items()}
        same = {name: feed.shape for name, feed in shared.items()}

        def choose() -> int:
            if self.batch is not None or count == 1:
                return self.batch or 1
            return self.fitting(row, same, min(count, max(at_most or count, 1)))

        limited = (
            self.settings.memory_limit is not None and self.session.on_cpu and self.batch is None
        )
        cost = self._cost(row, same) if limited else _Cost(0, 0)
        size, start = choose(), 0
        placed = self.session.place(shared) if placed is None else placed
        while start < count:
            piece = slice(start, min(start + size, count))
            feeds = {name: take(feed, piece) for name, feed in rows.items()}
            missing = (self.batch or 0) - (piece.stop - piece.start)
            if missing > 0:  # a graph of fixed batch: its last rows are repeated and cut off again
                feeds = {
                    k: np.concatenate([v, v[-1:].repeat(missing, 0)]) for k, v in feeds.items()
                }
            try:
                last = piece.stop == count and limited
                before = memory.resident_bytes() if limited else 0
                results = self.session({**feeds, **placed}, outputs, give_back=last)
            except OutOfMemoryError as error:
                if size == 1 or self.batch:
                    raise OutOfMemoryError(
                        "even one example does not fit the memory there is; use a smaller input, "
                        f"a device with more memory, or a smaller model ({error})"
                    ) from error
                size = max(1, size // 2)
                log.info("out of memory: going on with %d rows at once", size)
                continue
            if missing > 0:
                results = {k: v[: piece.stop - piece.start] for k, v in results.items()}
            yield piece, results
            start = piece.stop
            if limited and not last and not cost.measured:
                # Estimates don't know the runtime's blocked layouts, workspaces and order.
                cost.measured = max((memory.resident_bytes() - before) / size, cost.row)
                size = choose()

    def run(
        self,
        rows: Mapping[str, Rows],
        shared: Mapping[str, np.ndarray],
        count: int,
        outputs: Sequence[str] | None = None,
        at_most: int | None = None,
    ) -> dict[str, np.ndarray]:
        """As :meth:`chunks`, the results put together along the first axis.

        Where a result has no row per example (one number for all, time first), all rows are run at
        once.

        Raises:
            UnsupportedModelError: such a result of a graph that takes another number of rows.
        """
        if all(self._by_rows(name) for name in outputs or self.session.outputs):
            whole: dict[str, np.ndarray] = {}
            for piece, results in self.chunks(rows, shared, count, outputs, at_most):
                if any(r.shape[:1] != (piece.stop - piece.start,) for r in results.values()):
                    break  # a first axis of unknown size turned out to count something else
                for name, part in results.items():
                    if piece == slice(0, count):
                        whole[name] = part
                    else:
                        if name not in whole:
                            whole[name] = np.empty((count, *part.shape[1:]), part.dtype)
                        whole[name][piece] = part
            else:
                return whole
        if self.batch is not None and self.batch != count:
            raise UnsupportedModelError(
                f"{count} examples were given to a model that takes {self.batch} at a time, and a "
                "wanted value has no row per example, so it can't be put together; give exactly "
                f"{self.batch}"
            )
        feeds = {name: take(feed, slice(0, count)) for name, feed in rows.items()}
        return self.session({**feeds, **shared}, outputs)

    def _by_rows(self, name: str) -> bool:
        """Whether an output's first axis counts the examples, or may for all that is known."""
        value = next(v for v in self.model.graph.outputs if v.name == name)
        if value.shape is None:
            return True
        d = dims(value)
        if not d or BATCH in d[1:]:
            return False
        return d[0] == self.batch if isinstance(d[0], int) else True


def take(feed: Rows, piece: slice) -> np.ndarray:
    """The rows of a slice."""
    return feed(piece) if callable(feed) else feed[piece]
