"""How kernels are compiled: nopython, without the GIL, cached on disk, on first use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

import numpy as np
from numba import get_num_threads, njit, set_num_threads

from . import LOCK

P = ParamSpec("P")
R = TypeVar("R")

# Elements of all arrays up to which a kernel runs in one thread.
_SMALL = 1 << 16

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
    where others use the processor (the model does), a wait can take milliseconds.
    """
    compiled = kernel(function, parallel=True)

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with LOCK:
            if sum(a.size for a in args if isinstance(a, np.ndarray)) > _SMALL:
                return compiled(*args, **kwargs)
            threads = get_num_threads()
            set_num_threads(1)
            try:
                return compiled(*args, **kwargs)
            finally:
                set_num_threads(threads)

    return locked


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """A helper of kernels: becomes part of those that call it, and of their caches."""
    return cast("Callable[P, R]", njit(nogil=True, error_model="numpy")(function))
