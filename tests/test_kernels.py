"""Kernels: numpy's random numbers, the distributions asked for, sums as formulas give them."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, permutations

import numba
import numpy as np
import pytest
from onnxplain.kernels import coalitions as co
from onnxplain.kernels import random as rnd
from onnxplain.kernels.aggregate import GridSums, marginals, window_sums
from onnxplain.kernels.table import Table

from onnxplain.errors import InputError

SEED = 2**63 + 12345

SAMPLERS = {
    "bernoulli": lambda a, b: co.bernoulli(SEED, a, b, 100),
    "bernoulli 0.3": lambda a, b: co.bernoulli(SEED, a, b, 100, 0.3),
    "kernel shap": lambda a, b: co.kernel_shap(SEED, a, b, 70),
    "kernel shap alone": lambda a, b: co.kernel_shap(SEED, a, b, 70, paired=False),
    "random": lambda a, b: co.permutations(SEED, a, b, 7),
    "antithetic": lambda a, b: co.permutations(SEED, a, b, 7, "antithetic"),
    "stratified": lambda a, b: co.permutations(SEED, a, b, 7, "stratified"),
    "uniform": lambda a, b: rnd.uniform(SEED, a, b, 3),
    "integers": lambda a, b: rnd.integers(SEED, a, b, [5, 1, 32]),
    "every": lambda a, b: co.every(a, b, 8),
    "prefixes": lambda a, b: co.prefixes(co.permutations(SEED, 0, 3, 70), a, b),
}


@contextmanager
def one_thread() -> Iterator[None]:
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(threads)


def test_words_are_those_of_numpy() -> None:
    got = rnd.uniform(SEED, 1, 4, 9)
    for row, sample in zip(got, (1, 2, 3)):
        # numpy counts up before the first block
        counter = np.array([2**64 - 1, sample - 1, 0, 0], np.uint64)
        bits = np.random.Philox(key=np.array([SEED, rnd.UNIFORM], np.uint64), counter=counter)
        want = (bits.random_raw(9) >> np.uint64(11)) * 2.0**-53
        np.testing.assert_array_equal(row, want)


@pytest.mark.parametrize("name", SAMPLERS)
def test_pieces_and_threads_make_the_whole(name: str) -> None:
    sampler = SAMPLERS[name]
    whole = sampler(0, 200)
    ends = [0, 1, 1, 8, 77, 200]
    with one_thread():
        pieces = [sampler(a, b) for a, b in pairwise(ends)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("features", [1, 8, 63, 64, 65, 200])
def test_packing(features: int) -> None:
    present = np.random.default_rng(features).random((9, features)) < 0.5
    packed = co.pack(present)
    assert packed.dtype == np.uint64 and packed.shape == (9, co.words(features))
    np.testing.assert_array_equal(co.unpack(packed, features), present)
    for f in range(features):
        bit = packed[:, f // 64] >> np.uint64(f % 64) & np.uint64(1)
        np.testing.assert_array_equal(bit, present[:, f])
    # bits behind the last feature are never set: equal coalitions are equal words
    for drawn in (
        co.bernoulli(1, 0, 20, features, 0.7),
        co.bernoulli(1, 0, 20, features, 1.0),
        co.kernel_shap(1, 0, 20, max(features, 2)),
    ):
        bits = co.unpack(drawn, 64 * drawn.shape[1])
        assert not bits[:, max(features, 2) :].any()


def test_every_coalition_once() -> None:
    np.testing.assert_array_equal(
        co.unpack(co.every(0, 8, 3), 3), [[n >> f & 1 for f in range(3)] for n in range(8)]
    )
    assert (co.every(5, 9, 100) == [[n, 0] for n in range(5, 9)]).all()


def chi_square(counts: np.ndarray, chances: np.ndarray) -> float:
    """Pearson's statistic in standard deviations from its mean."""
    expected = counts.sum() * chances
    degrees = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.3, 0.5, 0.75, 1.0])
