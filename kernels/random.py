"""Philox4x64-10: random numbers that are a function of seed, stream and sample number.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The key is
(seed, stream), the counter (draw, sample number): sample 7 is the same whoever computes it, when
and beside what. ``numpy.random.Philox`` gives the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import prange, types
from numba.extending import intrinsic

from onnxplain.errors import InputError

from .jit import inlined, parallel

#: One word of random bits and what comes next: key, sample, number of words drawn, four words.
Stream = tuple[Any, Any, Any, Any, Any, Any, Any, Any]

# Streams: samplers that share a seed must not share numbers.
BERNOULLI, KERNEL_SHAP, PERMUTATIONS, UNIFORM, INTEGERS = (np.uint64(i) for i in range(1, 6))

ZERO, ONE, TWO, THREE = (np.uint64(i) for i in range(4))
MULTIPLIERS = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
WEYL = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


def checked_seed(seed: int) -> np.uint64:
    """The seed as the first half of the key: an integer from 0 to 2^64 - 1."""
    seed = index(seed)
    if not 0 <= seed < 2**64:
        raise InputError(f"seed {seed} is not in 0 ... 2^64 - 1: give a seed in that range")
    return np.uint64(seed)


def checked_span(start: int, stop: int) -> int:
    """How many samples ``start ... stop - 1`` are."""
    if not 0 <= start <= stop < 2**63:
        raise InputError(f"samples {start} to {stop}: give 0 <= start <= stop")
    return stop - start


def _high(context: Any, a: Any, b: Any) -> Any:
    """The upper half of the product of two 64-bit words, as LLVM writes it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(word, wide) for word in args))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


high: Any = intrinsic(_high)


@inlined
def philox(k0: Any, k1: Any, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any]:
    """Four random words for the key (k0, k1) and the counter (a, b, c, d)."""
    for _ in range(10):
        a, b, c, d = (
            high(MULTIPLIERS[1], c) ^ b ^ k0,
            MULTIPLIERS[1] * c,
            high(MULTIPLIERS[0], a) ^ d ^ k1,
            MULTIPLIERS[0] * a,
        )
        k0 += WEYL[0]
        k1 += WEYL[1]
    return a, b, c, d


@inlined
def stream(seed: Any, number: Any, sample: Any) -> Stream:
    """The words of one sample, before the first: ``s = draw(s)`` puts the next into ``s[-1]``."""
    return seed, number, np.uint64(sample), ZERO, ZERO, ZERO, ZERO, ZERO


@inlined
def draw(s: Stream) -> Stream:
    """The next word."""
    k0, k1, sample, i, b, c, d, a = s
    if i & THREE == ZERO:
        a, b, c, d = philox(k0, k1, i >> TWO, sample, ZERO, ZERO)
    else:
        a, b, c, d = b, c, d, a
    return k0, k1, sample, i + ONE, b, c, d, a


@inlined
def below(word: Any, bound: Any) -> Any:
    """A word as an integer in 0 ... bound - 1 (one number is likelier by bound / 2^64 at most)."""
    return np.int64(high(word, np.uint64(bound)))


@parallel
def _uniform(seed: Any, start: int, out: Any) -> None:
    for i in prange(out.shape[0]):
        s = stream(seed, UNIFORM, start + i)
        for j in range(out.shape[1]):
            s = draw(s)
            out[i, j] = (s[-1] >> np.uint64(11)) * 2.0**-53


@parallel
def _integers(seed: Any, start: int, bounds: Any, out: Any) -> None:
    for i in prange(out.shape[0]):
        s = stream(seed, INTEGERS, start + i)
        for j in range(out.shape[1]):
            s = draw(s)
            out[i, j] = below(s[-1], bounds[j])


def uniform(seed: int, start: int, stop: int, count: int) -> npt.NDArray[np.float64]:
    """Numbers uniform in [0, 1): float64 [stop - start, count]."""
    out = np.empty((checked_span(start, stop), count))
    _uniform(checked_seed(seed), start, out)
    return out


def integers(
    seed: int, start: int, stop: int, bounds: Sequence[int] | npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Integers uniform in 0 ... bounds[j] - 1: int64 [stop - start, len(bounds)]."""
    limits = np.ascontiguousarray(bounds, np.int64)
    if limits.ndim != 1 or (limits < 1).any():
        raise InputError(f"bounds {bounds}: give positive integers, one for each column")
    out = np.empty((checked_span(start, stop), len(limits)), np.int64)
    _integers(checked_seed(seed), start, limits, out)
    return out
