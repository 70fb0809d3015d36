"""Coalitions: which features are present, as packed bits uint64 [samples, ceil(features / 64)].

Feature f is bit f % 64 of word f // 64, and a set bit means present. Every sampler is a pure
function of the seed and the sample numbers ``start ... stop - 1``: pieces put together are the
whole.
"""

from __future__ import annotations

from math import gcd, isfinite
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numba import prange

from onnxplain.errors import InputError

from .jit import parallel
from .random import (
    BERNOULLI,
    KERNEL_SHAP,
    ONE,
    PERMUTATIONS,
    ZERO,
    below,
    checked_seed,
    checked_span,
    draw,
    stream,
)

Packed = npt.NDArray[np.uint64]

FULL = np.uint64(2**64 - 1)
TOP, LAST, BITS = np.uint64(63), np.int64(63), np.int64(6)


def words(features: int) -> int:
    """How many words hold the bits of so many features."""
    if features < 1:
        raise InputError(f"{features} features: coalitions need at least one")
    return -(-features // 64)


def pack(present: npt.NDArray[np.bool_]) -> Packed:
    """Booleans [samples, features] as packed bits."""
    samples, features = present.shape
    octets = np.zeros((samples, 8 * words(features)), np.uint8)
    packed = np.packbits(np.asarray(present, bool), axis=1, bitorder="little")
    octets[:, : packed.shape[1]] = packed
    return octets.view("<u8").astype(np.uint64, copy=False)


def unpack(packed: Packed, features: int) -> npt.NDArray[np.bool_]:
    """Packed bits as booleans [samples, features]."""
    octets = np.ascontiguousarray(packed, "<u8").view(np.uint8)
    bits = np.unpackbits(octets, axis=1, count=features, bitorder="little")
    return bits.view(bool)


def every(start: int, stop: int, features: int) -> Packed:
    """Coalitions by counting: number n has the bits of n, so 0 is empty and 2^features - 1 full."""
    out = np.zeros((checked_span(start, stop), words(features)), np.uint64)
    if stop > 2**features:
        raise InputError(f"coalition {stop - 1} of {features} features: there are {2**features}")
    out[:, 0] = np.arange(start, stop, dtype=np.uint64)
    return out


@parallel
def _bernoulli(seed: Any, start: int, threshold: Any, tail: Any, out: Any) -> None:
    width = out.shape[1]
    for i in prange(out.shape[0]):
        s = stream(seed, BERNOULLI, start + i)
        for w in range(width):
            # 64 numbers at once, bit by bit from the top, until each differs from the threshold:
            # those that are below it there are present.
            present, undecided, left = ZERO, FULL, threshold
            while left and undecided:
                s = draw(s)
                if left >> TOP:
                    present |= undecided & ~s[-1]
                    undecided &= s[-1]
                else:
                    undecided &= ~s[-1]
                left <<= ONE
            out[i, w] = present
        out[i, width - 1] &= tail


def _tail(features: int) -> np.uint64:
    """The bits of the last word that are features."""
    return FULL >> np.uint64(-features % 64)


def bernoulli(seed: int, start: int, stop: int, features: int, p: float = 0.5) -> Packed:
    """Each feature present with probability p, independently of the others (LIME, RISE)."""
    if not (isfinite(p) and 0 <= p <= 1):
        raise InputError(f"p = {p} is not a probability: give 0 <= p <= 1")
    out = np.empty((checked_span(start, stop), words(features)), np.uint64)
    if p == 1:
        out[:] = FULL
        out[:, -1] = _tail(features)
    else:
        _bernoulli(checked_seed(seed), start, np.uint64(int(p * 2.0**64)), _tail(features), out)
    return out


@parallel
def _kernel_shap(
    seed: Any, start: int, features: int, cumulative: Any, paired: int, tail: Any, out: Any
) -> None:
    width = out.shape[1]
    for i in prange(out.shape[0]):
        sample = start + i
        s = draw(stream(seed, KERNEL_SHAP, sample // 2 if paired else sample))
        size = 1 + np.searchsorted(cumulative, s[-1], side="right")
        flip = size > features - size  # the smaller side is drawn
        if flip:
            size = features - size
        for w in range(width):
            out[i, w] = ZERO
        # Floyd: a uniform subset, one number for each member.
        for last in range(features - size, features):
            s = draw(s)
            f = below(s[-1], last + 1)
            bit = ONE << np.uint64(f & LAST)
            if out[i, f >> BITS] & bit:
                f = last
                bit = ONE << np.uint64(f & LAST)
            out[i, f >> BITS] |= bit
        if flip != (paired and sample % 2 == 1):
            for w in range(width):
                out[i, w] = ~out[i, w]
            out[i, width - 1] &= tail


def kernel_shap(seed: int, start: int, stop: int, features: int, paired: bool = True) -> Packed:
    """Coalitions distributed as the Shapley kernel: neither empty nor full.

    Lundberg, Lee, "A unified approach to interpreting model predictions" (NIPS 2017): the kernel
    (F-1) / (C(F,k) k (F-k)), summed over the C(F,k) coalitions of size k, gives the size k with
    probability proportional to 1 / (k (F-k)); within a size all coalitions are equally likely. A
    regression on them needs no weights.

    paired: samples 2i and 2i + 1 are complements (Covert, Lee, "Improving KernelSHAP", 2021).
    """
    if features < 2:
        raise InputError(f"{features} features have no coalition that is neither empty nor full")
    sizes = np.arange(1, features)
    chance = 1 / (sizes * (features - sizes))
    # The last size takes what is left: its bound is not listed.
    cumulative = (np.cumsum(chance)[:-1] / chance.sum() * 2.0**64).astype(np.uint64)
    out = np.empty((checked_span(start, stop), words(features)), np.uint64)
    _kernel_shap(checked_seed(seed), start, features, cumulative, int(paired), _tail(features), out)
    return out


@parallel
def _permutations(seed: Any, start: int, block: int, step: int, reverse: int, out: Any) -> None:
    features = out.shape[1]
    for i in prange(out.shape[0]):
        member = (start + i) % block
        back = reverse * member  # 1: the base from its end
        shift = member * step % features
        s = stream(seed, PERMUTATIONS, (start + i) // block)
        # Fisher and Yates, inside out, at shifted or mirrored places.
        for j in range(features):
            s = draw(s)
            k = below(s[-1], j + 1)
            here = features - 1 - j if back else (j + shift) % features
            there = features - 1 - k if back else (k + shift) % features
            out[i, here] = out[i, there]
            out[i, there] = j


def permutations(
    seed: int,
    start: int,
    stop: int,
    features: int,
    kind: Literal["random", "antithetic", "stratified"] = "random",
) -> npt.NDArray[np.int32]:
    """Orders in which features join: int32 [permutations, features].

    - ``random``: independent and uniform.
    - ``antithetic``: 2i + 1 is the reverse of 2i (Mitchell et al., "Sampling permutations for
      Shapley value estimation", JMLR 2022).
    - ``stratified``: blocks of F cyclic shifts of one random permutation, in which each feature
      takes each position once. The shifts come in an order that spreads them evenly from the start.

    Each permutation by itself is uniform, so averages over any number of them are unbiased; what is
    independent of each other are pairs (antithetic) and blocks of F (stratified).
    """
    words(features)
    out = np.empty((checked_span(start, stop), features), np.int32)
    if kind not in ("random", "antithetic", "stratified"):
        raise InputError(f"kind {kind!r}: permutations are 'random', 'antithetic' or 'stratified'")
    block, step, reverse = 1, 0, 0
    if kind == "antithetic":
        block, reverse = 2, 1
    elif kind == "stratified":
        # Multiples of the golden section, made coprime, so that F of them reach every shift.
        near = round(features * 0.6180339887498949)
        step = min(
            (g for g in range(1, features + 1) if gcd(g, features) == 1),
            key=lambda g: abs(g - near),
        )
        block = features
    _permutations(checked_seed(seed), start, block, step, reverse, out)
    return out


@parallel
def _prefixes(order: Any, first: int, last: int, out: Any) -> None:
    sizes = order.shape[1] - 1
    for p in prange(first // sizes, (last - 1) // sizes + 1):
        begin = max(first, p * sizes)
        for n in range(begin, min(last, (p + 1) * sizes)):
            size = n - p * sizes + 1
            new = 0 if n == begin else size - 1  # what the row before does not have
            for w in range(out.shape[1]):
                out[n - first, w] = ZERO if n == begin else out[n - first - 1, w]
            for j in range(new, size):
                f = np.int64(order[p, j])
                out[n - first, f >> BITS] |= ONE << np.uint64(f & LAST)


def prefixes(order: npt.NDArray[np.int32], first: int, last: int) -> Packed:
    """The coalitions that permutations [P, F] pass through between empty and full.

    Number n of the P (F-1) is permutation n // (F-1) with the first n % (F-1) + 1 features of its
    order present. Gives numbers ``first ... last - 1``, packed.
    """
    order = np.ascontiguousarray(order, np.int32)
    number, features = order.shape
    out = np.empty((checked_span(first, last), words(features)), np.uint64)
    if last > number * (features - 1):
        raise InputError(
            f"coalitions up to {last}: {number} permutations of {features} features "
            f"pass through {number * (features - 1)}"
        )
    if len(out):
        _prefixes(order, first, last, out)
    return out