def test_bernoulli(p: float) -> None:
    n, features = 20_000, 70
    present = co.unpack(co.bernoulli(7, 0, n, features, p), features)
    deviation = math.sqrt(max(p * (1 - p), 1e-30) / n)
    assert abs(present.mean(0) - p).max() <= 4.5 * deviation
    if 0 < p < 1:  # no pair of features moves together
        correlation = np.cov(present.T) / (p * (1 - p))
        assert abs(correlation - np.eye(features)).max() < 6 / math.sqrt(n * min(p, 1 - p))


@pytest.mark.parametrize("paired", [True, False])
def test_kernel_shap_sizes_and_subsets(paired: bool) -> None:
    n, features = 60_000, 5
    drawn = co.kernel_shap(3, 0, n, features, paired)
    present = co.unpack(drawn, features)
    if paired:
        np.testing.assert_array_equal(present[::2], ~present[1::2])
        drawn = drawn[::2]  # the independent ones
    sizes = np.array([int(c).bit_count() for c in range(1, 2**features - 1)])
    weights = [(features - 1) / (math.comb(features, k) * k * (features - k)) for k in sizes]
    counts = np.bincount(drawn[:, 0].astype(int), minlength=2**features)
    assert counts[0] == counts[-1] == 0
    assert abs(chi_square(counts[1:-1], np.array(weights) / sum(weights))) < 4


def test_kernel_shap_sizes_of_many_features() -> None:
    features = 150
    present = co.unpack(co.kernel_shap(5, 0, 40_000, features, paired=False), features)
    k = np.arange(1, features)
    chances = 1 / (k * (features - k))
    counts = np.bincount(present.sum(1), minlength=features + 1)[1:-1]
    assert abs(chi_square(counts, chances / chances.sum())) < 4
    assert abs(present.mean(0) - 0.5).max() < 4.5 * 0.5 / math.sqrt(40_000)
    assert set(co.kernel_shap(0, 0, 100, 2)[:, 0]) == {1, 2}


def test_permutations_are_uniform() -> None:
    orders = co.permutations(11, 0, 48_000, 4)
    assert orders.dtype == np.int32
    found, counts = np.unique(orders, axis=0, return_counts=True)
    assert sorted(map(tuple, found)) == sorted(permutations(range(4)))
    assert abs(chi_square(counts, np.full(24, 1 / 24))) < 4


def test_antithetic_and_stratified_permutations() -> None:
    plain = co.permutations(1, 0, 10, 9)
    pairs = co.permutations(1, 0, 20, 9, "antithetic")
    np.testing.assert_array_equal(pairs[::2], plain)
    np.testing.assert_array_equal(pairs[1::2], plain[:, ::-1])
    for features in (1, 2, 6, 9, 64):
        blocks = co.permutations(1, 0, 3 * features, features, "stratified")
        everyone = np.arange(features)
        for block in blocks.reshape(3, features, features):
            for row, column in zip(block, block.T):
                np.testing.assert_array_equal(np.sort(row), everyone)
                np.testing.assert_array_equal(np.sort(column), everyone)


