"""How kernels are compiled: nopython, without the GIL, cached on disk, on first use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast

from numba import njit

from . import LOCK

P = ParamSpec("P")
R = TypeVar("R")

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
    """The same, with ``prange`` over threads, one such kernel at a time."""
    compiled = kernel(function, parallel=True)

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with LOCK:
            return compiled(*args, **kwargs)

    return locked


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """A helper of kernels: becomes part of those that call it, and of their caches."""
    return cast("Callable[P, R]", njit(nogil=True, error_model="numpy")(function))
