"""How kernels are compiled: nopython, without the GIL, cached on disk, on first use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
from numba import njit

from . import LOCK

P = ParamSpec("P")
R = TypeVar("R")

# Elements of all arrays up to which a kernel runs in one thread.
_SMALL = 1 << 16
# The process that numba's threads belong to, once there are some.
_threads_of: dict[str, int] = {}

_log = logging.getLogger(__name__)


def kernel(function: Callable[P, R], parallel: bool = False) -> Callable[P, R]:
    """Compile at the first call; the cache is beside the package, or in the user's cache folder."""
    try:
        compiled = njit(nogil=True, cache=True, parallel=parallel, error_model="numpy")(function)
    except RuntimeError:  # numba found no folder that can be written
        _log.info("no folder for numba's cache: %s is compiled in every process", function.__name__)
        compiled = njit(nogil=True, parallel=parallel, error_model="numpy")(function)
    return cast("Callable[P, R]", compiled)


def parallel(function: Callable[P, R]) -> Callable[P, R]:
    """The same, with ``prange`` over threads, one such kernel at a time.

    Small arrays get one thread: what a second one saves there is less than the wait for it, and
    where others use the processor (the model does), a wait can take milliseconds. So does a process
    forked from one with threads: they are not there, and OpenMP ends it.
    """
    threaded, alone = kernel(function, parallel=True), kernel(_renamed(function))

    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        small = sum(a.size for a in args if isinstance(a, np.ndarray)) <= _SMALL
        if small or _threads_of.setdefault("process", os.getpid()) != os.getpid():
            return alone(*args, **kwargs)
        with LOCK:
            return threaded(*args, **kwargs)

    return chosen


def _renamed(function: Callable[P, R]) -> Callable[P, R]:
    """A copy with a name, and so a place in numba's cache, of its own."""
    made: Any = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    made.__qualname__ = f"{function.__qualname__}_alone"
    made.__module__ = function.__module__
    return cast("Callable[P, R]", made)


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """A helper of kernels: becomes part of those that call it, and of their caches."""
    return cast("Callable[P, R]", njit(nogil=True, error_model="numpy")(function))