@pytest.mark.parametrize("features", [1, 2, 5, 70])
def test_prefixes(features: int) -> None:
    orders = co.permutations(2, 0, 4, features)
    want = np.zeros((4 * (features - 1), features), bool)
    for n in range(len(want)):
        p, j = divmod(n, features - 1)
        want[n, orders[p, : j + 1]] = True
    np.testing.assert_array_equal(co.prefixes(orders, 0, len(want)), co.pack(want))
    last = len(want) - len(want) // 4
    np.testing.assert_array_equal(
        co.prefixes(orders, len(want) // 3, last), co.pack(want)[len(want) // 3 : last]
    )


@pytest.mark.parametrize(("features", "limit"), [(4, None), (70, None), (70, 50), (3, 0)])
def test_table_is_a_dict(features: int, limit: int | None) -> None:
    rng = np.random.default_rng(features)
    table, known = Table(co.words(features), limit), {}
    for size in (0, 1, 3, 200, 50, 1000):
        present = np.zeros((size, features), bool)
        present[:, -4:] = rng.random((size, features))[:, -4:] < 0.5
        present[: size // 2] |= rng.random((size // 2, features)) < 0.1
        packed = co.pack(present)
        want, fresh = [], []
        for i, key in enumerate(map(tuple, packed)):
            if key not in known and (limit is None or len(known) < limit):
                known[key] = len(known)
                fresh.append(i)
            want.append(known.get(key, -1))
        numbers, new = table.number(packed)
        np.testing.assert_array_equal(numbers, want)
        np.testing.assert_array_equal(new, fresh)
    assert len(table) == len(known)


@pytest.mark.parametrize("shape", [(), (11,), (3, 7, 5), (2, 3, 4, 3)])
def test_window_sums(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    ends = np.sort(rng.integers(0, np.array(shape, int) + 1, (2, 30, len(shape))), axis=0)
    values = rng.normal(size=(30, 4))
    total, count = np.zeros((4, *shape)), np.zeros(shape)
    want, times = np.zeros_like(total), np.zeros_like(count)
    for low, high, value in zip(*ends, values):
        box = tuple(slice(a, b) for a, b in zip(low, high))
        want[(slice(None), *box)] += value.reshape(-1, *[1] * len(shape))
        times[box] += 1
    for part in (slice(0, 13), slice(13, 30)):
        window_sums(ends[0][part], ends[1][part], values[part], total, count)
    np.testing.assert_array_equal(total, want)
    np.testing.assert_array_equal(count, times)
    again, once = np.zeros_like(total), np.zeros_like(count)
    with one_thread():
        window_sums(*ends, values, again, once)
    np.testing.assert_array_equal(again, total)


@pytest.mark.parametrize("group", [1, 2, 6])
def test_marginals(group: int) -> None:
    rng = np.random.default_rng(group)
    orders, scores = co.permutations(0, 0, 12, 6), rng.normal(size=(12, 7, 3))
    total, squares = np.zeros((2, 3, 6))
    for part in (slice(0, 6), slice(6, 12)):
        marginals(orders[part], scores[part], total, squares, group)
    added = np.zeros((12, 3, 6))
    for p, order in enumerate(orders):
        added[p][:, order] = np.diff(scores[p], axis=0).T
    np.testing.assert_allclose(total, added.sum(0), rtol=1e-12)
    means = added.reshape(-1, group, 3, 6).mean(1)
    np.testing.assert_allclose(squares, (means**2).sum(0), rtol=1e-12)


def table_of_shifts(size: int, cells: int, shifts: int) -> np.ndarray:
    """Linear interpolation between neighbouring cells, moved on by each shift."""
    at = np.clip((np.arange(size) + np.arange(shifts)[:, None] + 0.5) / shifts - 0.5, 0, cells - 1)
    return np.maximum(0, 1 - abs(at[..., None] - np.arange(cells)))


@pytest.mark.parametrize("height", [1, 9])
def test_grid_sums(height: int) -> None:
    rng = np.random.default_rng(height)
    rows = table_of_shifts(9, 4, 3) if height > 1 else np.ones((1, 1, 1))
    columns = table_of_shifts(10, 3, 4)
    cells = rng.random((40, rows.shape[2], 3)) * (rng.random((40, 1, 1)) < 0.8)
    shift = np.stack([rng.integers(0, len(rows), 40), rng.integers(0, 4, 40)], 1)
    scores = rng.normal(size=(40, 2))
    once, parts = GridSums(2, rows, columns), GridSums(2, rows, columns)
    once.add(cells, shift, scores)
    for a, b in ((0, 7), (7, 40)):
        parts.add(cells[a:b], shift[a:b], scores[a:b])
    masks = rows[shift[:, 0]] @ cells @ columns[shift[:, 1]].transpose(0, 2, 1)
    seen = scores[..., None, None] * masks[:, None]
    want = seen.sum(0), (seen**2).sum(0), np.stack([masks.sum(0)] * 2)
    with one_thread():
        alone = parts.maps()
    for got, same, expected in zip(once.maps(), alone, want):
        np.testing.assert_array_equal(got, same)
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)
    # an output that leaves keeps what it has; without moments there is only the first sum
    parts.add(cells, shift, scores[:, 1:], np.array([1]))
    np.testing.assert_array_equal(parts.maps()[0][0], once.maps()[0][0])
    np.testing.assert_allclose(parts.maps()[1][1], 2 * want[1][1], rtol=1e-11, atol=1e-12)
    plain = GridSums(2, rows, columns, moments=False)
    plain.add(cells, shift, scores)
    first, second, third = plain.maps()
    np.testing.assert_array_equal(first, once.maps()[0])
    assert len(second) == len(third) == 0


def sums() -> GridSums:
    return GridSums(1, np.ones((1, 1, 1)), table_of_shifts(10, 3, 4))


def corners(low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array([[low]]), np.array([[high]])


REFUSED = {
    "no features": lambda: co.bernoulli(0, 0, 1, 0),
    "one feature": lambda: co.kernel_shap(0, 0, 1, 1),
    "no order": lambda: co.permutations(0, 0, 1, 0),
    "kind": lambda: co.permutations(0, 0, 1, 3, "sobol"),  # type: ignore[arg-type]
    "negative seed": lambda: co.bernoulli(-1, 0, 1, 3),
    "long seed": lambda: rnd.uniform(2**64, 0, 1, 3),
    "backwards": lambda: co.bernoulli(0, 5, 4, 3),
    "probability": lambda: co.bernoulli(0, 0, 1, 3, 1.5),
    "no probability": lambda: co.bernoulli(0, 0, 1, 3, float("nan")),
    "too many": lambda: co.every(0, 9, 3),
    "past the last order": lambda: co.prefixes(co.permutations(0, 0, 2, 3), 0, 5),
    "bounds": lambda: rnd.integers(0, 0, 1, [3, 0]),
    "no words": lambda: Table(0),
    "other words": lambda: Table(1).number(np.zeros((2, 2), np.uint64)),
    "outside": lambda: window_sums(*corners(3, 6), np.ones((1, 1)), np.zeros((1, 5)), np.zeros(5)),
    "inverted": lambda: window_sums(*corners(3, 2), np.ones((1, 1)), np.zeros((1, 5)), np.zeros(5)),
    "a copy would be added to": lambda: window_sums(
        *corners(0, 2), np.ones((1, 1)), np.zeros((1, 5), np.float32), np.zeros(5)
    ),
    "part of a group": lambda: marginals(
        co.permutations(0, 0, 3, 2), np.zeros((3, 3, 1)), np.zeros((1, 2)), np.zeros((1, 2)), 2
    ),
    "short scores": lambda: marginals(
        co.permutations(0, 0, 3, 2), np.zeros((3, 2, 1)), np.zeros((1, 2)), np.zeros((1, 2))
    ),
    "far shift": lambda: sums().add(np.ones((1, 1, 3)), np.array([[0, 4]]), np.ones((1, 1))),
    "other cells": lambda: sums().add(np.ones((1, 1, 4)), np.array([[0, 0]]), np.ones((1, 1))),
    "cubic": lambda: GridSums(1, np.ones((1, 1, 1)), np.full((1, 5, 3), 1 / 3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    with pytest.raises(InputError):
        REFUSED[name]()


IMPORTS = """
import sys
import onnxplain
import onnxplain.kernels
assert "numba" not in sys.modules, "onnxplain imports numba"
from numba.core import event
with event.install_recorder("numba:compile") as seen:
    from onnxplain.kernels import aggregate, coalitions, random, table
assert not seen.buffer, "something was compiled"
with event.install_recorder("numba:compile") as seen:
    words = random.uniform(1, 0, 2, 3)
    coalitions.every(0, 2, 3)
print(len(seen.buffer), words.sum())
"""


def run(code: str, **variables: str) -> list[str]:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_without_a_folder_for_the_cache_kernels_still_run() -> None:
    code = """
from numba.core import caching
for kind in vars(caching).values():
    if isinstance(kind, type) and hasattr(kind, "from_function"):
        kind.from_function = classmethod(lambda *_: None)
from onnxplain.kernels import random
print(random.uniform(1, 0, 2, 3).sum())
"""
    assert run(code) == [str(rnd.uniform(1, 0, 2, 3).sum())]


def test_imports_compile_nothing_and_the_second_process_finds_the_cache(tmp_path) -> None:
    first, words = run(IMPORTS, NUMBA_CACHE_DIR=str(tmp_path))
    assert int(first) > 0
    assert run(IMPORTS, NUMBA_CACHE_DIR=str(tmp_path)) == ["0", words]
