"""A callable's scores on perturbed copies of its inputs, made on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from onnxplain.perturb.game import Game, Given, Off, Permuted, Play
from onnxplain.perturb.graph_game import some
from onnxplain.run import memory
from onnxplain.run.program import Rows, take

# Bytes of perturbed copies that are made at once, where no limit is set.
_CALL_BYTES = 1 << 26


class CallGame(Game):
    """A callable's scores."""

    def __init__(self, play: Play, index: np.ndarray, place: np.ndarray) -> None:
        super().__init__(play, index, place)
        self._set()

    def _set(self) -> None:
        self._arrays = some(self.play.feeds, self.index, self.play.model).arrays
        self._shared = self.play.form.shared(self.place)

    def keep(self, kept: np.ndarray) -> None:
        super().keep(kept)
        self._set()

    @staticmethod
    def rows_at_once(play: Play) -> int:
        """How many perturbed rows are made at once."""
        row = sum(v[:1].nbytes for v in play.feeds.arrays.values())
        limit = play.model.settings.memory_limit
        room = _CALL_BYTES if limit is None else min(_CALL_BYTES, memory.budget(limit) // 4)
        fit = max(room // max(row, 1), 1)
        return int(min(fit, play.model.batch_size or fit))

    def _evaluate(self, rows: Mapping[str, Rows], count: int) -> Iterator[tuple[slice, np.ndarray]]:
        play, many = self.play, self.rows_at_once(self.play)
        copies = 1 if play.at_once else max(many // len(self.index), 1)
        backs = min(play.off.count, copies)
        size = min(max(copies // backs, 1), play.at_most or count)
        for start in range(0, count, size):
            piece = slice(start, min(start + size, count))
            part = {name: take(feed, piece) for name, feed in rows.items()}
            total: Any = 0.0
            for low in range(0, play.off.count, backs):
                back = slice(low, min(low + backs, play.off.count))
                found = self._answers(part, piece.stop - piece.start, back)
                total = total + found.sum(axis=1) / play.off.count
            yield piece, total

    def _answers(self, rows: Mapping[str, np.ndarray], samples: int, back: slice) -> np.ndarray:
        """Scores [S, B, E, K]."""
        play, wanted = self.play, self.play.scores
        lead = (samples, back.stop - back.start, len(self.index))
        fed = {}
        for name, x in self._arrays.items():
            if name in {v.name for v in play.wrt}:
                mixed = self._mixed(rows, name, x, back)
            else:
                mixed = x[None, None]
            wide = np.broadcast_to(mixed, (*lead, *x.shape[1:]))
            fed[name] = np.ascontiguousarray(wide).reshape(math.prod(lead), *x.shape[1:])
        answer = play.model.evaluate(fed, None if play.at_once else play.shape, play.at_once)
        values = answer.reshape(*((1, 1, 1) if play.at_once else lead), -1)
        if wanted.columns is not None:
            columns = wanted.columns
            columns = columns if len(columns) == 1 else columns[self.index]
            wide = np.broadcast_to(columns[None, None], (*values.shape[:3], columns.shape[1]))
            values = np.take_along_axis(values, wide, axis=3)
        return values

    def _mixed(
        self, rows: Mapping[str, np.ndarray], name: str, x: np.ndarray, back: slice
    ) -> np.ndarray:
        """A source where it is kept, else what it is replaced with, [S, B, E, ...]."""
        off = self.play.off
        if isinstance(off, Given):
            other = rows[f"given.{name}"][:, None, self.index]
        elif isinstance(off, Permuted):
            everyone = self.play.feeds.arrays[name]
            other = everyone[rows["order"][:, self.index]][:, None]
        else:
            assert isinstance(off, Off)
            arrays = off.arrays[name][back]
            other = (arrays if arrays.shape[1] == 1 else arrays[:, self.index])[None]
        kept = self.play.form.masks(rows, self._shared, name, x)[:, None]
        if kept.dtype == np.bool_:
            return np.where(kept, x[None, None], other)
        return (kept * x[None, None] + (1 - kept) * other).astype(x.dtype)
