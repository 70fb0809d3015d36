"""A rewritten graph, compiled once and run over any number of rows in bounded memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxplain.errors import InputError, OutOfMemoryError
from onnxplain.run import memory
from onnxplain.run.session import Provider, Session

log = logging.getLogger("onnxplain")

Rows = np.ndarray | Callable[[slice], np.ndarray]
"""A feed with one row per example: an array, or a function that makes the rows of a slice."""


@dataclass(frozen=True)
class Settings:
    """How graphs are run."""

    providers: Sequence[Provider] | None = None
    session_options: Any = None
    memory_limit: int | None = None


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
        self._bytes: dict[Any, tuple[int, int]] = {}

    @property
    def session(self) -> Session:
        """Compiled on first use, then kept."""
        if self._session is None:
            self._session = Session(
                self.model, self.settings.providers, self.settings.session_options
            )
        return self._session

    def fitting(self, feeds: Mapping[str, tuple[int, ...]], rows: int) -> int:
        """How many rows (at least 1, at most ``rows``) fit the memory allowed.

        Args:
            feeds: the shapes of all inputs for one row.
            rows: how many there are.
        """
        key = tuple(sorted(feeds.items()))
        if key not in self._bytes:
            one = memory.live_bytes(self.model, feeds)
            more = {
                k: s if k in self._shared(feeds) else (2 * s[0], *s[1:]) for k, s in feeds.items()
            }
            two = memory.live_bytes(self.model, more)
            self._bytes[key] = (max(two - one, 1), max(2 * one - two, 0))
        slope, fixed = self._bytes[key]
        room = memory.budget(self.settings.memory_limit) / memory.ARENA_FACTOR
        if self.session.providers[0] == "CPUExecutionProvider":
            room = min(room, memory.CPU_SWEET_SPOT)
        return int(min(max((room - fixed) // slope, 1), rows))

    def _shared(self, feeds: Mapping[str, tuple[int, ...]]) -> set[str]:
        """Inputs whose first axis does not count rows."""
        symbolic = {
            v.name or ""
            for v in self.model.graph.inputs
            if v.shape is not None and len(v.shape) and not isinstance(v.shape[0], int)
        }
        return {k for k in feeds if k not in symbolic or not feeds[k]}

    def chunks(
        self,
        rows: Mapping[str, Rows],
        shared: Mapping[str, np.ndarray],
        count: int,
        outputs: Sequence[str] | None = None,
        at_most: int | None = None,
    ) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Run rows in chunks that fit memory; yields each chunk's slice and results.

        A chunk that runs out of memory is halved and tried again.

        Raises:
            OutOfMemoryError: a single row does not fit.
        """
        if count == 0:
            raise InputError("the input has no rows: there is nothing to run")
        size = self.batch or self._first_chunk(rows, shared, count)
        if at_most is not None and self.batch is None:
            size = max(1, min(size, at_most))
        start = 0
        while start < count:
            piece = slice(start, min(start + size, count))
            feeds = {name: take(feed, piece) for name, feed in rows.items()}
            missing = (self.batch or 0) - (piece.stop - piece.start)
            if missing > 0:  # a graph of fixed batch: its last rows are repeated and cut off again
                feeds = {
                    k: np.concatenate([v, v[-1:].repeat(missing, 0)]) for k, v in feeds.items()
                }
            try:
                results = self.session({**feeds, **shared}, outputs)
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

    def _first_chunk(
        self, rows: Mapping[str, Rows], shared: Mapping[str, np.ndarray], count: int
    ) -> int:
        if count == 1:
            return 1
        one = {name: take(feed, slice(0, 1)).shape for name, feed in rows.items()}
        one |= {name: feed.shape for name, feed in shared.items()}
        return self.fitting(one, count)

    def run(
        self,
        rows: Mapping[str, Rows],
        shared: Mapping[str, np.ndarray],
        count: int,
        outputs: Sequence[str] | None = None,
        at_most: int | None = None,
    ) -> dict[str, np.ndarray]:
        """As :meth:`chunks`, the results put together along the first axis."""
        whole: dict[str, np.ndarray] = {}
        for piece, results in self.chunks(rows, shared, count, outputs, at_most):
            for name, part in results.items():
                if piece == slice(0, count):
                    whole[name] = part
                else:
                    if name not in whole:
                        whole[name] = np.empty((count, *part.shape[1:]), part.dtype)
                    whole[name][piece] = part
        return whole


def take(feed: Rows, piece: slice) -> np.ndarray:
    """The rows of a slice."""
    return feed(piece) if callable(feed) else feed[piece]
