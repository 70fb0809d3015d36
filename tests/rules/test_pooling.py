"""Derivatives of pooling."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnxplain.rules.vjp import pooling
from tests.projection import Case, check, evaluate, gradient, load, make_model

rng = np.random.default_rng(5)
r = rng.standard_normal


def rows(op: str, shape: tuple[int, ...], kernel: list[int] | None, **attrs: object) -> list[Case]:
    """A case with sizes known, and with only the rank known."""
    if kernel is not None:
        attrs["kernel_shape"] = kernel
    name = "x".join(map(str, shape)) + "".join(f"-{k}{v}" for k, v in attrs.items())
    x = r(shape)
    return [
        Case(op, [x], attrs, name=name),
        Case(op, [x], attrs, name=f"{name}-symbolic", symbolic=(0,)),
    ]


# Geometries that all pools of windows share.
GEOMETRIES: list[tuple[tuple[int, ...], list[int], dict[str, object]]] = [
    ((2, 3, 7), [3], {}),
    ((2, 3, 8), [3], {"strides": [2], "pads": [1, 0], "dilations": [2]}),
    ((2, 3, 6, 7), [2, 2], {"strides": [2, 2]}),
    ((2, 3, 6, 7), [3, 3], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ((2, 3, 6, 7), [3, 2], {"pads": [0, 1, 2, 0]}),
    ((2, 3, 6, 7), [2, 3], {"strides": [2, 2], "ceil_mode": 1}),
    ((2, 3, 6, 7), [3, 3], {"strides": [2, 3], "ceil_mode": 1, "pads": [1, 1, 1, 1]}),
    ((1, 2, 5, 5), [2, 2], {"strides": [3, 3], "ceil_mode": 1, "pads": [0, 0, 1, 1]}),
    ((2, 3, 6, 7), [2, 2], {"dilations": [2, 3]}),
    ((2, 3, 7, 7), [2, 2], {"strides": [2, 2], "dilations": [3, 2], "ceil_mode": 1}),
    ((2, 3, 6, 7), [3, 2], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((2, 3, 6, 7), [3, 2], {"auto_pad": "SAME_LOWER"}),
    ((2, 3, 6, 7), [3, 2], {"auto_pad": "VALID", "strides": [2, 1]}),
    ((1, 2, 4, 5, 4), [2, 2, 3], {"strides": [2, 1, 1], "pads": [0, 1, 1, 0, 0, 1]}),
    ((0, 3, 6, 7), [2, 2], {}),
]
MAX = [c for shape, kernel, attrs in GEOMETRIES for c in rows("MaxPool", shape, kernel, **attrs)]
MAX += rows("MaxPool", (2, 3, 6, 5), [2, 2], storage_order=1)
AVERAGE = [
    c
    for shape, kernel, attrs in GEOMETRIES
    for include in (0, 1)
    for c in rows("AveragePool", shape, kernel, count_include_pad=include, **attrs)
]
LP = [
    c
    for i, (shape, kernel, attrs) in enumerate(GEOMETRIES)
    for c in rows("LpPool", shape, kernel, p=(2, 1, 3)[i % 3], **attrs)
]
GLOBAL = [
    c
    for op, attrs in (
        ("GlobalAveragePool", {}),
        ("GlobalMaxPool", {}),
        ("GlobalLpPool", {"p": 1}),
        ("GlobalLpPool", {"p": 2}),
        ("GlobalLpPool", {"p": 3}),
    )
    for shape in ((2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 2, 3), (0, 2, 3, 3))
    for c in rows(op, shape, None, **attrs)
]
CASES = MAX + AVERAGE + LP + GLOBAL


@pytest.mark.parametrize("case", CASES, ids=str)
def test_projection(case: Case) -> None:
    check(case)


@pytest.fixture(params=["indices", "slices", "symbolic"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways back through MaxPool: by indices where it is small or of unknown size, or by slices.

    The rows above are small.
    """
    if request.param == "slices":
        monkeypatch.setattr(pooling, "_SMALL", -1)
    return str(request.param)


