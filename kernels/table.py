"""Coalitions seen before, so that equal ones are evaluated once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxplain.errors import InputError

from .jit import inlined, kernel
from .random import WEYL

FOLD, MIX = np.uint64(29), np.uint64(32)


@inlined
def _home(key: Any, slots: Any) -> Any:
    """The slot where the search for a key starts."""
    h = WEYL[1]
    for word in key:
        h = (h ^ word) * WEYL[0]
        h ^= h >> FOLD
    h *= WEYL[1]
    return np.int64((h ^ (h >> MIX)) & np.uint64(slots.shape[0] - 1))


@kernel
def _rehash(keys: Any, count: int, slots: Any) -> None:
    for number in range(count):
        at = _home(keys[number], slots)
        while slots[at] >= 0:
            at = (at + 1) & (slots.shape[0] - 1)
        slots[at] = number


@kernel
def _number(packed: Any, keys: Any, count: int, slots: Any, numbers: Any, fresh: Any) -> int:
    """Numbers of the rows; positions of new ones in ``fresh``. Gives the new count."""
    before = count
    for i in range(packed.shape[0]):
        at = _home(packed[i], slots)
        while slots[at] >= 0 and (keys[slots[at]] != packed[i]).any():
            at = (at + 1) & (slots.shape[0] - 1)
        if slots[at] < 0 and count < keys.shape[0]:
            keys[count] = packed[i]
            slots[at] = count
            fresh[count - before] = i
            count += 1
        numbers[i] = slots[at]
    return count


class Table:
    """Coalitions by number, in order of first appearance; whole keys are compared.

    words: words of a packed coalition.
    limit: how many coalitions are remembered at most; default, as many as take 64 MiB here.
    """

    def __init__(self, words: int, limit: int | None = None) -> None:
        if words < 1 or (limit is not None and limit < 0):
            raise InputError(f"words = {words}, limit = {limit}: give words >= 1 and limit >= 0")
        self.limit = 2**26 // (8 * words + 32) if limit is None else limit
        self.count = 0
        self._keys = np.empty((0, words), np.uint64)
        self._slots = np.full(1, -1, np.int64)

    def __len__(self) -> int:
        return self.count

    def number(
        self, packed: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Numbers [samples] of packed coalitions [samples, words], and where new ones are.

        The second array has the position of the first appearance of each coalition that got a new
        number, in the order of the numbers. A coalition that the full table does not know has the
        number -1 and no position: nothing is remembered of it.
        """
        packed = np.ascontiguousarray(packed, np.uint64)
        if packed.ndim != 2 or packed.shape[1] != self._keys.shape[1]:
            raise InputError(
                f"coalitions of shape {packed.shape}: this table takes "
                f"[samples, {self._keys.shape[1]}]"
            )
        self._reserve(min(self.limit, self.count + len(packed)))
        numbers, fresh = np.empty((2, len(packed)), np.int64)
        before = self.count
        self.count = _number(packed, self._keys, before, self._slots, numbers, fresh)
        return numbers, fresh[: self.count - before].copy()

    def _reserve(self, entries: int) -> None:
        """Room for so many: keys grow by doubling, and at least half of the slots stay empty."""
        if entries <= len(self._keys):
            return
        room = min(self.limit, max(entries, 2 * len(self._keys)))
        keys = np.empty((room, self._keys.shape[1]), np.uint64)
        keys[: self.count] = self._keys[: self.count]
        self._keys, self._slots = keys, np.full(2 << room.bit_length(), -1, np.int64)
        _rehash(keys, self.count, self._slots)