@pytest.mark.parametrize("case", [c for c in MAX if not c.symbolic], ids=str)
def test_max_pool_by_slices(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_SMALL", -1)
    check(case)


def test_max_pool_chooses_by_size() -> None:
    def operators(side: int) -> set[str]:
        case = Case("MaxPool", [np.zeros((1, 2, side, side))], {"kernel_shape": [2, 2]})
        return {n.op_type for n in gradient(load(make_model(case)), "y0", ["x0"]).graph}

    assert "ScatterND" in operators(64)
    assert "ScatterND" not in operators(65)


def _gradient_of(op: str, x: np.ndarray, g: np.ndarray, symbolic: bool, **attrs: object) -> Any:
    case = Case(op, [x], attrs, symbolic=(0,) if symbolic else ())
    back = gradient(load(make_model(case)), "y0", ["x0"])
    return evaluate(back, {"x0": x, "cotangent": g})[1]


def test_max_pool_gives_ties_to_the_first_in_row_major_order(form: str) -> None:
    symbolic = form == "symbolic"
    x = np.zeros((1, 1, 4, 4))
    g = np.arange(1.0, 5.0).reshape(1, 1, 2, 2)
    attrs = {"kernel_shape": [2, 2], "strides": [2, 2]}
    got = _gradient_of("MaxPool", x, g, symbolic, **attrs)
    want = np.zeros((4, 4))
    want[::2, ::2] = g
    np.testing.assert_array_equal(got[0, 0], want)
    # The first row with the maximum wins, not the first column.
    x[0, 0, :2, :2] = [[0, 1], [1, 0]]
    got = _gradient_of("MaxPool", x, g, symbolic, **attrs)
    np.testing.assert_array_equal(got[0, 0, :2, :2], [[0, 1], [0, 0]])


def test_overlapping_windows_add_up(form: str) -> None:
    symbolic = form == "symbolic"
    x = np.zeros((1, 1, 5, 5))
    x[0, 0, 2, 2] = 1.0
    attrs = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    got = _gradient_of("MaxPool", x, np.ones((1, 1, 3, 3)), symbolic, **attrs)
    want = np.zeros((5, 5))
    want[2, 2] = 1.0
    # Padding is never chosen, and each of the other windows has its own first zero.
    want[[0, 0, 0, 1, 1, 3, 3, 3], [0, 1, 3, 0, 3, 0, 1, 3]] = 1.0
    np.testing.assert_array_equal(got[0, 0], want)


@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min])
def test_max_pool_of_nothing_but_minus_infinity_gives_it_to_the_first(
    form: str, low: float
) -> None:
    x, g = np.full((1, 1, 4, 4), low, np.float32), np.arange(1, 10, dtype=np.float32)
    x[0, 0, 2, 2] = 0.0
    case = Case(
        "MaxPool",
        [x.astype(np.float64)],
        {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0], "strides": [2, 2]},
        symbolic=(0,) if form == "symbolic" else (),
    )
    back = gradient(load(make_model(case, "float32")), "y0", ["x0"])
    session = ort.InferenceSession(ir.to_proto(back).SerializeToString())
    g = g[:4].reshape(1, 1, 2, 2)
    got = session.run(None, {"x0": x, "cotangent": g})[1]
    want = np.zeros((4, 4))
    want[0, 0], want[0, 1], want[1, 0], want[2, 2] = 1, 2, 3, 4
    np.testing.assert_array_equal(got[0, 0], want)


def test_global_max_pool_gives_ties_to_the_first() -> None:
    got = _gradient_of("GlobalMaxPool", np.zeros((1, 2, 2, 2)), np.ones((1, 2, 1, 1)), False)
    np.testing.assert_array_equal(got[0], [[[1, 0], [0, 0]]] * 2)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_lp_pool_of_zeros_has_a_finite_gradient(p: int) -> None:
    x = np.zeros((1, 1, 4))
    got = _gradient_of("LpPool", x, np.ones((1, 1, 2)), False, kernel_shape=[2], strides=[2], p=p)
    np.testing.assert_array_equal(got, x)


def test_average_counts_padding_as_told() -> None:
    x, g = np.zeros((1, 1, 2)), np.ones((1, 1, 2))
    attrs = {"kernel_shape": [2], "pads": [1, 0]}
    got = _gradient_of("AveragePool", x, g, False, **attrs)
    np.testing.assert_allclose(got, [[[1.5, 0.5]]])
    got = _gradient_of("AveragePool", x, g, False, count_include_pad=1, **attrs)
    np.testing.assert_allclose(got, [[[1.0, 0.5]]])
